"""A report as Markdown, its pictures in files beside it."""

import base64
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape

from efface.evaluate.report.content import Content, Detail, Table
from efface.files import write_whole


def to_markdown(content: Content, pictures: str) -> tuple[str, dict[str, str]]:
    """Return the text, and the pictures that it refers to, as SVG by name.

    Args:
        content: of the report.
        pictures: the folder of the pictures, relative to the text.
    """
    drawn: dict[str, str] = {}

    def picture(name: str, svg: str, meaning: str) -> str:
        drawn[f"{name}.svg"] = svg
        return f"![{_escaped(meaning)}](<{pictures}/{name}.svg>)"

    parts = ["# Unlearning report", *map(_words, content.sentences)]
    if content.runs.lines:
        parts += ["## Runs", _table(content.runs)]
    if content.runs.lines and content.runs.has_more:
        parts += ["### All figures", _table(content.runs, on_demand=True)]
    if content.scatter:
        parts += ["## Forget Quality against Model Utility", picture("scatter", content.scatter, "scatter plot")]
    if content.curves:
        parts += ["## Over steps", picture("curves", content.curves, "curves over steps")]
    if content.audit:
        parts += ["## Leak audit", "Mean novel recall by view.", _table(content.audit)]
        if content.audit.has_more:
            parts += ["### All figures of the audit", _table(content.audit, on_demand=True)]
    if content.details:
        parts.append("## Forget rows, run by run")
    for place, detail in enumerate(content.details, start=1):
        parts += [f"### {_escaped(detail.name)}", _escaped(detail.settings)]
        if detail.distribution:
            parts.append(picture(f"distribution-{place}", detail.distribution, "truth ratios of the forget rows"))
        if detail.leaks:
            parts.append(_leaks(detail))
    if content.remarks:
        parts += ["## Remarks", "\n".join(f"- {_words(text)} ({_escaped(runs)})" for text, runs in content.remarks)]
    return "\n\n".join(filter(None, parts)) + "\n", drawn


def _table(table: Table, *, on_demand: bool = False) -> str:
    """Return the columns that are shown at once, or the first two and those on demand."""
    chosen = [
        place
        for place, column in enumerate(table.columns)
        if (column.on_demand or place < 2 if on_demand else not column.on_demand)
    ]
    columns = [table.columns[place] for place in chosen]
    lines = [[line.cells[place].text for place in chosen] for line in table.lines]
    return _grid([column.title for column in columns], [column.numeric for column in columns], lines)


def _leaks(detail: Detail) -> str:
    titles = ["row", "recall", *(["retain model"] if detail.compared else []), "question", "truth", "generation"]
    lines = []
    for leak in detail.leaks:
        retain = "-" if leak.retain_recall is None else f"{leak.retain_recall:.3f}"
        numbers = [f"{leak.recall:.3f}", *([retain] if detail.compared else [])]
        lines.append([leak.index, *numbers, *map(shortened, (leak.question, leak.truth, leak.generation))])
    beyond = " beyond that of the retain model" if detail.compared else ""
    summary = f"worst leaks: {len(detail.leaks)} rows of largest ROUGE-L recall{beyond}"
    grid = _grid(titles, [title in ("recall", "retain model") for title in titles], lines)
    return f"<details>\n<summary>{summary}</summary>\n\n{grid}\n\n</details>"


def _grid(titles: Sequence[str], numeric: Sequence[bool], lines: Sequence[Sequence[str]]) -> str:
    rows = [[_escaped(cell) for cell in line] for line in (titles, *lines)]
    rows.insert(1, ["---:" if right else "---" for right in numeric])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _words(text: str) -> str:
    """Escape a sentence, but for code between backticks."""
    return "".join(part if index % 2 else _escaped(part) for index, part in enumerate(re.split(r"(`[^`\n]*`)", text)))


def _escaped(text: str) -> str:
    """Return text that Markdown shows as it is, in one line: no HTML, no markup, no end of a cell."""
    text = re.sub(r"\s+", " ", text)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~#$!])", r"\\\1", text)


TEXT_LIMIT = 400  # letters of a text that are shown

_FOLDER = Path(__file__).parent / "templates"


