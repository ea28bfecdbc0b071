"""``efface demo``: train, unlearn and evaluate a small model. Also the tables and progress of runs on small models."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from efface.files import check_output, in_words, locked_folder, remove_leftovers, written_whole
from efface.flags import FlagParser

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from efface.cli.progress import ProgressBar
    from efface.simulate.run import SimulatedModel

# Scale -> (authors, authors to forget). The default forgets two, as TOFU's forget01 does: with more rows the KS test
# also distinguishes two models that were trained in the same way.
_AUTHORS = {"default": (24, 2), "smoke": (4, 1)}
_TOFU_AUTHORS = {"default": (20, 2), "smoke": (4, 2)}
_LEFTOVER_SECONDS = 86_400  # seconds after which partial files belong to a killed demo and are removed
_COLUMNS = {
    "forget quality": ("forget_quality", ".2g"),
    "truth ratio": ("truth_ratio", ".3f"),
    "P(forget)": ("probability_forget", ".3g"),
    "P(retain)": ("probability_retain", ".3f"),
    "seconds": ("seconds", ".1f"),
    "tokens/s": ("tokens_per_second", ",.0f"),
}

_EXAMPLES = """
examples:
  efface demo
  efface demo --scale smoke --output demo-smoke
  efface demo --data tofu/ --authors 20 --output demo-tofu
"""


def parser() -> FlagParser:
    """Return the parser of the command's flags."""
    flags = FlagParser(
        "demo",
        "Trains a small Llama on fictitious authors (full) and another one without some of them (retain). "
        "Unlearns those authors from full with NPO, SimNPO and GradDiff, and compares the results with retain.",
        _EXAMPLES,
    )
    flags.add_argument("--output", type=Path, default=Path("demo-out"), help="output folder (default: demo-out)")
    flags.add_argument("--data", type=Path, help="folder with TOFU's JSON files (default: made-up authors)")
    flags.add_argument("--authors", type=int, help="number of authors (default: 24; TOFU: 20; smoke: 4)")
    flags.add_argument(
        "--forget-authors", type=int, help="number of them to forget (default: 2; smoke without --data: 1)"
    )
    flags.add_argument(
        "--scale",
        choices=sorted(_AUTHORS),
        default="default",
        help="size of the run; smoke takes less than a minute (default: default)",
    )
    flags.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    flags.add_argument("--overwrite", action="store_true", help="write into an output folder that is not empty")
    flags.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    return flags


def run(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    options = parser().parse_args(argv)
    out = check_output(options.output, overwrite=options.overwrite, inputs={"--data": options.data})
    # Imported here, so that --help stays fast.
    from efface.cli.progress import open_console, show_json
    from efface.simulate.data import fictitious, tofu
    from efface.simulate.demo import DEMO_SETTINGS, Demo
    from efface.simulate.run import write_record

    authors, forget = (_AUTHORS if options.data is None else _TOFU_AUTHORS)[options.scale]
    authors = authors if options.authors is None else options.authors
    forget = forget if options.forget_authors is None else options.forget_authors
    data = fictitious(authors, forget) if options.data is None else tofu(options.data, authors, forget)
    settings = replace(DEMO_SETTINGS[options.scale], seed=options.seed)
    if options.data is not None and options.scale == "default":
        # TOFU's texts are longer and more varied: use a larger vocabulary, and fewer epochs over more tokens.
        settings = replace(settings, vocabulary=4096, teach_epochs=30)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    console = open_console(stderr=True)
    remove_leftovers(out, seconds=_LEFTOVER_SECONDS)
    if out.is_dir() and (there := sorted(out.iterdir())):
        said = (
            f"files of the same names will be replaced when the demo is complete; the folder contains {in_words(there)}"
        )
        console.print(said)
    with locked_folder(out), written_whole(out) as partial:
        with teaching_bar(console) as progress:
            demo = Demo(data, settings, partial, progress)
            models = demo.tell()
        data.write(partial / "data")
        plot(demo.curves, partial)
        record = demo.record(models)
        write_record(partial / "demo.json", record)
    if options.json:
        show_json(record)
    else:
        open_console().print(figures_table("model", _COLUMNS, models, title=data.name))
    for model in models:
        if model.note:
            console.print(f"{model.name}: {model.note}")
    console.print(f"models, rows (data/), plots and figures: {out}")
    return 0


@contextmanager
def teaching_bar(console: "Console") -> Iterator[Callable[[str], "ProgressBar"]]:
    """Yield a function from a title to a progress bar. Each call closes the bar of the training before."""
    from efface.cli.progress import ProgressBar

    bar = ProgressBar(console, "", log=False)

    def titled(title: str) -> ProgressBar:
        bar.close()
        bar.title = title
        return bar

    try:
        yield titled
    finally:
        bar.close()


def figures_table(
    first: str, columns: Mapping[str, tuple[str, str]], models: Sequence["SimulatedModel"], **options: Any
) -> "Table":
    """Return a table with one line for each model.

    Args:
        first: heading of the column with the names of the models.
        columns: heading -> (name of a figure, format).
        models: the rows. A figure that a model lacks is shown as a dash.
        options: arguments of ``rich.table.Table``.
    """
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), **options)
    table.add_column(first, no_wrap=True)
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for model in models:
        figures = ((model.figures.get(name), form) for name, form in columns.values())
        table.add_row(model.name, *("-" if figure is None else f"{figure:{form}}" for figure, form in figures))
    return table


def plot(curves: Mapping[str, Sequence[Mapping[str, float]]], out: Path) -> None:
    """Plot forget quality, and the probability of the answers to forget and retain rows, over the unlearning steps.

    Writes ``forget_quality.png`` and ``probability.png`` into ``out``.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    quality, probability = (plt.subplots(figsize=(6.4, 4), layout="constrained") for _ in range(2))
    for index, (name, curve) in enumerate(curves.items()):
        points = {key: [point[key] for point in curve] for key in curve[0]}
        quality[1].plot(points["step"], points["forget_quality"], marker="o", label=name)
        for role, style in (("forget", "-"), ("retain", "--")):
            label, values = f"{name}, {role}", points[f"probability_{role}"]
            probability[1].plot(points["step"], values, style, color=f"C{index}", marker=".", label=label)
    figure, axes = quality
    axes.axhline(0.05, color="grey", linestyle="--", linewidth=1)
    axes.annotate("p = 0.05", (0, 0.05), textcoords="offset points", xytext=(0, 4), color="grey", fontsize=8)
    axes.set(xlabel="optimizer step", ylabel="forget quality (KS p-value)", yscale="log")
    axes.set_title("Forget quality: p-value against the retain model")
    axes.legend()
    figure.savefig(out / "forget_quality.png", dpi=150)
    figure, axes = probability
    axes.set(xlabel="optimizer step", ylabel="probability of the answer", ylim=(-0.02, 1.02))
    axes.set_title("Probability of the answers to forget and retain rows")
    axes.legend(fontsize=8)
    figure.savefig(out / "probability.png", dpi=150)
    for figure, _ in (quality, probability):
        plt.close(figure)
