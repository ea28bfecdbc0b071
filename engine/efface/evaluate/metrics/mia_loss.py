"""The loss attack (Yeom et al. 2018, arXiv 1709.01604)."""

from dataclasses import dataclass
from typing import ClassVar

from efface.evaluate.metrics.attack import Attack
from efface.evaluate.metrics.base import Labels
from efface.evaluate.metrics.registry import register_metric


@register_metric
@dataclass(frozen=True)
class MiaLoss(Attack):
    """AUC of the mean token NLL, the end of sequence included."""

    name: ClassVar[str] = "mia_loss"

    def score(self, row: Labels) -> float:
        """Return the mean NLL of a row."""
        return row.loss