def to_html(content: Content) -> str:
    """Return the page. Texts of models and files are escaped, and no script but the page's own may run."""
    script = (_FOLDER / "report.js").read_text(encoding="utf-8")
    templates = Environment(loader=FileSystemLoader(_FOLDER), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return templates.get_template("report.html.jinja").render(
        content=content,
        svg=Markup,  # matplotlib escapes the texts in its drawings
        words=_html_words,
        short=shortened,
        script=Markup(script),  # noqa: S704
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        version=version("efface"),
    )


def shortened(text: str) -> str:
    """Return the text, or its beginning."""
    return text if len(text) <= TEXT_LIMIT else f"{text[:TEXT_LIMIT]}…"


def _html_words(text: str) -> Markup:
    """Escape a sentence; what is between backticks becomes code."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))  # noqa: S704


def report(
    folders: str | Path | Sequence[str | Path],
    output: str | Path = "report.html",
    *,
    markdown: str | Path | None = None,
    full: str | Path | None = None,
    retain_log: str | Path | None = None,
    floor: float = 0.9,
    details: int = 12,
) -> Path:
    """Write one HTML file, which needs no other, about the evaluations in folders; return its path.

    It holds a table of the runs ranked by Forget Quality, Forget Quality against Model Utility, figures over steps and
    checkpoints, leak audits and, for the best runs, the truth ratios of the forget rows with the Kolmogorov-Smirnov
    statistic, and the worst leaks. The same files give the same bytes. A run whose files cannot be read is listed with
    the reason.

    Args:
        folders: runs, or folders of runs at any depth, with ``TOFU_EVAL.json``, ``TOFU_SUMMARY.json``,
            ``eval_log_aggregated.json``, ``AUDIT.json`` or ``trainer_state.json``; also logs by their paths.
        output: the HTML file; replaced if it is there.
        markdown: also write the report as Markdown, its pictures in a folder ``<name>-pictures`` beside it.
        full: log, or folder with the log, of the model before unlearning.
        retain_log: the same of a model trained on the retain set alone. Without it, what ``efface evaluate
            --retain-model`` left beside a run; without that, Forget Quality is what the evaluations stored.
        floor: runs with less Model Utility than so many times that of the full model are ranked after the others; 0
            ranks all alike.
        details: how many of the best runs are shown row by row.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: folders without anything to report, a full or retain log that cannot be read, settings out of range.
    """
    if not 0 <= floor <= 1:
        raise ValueError(f"`floor`: expected a share of the full model's utility, 0 .. 1, got {floor}")
    if details < 0:
        raise ValueError(f"`details`: expected a number of runs from 0 on, got {details}")
    target = _target(output, "output", (".html", ".htm"))
    text_target = None if markdown is None else _target(markdown, "markdown", (".md", ".markdown"))
    # matplotlib takes a moment to load, and whoever evaluates during a run has no use for it
    from efface.evaluate.report.content import gather  # noqa: PLC0415

    given = [folders] if isinstance(folders, (str, Path)) else list(folders)
    content = gather(given, full=full, retain_log=retain_log, floor=floor, details=details)
    if text_target is not None:
        pictures = text_target.with_name(f"{text_target.stem}-pictures")
        text, drawn = to_markdown(content, pictures.name)
        _write_pictures(pictures, drawn)
        _write(text_target, text)
    _write(target, to_html(content))
    return target


def _target(path: str | Path, name: str, suffixes: Iterable[str]) -> Path:
    path = Path(path)
    if path.suffix.lower() not in suffixes:  # a report must not replace a log by accident
        raise ValueError(f"`{name}`: expected a file that ends in {' or '.join(suffixes)}, got {str(path)!r}")
    if path.is_dir():
        raise ValueError(f"`{name}`: expected a file, got the folder {str(path)!r}")
    return path


def _write_pictures(folder: Path, drawn: Mapping[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.svg"):
        if old.name not in drawn:
            old.unlink()
    for name, svg in drawn.items():
        _write(folder / name, svg)


def _write(path: Path, text: str) -> None:
    """Write whole or not at all; half a surrogate pair, which a generation may hold, becomes a question mark."""
    write_whole(path, text.encode("utf-8", errors="replace"))
