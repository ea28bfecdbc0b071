"""Membership inference: can texts that a model was trained on be told from others by a score of each?"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import rankdata

from efface.evaluate.metrics.base import Found, Labels, Metric, MetricResult, labels_of, needed, summed_up
from efface.evaluate.metrics.part import Part
from efface.evaluate.task import RowResult


def auc(members: Sequence[float], others: Sequence[float]) -> float:
    """Return P(score of a member < score of another) + P(equal) / 2, over all pairs: Mann-Whitney's U / (n m).

    1 where every member scores lower, ½ where scores tell nothing. It is open-unlearning's ``roc_auc_score`` with
    forget rows as class 0.
    """
    ranks = rankdata([*members, *others])[len(members) :]  # of equal scores the mean rank
    u = ranks.sum() - len(others) * (len(others) + 1) / 2
    return float(u / (len(members) * len(others)))


class Attack(Metric):
    """A score of each text, lower for members (a loss is one); the result is the AUC between forget set and holdout.

    Near 1: forget texts are far more familiar than texts of their kind that the model never saw. ½: they cannot be
    told from these. Below: they are less familiar, which tells them, too.
    """

    needs_holdout = True

    @abstractmethod
    def score(self, row: Labels) -> float:
        """Return the score of a row from the statistics of its labels."""

    def scores(self, part: Part, found: Found) -> list[RowResult]:
        """Return the score of each row."""
        return [{"score": float(self.score(row))} for row in labels_of(part, found.rows(part.tokens))]

    def result(
        self, part: Part, holdout: Part | None, retain_values: Mapping[str, float], found: Found
    ) -> MetricResult:
        """Return the AUC, and the scores of both parts.

        Raises:
            ValueError: no holdout.
        """
        del retain_values
        members, others = (summed_up(self.scores(side, found)) for side in (part, needed(self, holdout)))
        value = auc(*([row["score"] for row in side["value_by_index"].values()] for side in (members, others)))
        return {"agg_value": value, "auc": value, "forget": members, "holdout": others}


def least_mean(values: np.ndarray[tuple[int], np.dtype[np.float64]], share: float) -> float:
    """Return the mean of the least ``share`` of the values, rounded down to whole values, at least one."""
    count = max(1, int(len(values) * share))
    return float(np.sort(values)[:count].mean())


def check_share(k: float) -> None:
    """Raise ValueError unless ``k`` is a share of a text's tokens."""
    if not 0 < k <= 1:
        raise ValueError(f"`k`: expected a share of the tokens, above 0 and at most 1, got {k}")
