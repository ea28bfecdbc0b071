"""The demo's two plots: forget quality, and probability on forget and retain rows, over the steps of unlearning."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

from efface.cli.demo.run import Measured


def plot_forget_quality(unlearned: Sequence[Measured], path: Path) -> None:
    """Write forget quality over steps, on a logarithmic axis."""
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for measured in unlearned:
        steps = [point["step"] for point in measured.curve]
        axes.plot(steps, [point["forget_quality"] for point in measured.curve], marker="o", label=measured.name)
    axes.axhline(0.05, color="grey", linestyle="--", linewidth=1)
    axes.annotate("p = 0.05", (0, 0.05), textcoords="offset points", xytext=(0, 4), color="grey", fontsize=8)
    axes.set(xlabel="optimizer step", ylabel="forget quality (KS p-value)", yscale="log")
    axes.set_title("Can it be told from a model that never knew?")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_probability(unlearned: Sequence[Measured], path: Path) -> None:
    """Write the answers' probability on forget (solid) and retain (dashed) rows over steps."""
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for index, measured in enumerate(unlearned):
        steps = [point["step"] for point in measured.curve]
        for role, style in (("forget", "-"), ("retain", "--")):
            values = [point[f"probability_{role}"] for point in measured.curve]
            axes.plot(steps, values, style, color=f"C{index}", marker=".", label=f"{measured.name}, {role}")
    axes.set(xlabel="optimizer step", ylabel="probability of the answer", ylim=(-0.02, 1.02))
    axes.set_title("What it forgets, and what it keeps")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
