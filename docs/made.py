"""Parts of the pages that code makes: pictures, the help of every command, tables of arguments."""

import contextlib
import io
import os
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from transformers import TrainingArguments

from efface.cli.main import COMMANDS, COMMON, EXIT_CODES, main
from efface.hf.train.arguments import UnlearnArguments
from efface.hf.train.options import as_markdown

INK, FORGET, RETAIN, QUIET, LOUD = "#24292f", "#c83e4d", "#2f6690", "#dfe4ea", "#f2b134"
PALE, GREY = "#8a94a0", "#57606a"

# Pictures are 5 inches wide with text of 9 points and more: 10 pixels high where a phone shows them 400 pixels wide.
WIDTH = 5.0
SMALL, TEXT, TITLE = 9.0, 9.5, 10.5


def pictures(folder: Path) -> None:
    """Draw every picture as SVG; the same bytes each time."""
    folder.mkdir(exist_ok=True)
    style: Any = {"svg.hashsalt": "efface", "font.size": TEXT, "text.color": INK, "font.family": "DejaVu Sans"}
    with mpl.rc_context(style):
        for draw, height in ((memory, 3.4), (packed_batch, 4.3), (loss_loop, 4.7), (cache_entries, 5.6)):
            # One unit of the axes is a hundredth of the width, in both directions.
            figure = Figure(figsize=(WIDTH, height))
            axes = figure.add_axes((0, 0, 1, 1))
            axes.set_axis_off()
            axes.set_xlim(0, 100)
            axes.set_ylim(100 * height / WIDTH, 0)
            draw(axes)
            figure.savefig(folder / f"{draw.__name__}.svg", metadata={"Date": None}, transparent=False)


def _box(
    axes: Axes, x: float, y: float, width: float, height: float, colour: str, text: str = "", *, size: float = TEXT
) -> None:
    """Draw a filled box with its upper left corner at (x, y)."""
    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="white", linewidth=0.8))
    ink = "white" if colour in (FORGET, RETAIN) else INK
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=ink, fontsize=size)


def _says(axes: Axes, x: float, y: float, text: str, size: float = TEXT, **options: Any) -> None:
    axes.text(x, y, text, fontsize=size, **{"ha": "left", "va": "center", **options})


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0.0) -> None:
    style = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.1, "connectionstyle": f"arc3,rad={bend}"}
    axes.annotate("", end, start, arrowprops={**style, "shrinkA": 0, "shrinkB": 0})


# Llama-3.2-1B in bf16, NPO, 8 pairs of 64 tokens with 36 labels each. Bytes follow from shapes, in GiB.
_GIB = 2**30
_WEIGHTS = 1.24e9 * 2 / _GIB
_TOKENS, _LABELS, _VOCABULARY = 2 * 8 * 64, 2 * 8 * 36, 128256


def memory(axes: Axes) -> None:
    """Memory of a training step, padded with a second model against packed with a cached reference."""
    policy = _TOKENS * _VOCABULARY * (2 + 4 + 4) / _GIB  # bf16 logits, their fp32 copy, its gradient
    frozen = _TOKENS / 2 * _VOCABULARY * (2 + 4) / _GIB  # of the forget half, without a gradient
    bars = {
        "padded step, second model": [
            ("weights", _WEIGHTS, QUIET),
            ("gradients", _WEIGHTS, QUIET),
            ("reference\nmodel", _WEIGHTS, FORGET),
            ("logits", policy + frozen, LOUD),
        ],
        "efface, cached reference": [
            ("weights", _WEIGHTS, QUIET),
            ("gradients", _WEIGHTS, QUIET),
            ("logits", _LABELS * _VOCABULARY * 2 / _GIB, LOUD),
        ],
    }
    scale = 94 / sum(size for _, size, _ in bars["padded step, second model"])
    for row, (name, parts) in enumerate(bars.items()):
        x, y = 3.0, 5.0 + 30 * row
        total = sum(size for _, size, _ in parts)
        axes.text(x, y, name, fontsize=TITLE, fontweight="bold", va="center")
        _says(axes, 97, y, f"{total:.1f} GiB", TITLE, ha="right")
        for label, size, colour in parts:
            width = size * scale
            if width > 12:
                _box(axes, x, y + 4, width, 15, colour, f"{label}\n{size:.1f}", size=SMALL)
            else:
                _box(axes, x, y + 4, width, 15, colour)
                _says(axes, x + width + 1.5, y + 11.5, f"{label} {size:.1f}", SMALL)
            x += width
    _says(axes, 3, 61.5, "Not shown: activations and the states of the optimizer.", SMALL, color=GREY)


