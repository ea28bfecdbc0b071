"""Min-k% prob (Shi et al. 2024, arXiv 2310.16789)."""

from dataclasses import dataclass
from typing import ClassVar

from efface.evaluate.metrics.attack import Attack, check_share, least_mean
from efface.evaluate.metrics.base import Labels
from efface.evaluate.metrics.registry import register_metric


@register_metric
@dataclass(frozen=True)
class MiaMinK(Attack):
    """AUC of −mean log p over the least likely k of a text's tokens; the end of sequence is not counted.

    Attributes:
        k: share of the tokens, max(1, int(k n)) of n; 0.4 is open-unlearning's setting, 0.2 the paper's.
    """

    k: float = 0.4
    name: ClassVar[str] = "mia_min_k"

    def __post_init__(self) -> None:
        """Refuse what is no share."""
        check_share(self.k)

    def score(self, row: Labels) -> float:
        """Return the score of a row."""
        return -least_mean(row.logprobs[row.words], self.k)
