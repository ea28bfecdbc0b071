"""Exact memorisation: the share of a text's tokens that the model would write (arXiv 2205.10770)."""

from dataclasses import dataclass
from typing import ClassVar

from efface.evaluate.metrics.base import Found, Metric, labels_of
from efface.evaluate.metrics.part import Part
from efface.evaluate.metrics.registry import register_metric
from efface.evaluate.task import RowResult


@register_metric
@dataclass(frozen=True)
class ExactMemorization(Metric):
    """Σ_i [argmax p(· | x, y_<i) = y_i] / n over a text's n tokens; the end of sequence is not counted."""

    name: ClassVar[str] = "exact_memorization"

    def scores(self, part: Part, found: Found) -> list[RowResult]:
        """Return the share of each row."""
        rows = labels_of(part, found.rows(part.tokens))
        return [{"score": float(row.first[row.words].mean())} for row in rows]