def packed_batch(axes: Axes) -> None:
    """Three forget and three retain rows, padded and packed; a cell is a token."""
    forget, retain = [(3, 5), (4, 3), (2, 7)], [(3, 4), (5, 6), (2, 3)]
    longest = [max(map(sum, part)) for part in (forget, retain)]
    cell, x0 = 4.2, 3.0
    _says(axes, x0, 4, "padded: two forward passes, logits of every position", TITLE, fontweight="bold")
    positions = 0
    for column, (part, colour) in enumerate(((forget, FORGET), (retain, RETAIN))):
        left = x0 + column * (longest[0] + 1.4) * cell
        for row, (prompt, answer) in enumerate(part):
            cells = [QUIET] * prompt + [colour] * answer + [""] * (longest[column] - prompt - answer)
            positions += len(cells)
            _tokens(axes, left, 8 + row * 6, cell, cells)
    tokens = sum(map(sum, [*forget, *retain]))
    labels = sum(answer for _, answer in [*forget, *retain])
    _says(axes, x0, 28.6, f"{positions} positions, {positions - tokens} of them padding: {positions} rows of logits")

    _says(axes, x0, 38, "packed: one forward pass without padding", TITLE, fontweight="bold")
    cell = 94 / tokens
    x = x0
    for part, colour in ((forget, FORGET), (retain, RETAIN)):
        for prompt, answer in part:
            _tokens(axes, x, 42, cell, [QUIET] * prompt + [colour] * answer, height=5.2)
            end = x + (prompt + answer) * cell
            axes.plot([x + 0.5, x + 0.5, end - 0.5, end - 0.5], [48.4, 49.6, 49.6, 48.4], color=INK, linewidth=0.9)
            x = end
    _says(axes, x0, 53, f"{tokens} positions; each sequence attends to itself alone")

    _says(axes, x0, 61.5, "head and loss: the answers alone", TITLE, fontweight="bold")
    x = x0
    for part, colour in ((forget, FORGET), (retain, RETAIN)):
        for _, answer in part:
            _tokens(axes, x, 65, cell, [colour] * answer, height=5.2)
            x += answer * cell
    _says(axes, x + 2, 67.6, f"{labels} rows of logits")
    x = x0
    for name, colour in (("prompt", QUIET), ("forget answer", FORGET), ("retain answer", RETAIN), ("padding", "")):
        _tokens(axes, x, 77, 3.6, [colour], height=4.2)
        _says(axes, x + 4.8, 79.2, name, SMALL)
        x += 8.5 + 1.4 * len(name)


def _tokens(axes: Axes, x: float, y: float, cell: float, colours: Sequence[str], height: float = 5.0) -> None:
    """Draw a row of tokens; one without a colour is padding."""
    for i, colour in enumerate(colours):
        axes.add_patch(
            Rectangle(
                (x + i * cell, y),
                cell,
                height,
                linewidth=0.6,
                facecolor=colour or "white",
                edgecolor="white" if colour else PALE,
                hatch=None if colour else "////",
            )
        )


