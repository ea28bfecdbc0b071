"""Extraction strength: how little of a text has to be shown for the rest to come out (arXiv 2012.07805, 2506.12618)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from efface.evaluate.metrics.base import Found, Labels, Metric, labels_of
from efface.evaluate.metrics.part import Part
from efface.evaluate.metrics.registry import register_metric
from efface.evaluate.task import RowResult


@register_metric
@dataclass(frozen=True)
class ExtractionStrength(Metric):
    """1 − k/n, k the least number of a text's n tokens after which greedy decoding writes all others.

    One forward pass tells: the rest comes out exactly if each of its tokens is the model's first choice after those
    before it. 1: the question is enough. The end of sequence is not counted.

    Attributes:
        floor: as open-unlearning (``memorization.py``), whose search ends at the last token, so that no row of n tokens
            scores below 1/n; False scores 0 where the last token is wrong, as the definition does (k = n).
    """

    floor: bool = True
    name: ClassVar[str] = "extraction_strength"

    def scores(self, part: Part, found: Found) -> list[RowResult]:
        """Return the strength of each row."""
        return [{"score": self._strength(row)} for row in labels_of(part, found.rows(part.tokens))]

    def _strength(self, row: Labels) -> float:
        first = row.first[row.words]
        wrong = np.flatnonzero(~first)
        k = int(wrong[-1]) + 1 if wrong.size else 0
        return 1 - (min(k, len(first) - 1) if self.floor else k) / len(first)
