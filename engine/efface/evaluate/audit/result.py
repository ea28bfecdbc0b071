"""What an audit found, and several models' audits side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from efface.evaluate.audit.summary import Figures
from efface.evaluate.audit.view import View
from efface.evaluate.task import RowResult


@dataclass(frozen=True)
class ViewResult:
    """What a view found: a record for each probe, in its order, and what they come to."""

    view: View
    figures: Figures
    records: Sequence[RowResult]


@dataclass(frozen=True)
class AuditResult:
    """What the views found out about one model.

    Attributes:
        rows: how many rows were audited.
        views: by name, in the order in which they were run.
    """

    rows: int
    views: Mapping[str, ViewResult]

    def to_json(self) -> dict[str, Any]:
        """Return figures and records as JSON values."""
        return {
            name: {"figures": dict(found.figures), "records": list(found.records)} for name, found in self.views.items()
        }


@dataclass(frozen=True)
class Line:
    """One number of several models.

    Attributes:
        view: whose number it is.
        what: which of them; empty for the view's mean novel recall.
        values: of every model, by name; None where nothing could be scored.
    """

    view: str
    what: str
    values: Mapping[str, float | None]

    def kept(self, model: str, full: str, retain: str) -> float | None:
        """Return (model − retain) / (full − retain): 0 as if never learnt, 1 as if never unlearned.

        None where the full model gives away no more than the retain model: there is nothing to compare with.
        """
        x, high, low = (self.values[name] for name in (model, full, retain))
        if x is None or high is None or low is None or high <= low:
            return None
        return (x - low) / (high - low)


def side_by_side(audits: Mapping[str, AuditResult]) -> list[Line]:
    """Return the lines of a table with a column for each model.

    Raises:
        ValueError: audits of other rows or other views.
    """
    names = list(audits)
    first = audits[names[0]]
    for name in names[1:]:
        if list(audits[name].views) != list(first.views) or audits[name].rows != first.rows:
            raise ValueError(
                f"audits of {names[0]!r} ({first.rows} rows; {', '.join(first.views)}) and {name!r} "
                f"({audits[name].rows} rows; {', '.join(audits[name].views)}) cannot be compared; audit both alike"
            )
    lines = []
    for view, found in first.views.items():
        shown = {name: found.view.shown(audits[name].views[view].figures) for name in names}
        lines += [
            Line(view, what, {name: shown[name].get(what) for name in names})
            for what in dict.fromkeys(what for figures in shown.values() for what in figures)
        ]
    return lines