def loss_loop(axes: Axes) -> None:
    """The steps of one chunk in the loss loop."""
    steps = [
        ("Z = H Wᵀ", "logits of the chunk's label rows", RETAIN),
        ("Zr = Hr Wrᵀ", "the frozen model's, if it is live", RETAIN),
        ("row pass", "ℓ = log p(label);  Z ← softmax − onehot", LOUD),
        ("Z W", "gradient of H, without c", RETAIN),
        ("c = ∂loss/∂ℓ", "from the sums of ℓ over sequences", LOUD),
        ("dW += Zᵀ (−c ⊙ H)", "gradient of W", RETAIN),
    ]
    _says(axes, 3, 4.5, "for each chunk of whole sequences", TITLE, fontweight="bold")
    top, pitch, height = 9.0, 12.4, 9.2
    for i, (name, what, colour) in enumerate(steps):
        y = top + i * pitch
        _box(axes, 8, y, 33, height, colour, name)
        _says(axes, 43.5, y + height / 2, what, SMALL)
        if i:
            _arrow(axes, (24.5, y - pitch + height), (24.5, y))
    last = top + 5 * pitch + height / 2
    first = top + height / 2
    axes.plot([8, 4, 4], [last, last, first], color=INK, linewidth=1.1)
    _arrow(axes, (4, first), (8, first))
    _box(axes, 8, 85.2, 4.2, 4.2, RETAIN)
    _says(axes, 14, 87.3, "matrix product", SMALL)
    _box(axes, 43.5, 85.2, 4.2, 4.2, LOUD)
    _says(axes, 49.5, 87.3, "elementwise, in place", SMALL)


def cache_entries(axes: Axes) -> None:
    """The content that identifies an entry of either cache."""
    _says(axes, 3, 4.5, "token cache: one file for each data set", TITLE, fontweight="bold")
    parts = [
        "data: every byte of the file, its type",
        "columns, filter, refusals, max_length",
        "template, system prompt, date",
        "tokenizer, and its library's version",
    ]
    _inputs(axes, 9, parts, "tokens/\n<data>-<key>.arrow", "token ids,\nfirst labels")
    _says(axes, 3, 50, "reference cache: one row for each sequence", TITLE, fontweight="bold")
    parts = [
        "every weight: name, shape, dtype, bits",
        "configuration, active adapters",
        "precision: autocast, TF32",
        "token ids, position of the first label",
    ]
    _inputs(axes, 54.5, parts, "reference.sqlite\n(model, sequence)", "log-probability\nof the answer")
    _says(axes, 3, 96, "In no key: folders, names and dates of files.", TEXT)
    _says(axes, 3, 101.5, "A change of any input above makes another key,", SMALL, color=GREY)
    _says(axes, 3, 105, "so an entry is never used for other content.", SMALL, color=GREY)


def _inputs(axes: Axes, y: float, parts: Sequence[str], key: str, value: str) -> None:
    """Draw the inputs of a key, the key, and what is found under it."""
    pitch, height = 8.6, 7.2
    middle = y + (pitch * (len(parts) - 1) + height) / 2
    for i, part in enumerate(parts):
        _box(axes, 3, y + i * pitch, 55, height, QUIET, part, size=SMALL)
        _arrow(axes, (58, y + i * pitch + height / 2), (65, middle - 5 + 3.3 * (i - 1.5)))
    _box(axes, 65, middle - 10.5, 32, 11, RETAIN, key, size=SMALL)
    _arrow(axes, (81, middle + 0.5), (81, middle + 4.5))
    _box(axes, 65, middle + 4.5, 32, 10.5, LOUD, value, size=SMALL)


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
    """Write the table of transformers' arguments and their treatment, and that of efface's own arguments."""
    (folder / "arguments.md").write_text(as_markdown(), encoding="utf-8")
    theirs = {one.name for one in fields(TrainingArguments)}
    own = [one for one in fields(UnlearnArguments) if one.name not in theirs and one.init]
    rows = [f"| `{one.name}` | `{one.default!r}` | {_escaped(one.metadata['help'])} |" for one in own]
    table = ["| Field | Default | Meaning |", "|---|---|---|", *rows, ""]
    (folder / "own_arguments.md").write_text("\n".join(table), encoding="utf-8")


