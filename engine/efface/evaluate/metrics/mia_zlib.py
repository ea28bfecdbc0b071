"""The zlib attack (Carlini et al. 2021, arXiv 2012.07805)."""

import zlib
from dataclasses import dataclass
from typing import ClassVar

from efface.evaluate.metrics.attack import Attack
from efface.evaluate.metrics.base import Found, Labels, labels_of
from efface.evaluate.metrics.part import Part
from efface.evaluate.metrics.registry import register_metric
from efface.evaluate.task import RowResult


@register_metric
@dataclass(frozen=True)
class MiaZlib(Attack):
    """AUC of mean token NLL / bytes of the answer compressed by zlib.

    The mean loss is open-unlearning's numerator; the paper's is the total. The answer is its tokens decoded, in UTF-8.
    """

    name: ClassVar[str] = "mia_zlib"

    def scores(self, part: Part, found: Found) -> list[RowResult]:
        """Return the score of each row."""
        rows = zip(labels_of(part, found.rows(part.tokens)), part.texts, strict=True)
        return [{"score": self.score(row) / len(zlib.compress(text.encode()))} for row, text in rows]

    def score(self, row: Labels) -> float:
        """Return the numerator."""
        return row.loss
