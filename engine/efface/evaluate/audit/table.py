"""The table of an audit, as words: for a terminal, and as Markdown."""

from collections.abc import Mapping, Sequence

from efface.evaluate.audit.result import AuditResult, side_by_side


def cells(
    audits: Mapping[str, AuditResult], *, full: str | None = None, retain: str | None = None
) -> tuple[list[str], list[list[str]]]:
    """Return the headings and the rows: a view's numbers for each model and, between a full and a retain model, kept.

    Args:
        audits: by the models' names.
        full: which of them learnt everything.
        retain: which of them never learnt what was forgotten.
    """
    between = [name for name in audits if name not in (full, retain)] if full and retain else []
    headings = ["view", *audits, *(f"{name} kept" if len(between) > 1 else "kept" for name in between)]
    rows = []
    for line in side_by_side(audits):
        kept = [line.kept(name, full, retain) if full and retain else None for name in between]
        name = f"{line.view}, {line.what}" if line.what else line.view
        rows.append([name, *(_percent(line.values[model], 1) for model in audits), *(_percent(x, 0) for x in kept)])
    return headings, rows


def _percent(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, its numbers to the right."""
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "".join(f"| {' | '.join(_escaped(cell) for cell in line)} |\n" for line in lines)


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")