_COMMAND_LINE = """Results go to standard output; progress and errors go to standard error. On a terminal a command
shows one progress bar; in a pipe or a file it writes a line every few seconds. A command that prints a table prints one
JSON document instead with `--json`. Progress bars and messages of other libraries are off. `--debug` shows them, and so
do the libraries' own variables: `HF_HUB_DISABLE_PROGRESS_BARS=0`, `HF_DATASETS_DISABLE_PROGRESS_BARS=0`,
`TRANSFORMERS_VERBOSITY=warning`.

Hyphens and underscores in the names of flags are equivalent. `--output-dir` and `--out` are read as `--output`."""


def _rows(heading: str, lines: Mapping[Any, str]) -> list[str]:
    """Return a Markdown table of names and their meanings."""
    return [f"| {heading} | |", "|---|---|", *(f"| `{name}` | {text} |" for name, text in lines.items())]


def command_help(folder: Path) -> None:
    """Write the page of all commands, from ``efface <command> --help-all`` of each."""
    page = ["# Command line", "", _COMMAND_LINE, "", *_rows("flag of every command", COMMON), ""]
    page += ["## Exit codes", "", *_rows("code", EXIT_CODES), ""]
    for name, (_, summary) in COMMANDS.items():
        said = io.StringIO()
        with _columns(88), contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            main([name, "--help-all"])
        page += [f"## efface {name}", "", f"{_escaped(summary[0].upper() + summary[1:])}.", ""]
        page += _as_page(_without_defaults_of_the_machine(said.getvalue()))
    (folder.parent / "reference" / "commands.md").write_text("\n".join(page), encoding="utf-8")


def _as_page(text: str) -> Iterator[str]:
    """Yield a help text as Markdown: the usage as code, flags as definitions, what follows them as it is.

    argparse indents a flag by two spaces, and parts it from its help, which is indented further where it goes on, by
    two spaces or a line break.
    """
    usage, *parts = re.split(r"\n\s*\n", text.strip("\n"))
    yield from ("```text", textwrap.dedent(usage), "```", "")
    groups = 0
    while parts:
        title, *lines = parts[0].split("\n")
        flags = [line for line in lines if line.startswith("  -") or re.match(r"  [\w{]", line)]
        if not title.endswith(":") or title.startswith(("examples", " ")) or not flags:
            if groups:
                break
            yield from (_escaped(_joined(parts.pop(0).split("\n"))), "")  # the description
            continue
        yield from (f"**{title.removesuffix(':').capitalize()}**", "")
        for flag, meaning in _flags(lines):
            yield from (f"`{flag}`", f": {_escaped(meaning)}", "")
        groups += 1
        parts.pop(0)
    if parts:
        yield from ("```text", "\n\n".join(parts), "```", "")


def _flags(lines: Sequence[str]) -> list[tuple[str, str]]:
    """Return flags, or positional arguments, and their help."""
    found: list[list[str]] = []
    for line in lines:
        if not line.startswith("   "):
            flag, _, meaning = line.strip().partition("  ")
            found.append([flag, meaning.strip()])
        else:
            found[-1].append(line.strip())
    return [(flag, _joined(meaning) or "one of these") for flag, *meaning in found]


def _joined(lines: Sequence[str]) -> str:
    """Return lines as one; those that were broken behind a hyphen get no space."""
    return re.sub(r"(?<=\w)- (?=\w)", "-", " ".join(filter(None, map(str.strip, lines))))


def _escaped(text: str) -> str:
    """Return plain text as Markdown; code between backticks stays code."""
    pieces = text.split("`")
    if len(pieces) % 2 == 0:  # a backtick without its second
        return re.sub(r"([\\`*_{}\[\]<>$|#~])", r"\\\1", text)
    for i in range(0, len(pieces), 2):
        pieces[i] = re.sub(r"([\\*_{}\[\]<>$|#~])", r"\\\1", pieces[i])
    return "`".join(pieces)


def _without_defaults_of_the_machine(text: str) -> str:
    return text.replace(str(Path.home()), "~")
