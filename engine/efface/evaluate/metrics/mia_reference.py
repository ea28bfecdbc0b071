"""The reference attack (Carlini et al. 2021, arXiv 2012.07805)."""

from dataclasses import dataclass
from typing import ClassVar

from efface.evaluate.metrics.attack import Attack
from efface.evaluate.metrics.base import Found, Labels, labels_of
from efface.evaluate.metrics.part import Part
from efface.evaluate.metrics.registry import register_metric
from efface.evaluate.task import RowResult


@register_metric
@dataclass(frozen=True)
class MiaReference(Attack):
    """AUC of mean token NLL − that of a reference model, which takes out how hard a text is.

    The reference model reads the same tokens: it must share the model's tokenizer.
    """

    name: ClassVar[str] = "mia_reference"
    needs_reference: ClassVar[bool] = True

    def scores(self, part: Part, found: Found) -> list[RowResult]:
        """Return the score of each row, and both losses."""
        pairs = zip(
            labels_of(part, found.rows(part.tokens)), labels_of(part, found.reference_rows(part.tokens)), strict=True
        )
        losses = [(self.score(row), self.score(reference)) for row, reference in pairs]
        return [{"score": loss - ref, "target_loss": loss, "ref_loss": ref} for loss, ref in losses]

    def score(self, row: Labels) -> float:
        """Return the loss of a model on a row."""
        return row.loss
