"""Min-k%++ (Zhang et al. 2025, arXiv 2404.02936)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from efface.evaluate.metrics.attack import Attack, check_share, least_mean
from efface.evaluate.metrics.base import Labels
from efface.evaluate.metrics.registry import register_metric

# Open-unlearning's least variance: a token of a uniform distribution, which has none, scores 0 and not 0/0.
_LEAST_VARIANCE = 1e-6


@register_metric
@dataclass(frozen=True)
class MiaMinKPlusPlus(Attack):
    """AUC of −mean (log p − μ)/σ over the k tokens of a text where it is least; the end of sequence is not counted.

    μ and σ are mean and standard deviation of log p over the vocabulary, under p; σ² is at least 1e-6.

    Attributes:
        k: share of the tokens, max(1, int(k n)) of n; 0.4 is open-unlearning's setting.
    """

    k: float = 0.4
    name: ClassVar[str] = "mia_min_k_plus_plus"

    def __post_init__(self) -> None:
        """Refuse what is no share."""
        check_share(self.k)

    def score(self, row: Labels) -> float:
        """Return the score of a row."""
        std = np.sqrt(np.maximum(row.std**2, _LEAST_VARIANCE))
        return -least_mean(((row.logprobs - row.mean) / std)[row.words], self.k)
