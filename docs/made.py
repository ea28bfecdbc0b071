"""What the pages include and nobody writes by hand: pictures, the help of every command, tables of arguments."""

import contextlib
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from efface.cli.main import COMMANDS, COMMON, EXIT_CODES, main
from efface.hf.train.options import as_markdown

INK, FORGET, RETAIN, QUIET, LOUD = "#333333", "#d1495b", "#30638e", "#d8dee4", "#edae49"


def pictures(folder: Path) -> None:
    """Draw every picture as SVG; the same bytes each time."""
    folder.mkdir(exist_ok=True)
    mpl.rcParams.update({"svg.hashsalt": "efface", "font.size": 10, "text.color": INK, "font.family": "DejaVu Sans"})
    for draw in (memory, packed_batch, loss_loop):
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        axes = figure.add_subplot()
        axes.set_axis_off()
        draw(axes)
        figure.savefig(folder / f"{draw.__name__}.svg", metadata={"Date": None}, transparent=False)


def _box(axes: Axes, x: float, y: float, width: float, height: float, colour: str, text: str = "") -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="white", linewidth=1.5))
    dark = colour in (FORGET, RETAIN)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color="white" if dark else INK, fontsize=9)


# Llama-3.2-1B in bf16, NPO, 8 pairs of 64 tokens: bytes computed from shapes, in MiB. 1.24e9 parameters, V = 128256.
_WEIGHTS = 1.24e9 * 2 / 2**20
_TOKENS, _LABELS, _VOCABULARY = 2 * 8 * 64, 2 * 8 * 36, 128256


def memory(axes: Axes) -> None:
    """Where the memory goes: computed, in MiB, for a step of Llama-3.2-1B."""
    logits = _TOKENS * _VOCABULARY * (2 + 4 + 4) / 2**20  # bf16, the fp32 copy, its gradient
    reference = (_WEIGHTS, _TOKENS / 2 * _VOCABULARY * (2 + 4) / 2**20)
    bars = {
        "padded, second model": [
            ("weights", _WEIGHTS, QUIET),
            ("gradients", _WEIGHTS, QUIET),
            ("reference model", reference[0], FORGET),
            ("logits of both", logits + reference[1], LOUD),
        ],
        "efface, cached": [
            ("weights", _WEIGHTS, QUIET),
            ("gradients", _WEIGHTS, QUIET),
            ("logits", _LABELS * _VOCABULARY * 2 / 2**20, LOUD),
        ],
    }
    for row, (name, parts) in enumerate(bars.items()):
        x = 0.0
        for label, size, colour in parts:
            _box(axes, x, -row, size, 0.6, colour)
            inside = size > 1200
            axes.text(
                x + size / 2 if inside else x + size + 60,
                -row + 0.3,
                f"{label}\n{size:,.0f}",
                ha="center" if inside else "left",
                va="center",
                fontsize=8,
                color="white" if colour == FORGET else INK,
            )
            x += size
        axes.text(0, -row + 0.68, f"{name}: {x / 1024:.1f} GiB without activations and optimizer", fontsize=10)
    axes.set_xlim(0, 10200)
    axes.set_ylim(-1.1, 1.0)


def packed_batch(axes: Axes) -> None:
    """Three pairs padded, and the same packed."""
    forget, retain = [(3, 5), (4, 3), (2, 7)], [(3, 4), (5, 6), (2, 3)]
    longest = [max(map(sum, part)) for part in (forget, retain)]
    for column, (part, colour) in enumerate(((forget, FORGET), (retain, RETAIN))):
        for row, (prompt, answer) in enumerate(part):
            x = column * 14.0
            _box(axes, x, 3 - row, prompt, 0.8, QUIET, "prompt")
            _box(axes, x + prompt, 3 - row, answer, 0.8, colour, "answer")
            padding = longest[column] - prompt - answer
            if padding:
                axes.add_patch(
                    Rectangle((x + prompt + answer, 3 - row), padding, 0.8, fill=False, hatch="///", ec=QUIET)
                )
    axes.text(0, 4.0, "padded: a forward pass over the forget rows, another over the retain rows")
    x = 0.0
    for part, colour in ((forget, FORGET), (retain, RETAIN)):
        for prompt, answer in part:
            _box(axes, x * 0.5, -1.2, prompt * 0.5, 0.8, QUIET)
            _box(axes, (x + prompt) * 0.5, -1.2, answer * 0.5, 0.8, colour)
            x += prompt + answer
    axes.text(0, -0.2, "packed: one forward pass, no padding; only the coloured tokens' rows enter the head")
    axes.set_xlim(0, 27)
    axes.set_ylim(-1.4, 4.6)


