"""Writing of a report as one self-contained HTML file, or as Markdown with separate picture files."""

import base64
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape

from efface.evaluate.report.content import Content, Detail, Table, gather
from efface.files import refuse_inputs, write_whole

_TEXT_LIMIT = 400  # maximum number of characters of a text that are shown
_FOLDER = Path(__file__).parent / "templates"


def write_report(
    folders: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    markdown: str | Path | None,
    full: str | Path | None,
    retain_log: str | Path | None,
    floor: float,
    details: int,
) -> Content:
    """Write a report and return its content. For arguments and errors see ``efface.evaluate.report``."""
    if not 0 <= floor <= 1:
        raise ValueError(f"`floor`: expected a share of the full model's Model Utility, 0 .. 1, got {floor}")
    if details < 0:
        raise ValueError(f"`details`: expected a number of runs of at least 0, got {details}")
    target = _target(output, "output", (".html", ".htm"))
    text_target = None if markdown is None else _target(markdown, "markdown", (".md", ".markdown"))
    given = [folders] if isinstance(folders, (str, Path)) else list(folders)
    read = {"--full": full, "--retain-log": retain_log, **{f"log {number}": log for number, log in enumerate(given, 1)}}
    refuse_inputs([target] if text_target is None else [target, text_target], read)
    content = gather(given, full=full, retain_log=retain_log, floor=floor, details=details)
    if text_target is not None:
        write_markdown(content, text_target)
    write_html(content, target)
    return content


def _target(path: str | Path, name: str, suffixes: Iterable[str]) -> Path:
    path = Path(path)
    if path.suffix.lower() not in suffixes:  # so that a report does not replace a log by accident
        raise ValueError(f"`{name}`: expected a file that ends in {' or '.join(suffixes)}, got {str(path)!r}")
    if path.is_dir():
        raise ValueError(f"`{name}`: expected a file, got the folder {str(path)!r}")
    if path.is_symlink() and not path.exists():
        raise ValueError(
            f"`{name}`: expected a file, got a link to {str(path.readlink())!r}, which does not exist; choose another"
        )
    return path


def write_html(content: Content, path: Path) -> None:
    """Write the HTML page. All text from models and files is escaped, and only the page's own script can run."""
    script = (_FOLDER / "report.js").read_text(encoding="utf-8")
    templates = Environment(loader=FileSystemLoader(_FOLDER), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = templates.get_template("report.html.jinja").render(
        content=content,
        svg=Markup,  # matplotlib escapes the text in its drawings
        words=_html_words,
        short=_shortened,
        script=Markup(script),  # noqa: S704
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        version=version("efface"),
    )
    _write(path, page)


def _html_words(text: str) -> Markup:
    """Escape a sentence for HTML. Text between backticks becomes code."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))  # noqa: S704


def write_markdown(content: Content, path: Path) -> None:
    """Write the report as Markdown, and its pictures into the folder ``<name>-pictures`` in the same directory."""
    folder = path.with_name(f"{path.stem}-pictures")
    drawn: dict[str, str] = {}

    def picture(name: str, svg: str, meaning: str) -> str:
        drawn[f"{name}.svg"] = svg
        return f"![{_escaped(meaning)}](<{folder.name}/{name}.svg>)"

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
    _write_pictures(folder, drawn)
    _write(path, "\n\n".join(filter(None, parts)) + "\n")


def _table(table: Table, *, on_demand: bool = False) -> str:
    """Return a Markdown table of the columns that are always shown, or of the first two and those on demand."""
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
        lines.append([leak.index, *numbers, *map(_shortened, (leak.question, leak.truth, leak.generation))])
    above = " above that of the retain model" if detail.compared else ""
    summary = f"worst leaks: {len(detail.leaks)} rows with the largest ROUGE-L recall{above}"
    grid = _grid(titles, [title in ("recall", "retain model") for title in titles], lines)
    return f"<details>\n<summary>{summary}</summary>\n\n{grid}\n\n</details>"


def _grid(titles: Sequence[str], numeric: Sequence[bool], lines: Sequence[Sequence[str]]) -> str:
    rows = [[_escaped(cell) for cell in line] for line in (titles, *lines)]
    rows.insert(1, ["---:" if right else "---" for right in numeric])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _words(text: str) -> str:
    """Escape a sentence for Markdown, except code between backticks."""
    return "".join(part if index % 2 else _escaped(part) for index, part in enumerate(re.split(r"(`[^`\n]*`)", text)))


def _escaped(text: str) -> str:
    """Escape text so that Markdown shows it unchanged on one line, without HTML, markup or the end of a table cell."""
    text = re.sub(r"\s+", " ", text)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~#$!])", r"\\\1", text)


def _shortened(text: str) -> str:
    """Return the text, cut to ``_TEXT_LIMIT`` characters."""
    return text if len(text) <= _TEXT_LIMIT else f"{text[:_TEXT_LIMIT]}…"


def _write_pictures(folder: Path, drawn: Mapping[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.svg"):
        if old.name not in drawn:
            old.unlink()
    for name, svg in drawn.items():
        _write(folder / name, svg)


def _write(path: Path, text: str) -> None:
    """Write a file atomically. A lone surrogate, which a generation can contain, becomes a question mark."""
    write_whole(path, text.encode("utf-8", errors="replace"))
