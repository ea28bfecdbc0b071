"""Probability of the answer, normalised by its length (TOFU, arXiv 2401.06121, section 2.2.1)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from efface.evaluate.metrics.base import Found, Metric, labels_of
from efface.evaluate.metrics.part import Part
from efface.evaluate.metrics.registry import register_metric
from efface.evaluate.task import RowResult


@register_metric
@dataclass(frozen=True)
class Probability(Metric):
    """exp(−mean token NLL), over the answer and its end of sequence."""

    name: ClassVar[str] = "probability"

    def scores(self, part: Part, found: Found) -> list[RowResult]:
        """Return the probability of each row, and its mean loss."""
        rows = labels_of(part, found.rows(part.tokens))
        return [{"score": float(np.exp(-row.loss)), "avg_loss": row.loss} for row in rows]