def loss_loop(axes: Axes) -> None:
    """One chunk of the loss loop."""
    steps = [
        ("Z = H Wᵀ", "GEMM", RETAIN),
        ("Zr = Hr Wrᵀ", "GEMM, if live", RETAIN),
        ("row pass", "ℓ, ℓ_ref;\nZ ← softmax − onehot", LOUD),
        ("sequence loss", "terms,\nc = ∂loss/∂ℓ", LOUD),
        ("Z W", "GEMM", RETAIN),
        ("dW += Zᵀ (c H)", "GEMM", RETAIN),
    ]
    for i, (name, what, colour) in enumerate(steps):
        _box(axes, i * 2.1, 0, 1.9, 1, colour, name)
        axes.text(i * 2.1 + 0.95, -0.25, what, ha="center", va="top", fontsize=7.5)
        if i:
            axes.annotate("", (i * 2.1, 0.5), (i * 2.1 - 0.2, 0.5), arrowprops={"arrowstyle": "->", "color": INK})
    axes.annotate(
        "",
        (0.5, 1.1),
        (11.5, 1.1),
        arrowprops={"arrowstyle": "->", "color": INK, "connectionstyle": "arc3,rad=0.12"},
    )
    axes.text(6, 1.85, "next chunk of whole sequences, in the same memory", ha="center")
    axes.set_xlim(-0.1, 12.6)
    axes.set_ylim(-0.9, 2.5)


@contextlib.contextmanager
def _columns(count: int) -> Iterator[None]:
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(count)
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def argument_tables(folder: Path) -> None:
    """Write what becomes of transformers' arguments."""
    (folder / "arguments.md").write_text(as_markdown(), encoding="utf-8")


_COMMAND_LINE = """Results go to standard output, progress and errors to standard error. On a terminal a command
shows one bar; in a pipe or a file it writes a line every few seconds. Where it prints a table, `--json` prints one JSON
document in its place. Other libraries' progress bars and remarks are off; `--debug` shows them, and so do their own
variables: `HF_HUB_DISABLE_PROGRESS_BARS=0`, `HF_DATASETS_DISABLE_PROGRESS_BARS=0`, `TRANSFORMERS_VERBOSITY=warning`.

Hyphens and underscores in the names of flags mean the same; `--output-dir` and `--out` are read as `--output`."""


def _rows(heading: str, lines: Mapping[Any, str]) -> list[str]:
    """Return a table of names and what they mean."""
    return [f"| {heading} | |", "|---|---|", *(f"| `{name}` | {text} |" for name, text in lines.items())]


def command_help(folder: Path) -> None:
    """Write ``efface <command> --help-all`` of every command, and the page that shows them."""
    page = ["# Command line", "", _COMMAND_LINE, "", *_rows("flag of every command", COMMON), ""]
    page += ["## Exit codes", "", *_rows("code", EXIT_CODES), ""]
    for name, (_, summary) in COMMANDS.items():
        said = io.StringIO()
        with _columns(88), contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            main([name, "--help-all"])
        (folder / f"{name}.txt").write_text(_without_defaults_of_the_machine(said.getvalue()), encoding="utf-8")
        page += [f"## efface {name}", "", f"{summary[0].upper()}{summary[1:]}.", ""]
        page += [f"```{{literalinclude}} ../_made/{name}.txt", ":language: text", "```", ""]
    (folder.parent / "reference" / "commands.md").write_text("\n".join(page), encoding="utf-8")


def _without_defaults_of_the_machine(text: str) -> str:
    return text.replace(str(Path.home()), "~")
