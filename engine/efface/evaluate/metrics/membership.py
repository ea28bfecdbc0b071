"""Membership inference: can texts that a model was trained on be told from others by a score of each?"""

import zlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from scipy.stats import rankdata

from efface.evaluate.logs import FloatArray, MetricResult
from efface.evaluate.metrics.base import (
    Found,
    Labels,
    Metric,
    labels_of,
    needed,
    register_metric,
    summed_up,
)
from efface.evaluate.metrics.part import Part
from efface.evaluate.runner import RowResult, Task

# Open-unlearning's least variance: a token of a uniform distribution, which has none, scores 0 and not 0/0.
_LEAST_VARIANCE = 1e-6
# Open-unlearning's, against a retain model whose AUC is 1.
_EPSILON = 1e-10


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


@register_metric
@dataclass(frozen=True)
class MiaLoss(Attack):
    """AUC of the mean token NLL, the end of sequence included (Yeom et al. 2018, arXiv 1709.01604)."""

    name: ClassVar[str] = "mia_loss"

    def score(self, row: Labels) -> float:
        """Return the mean NLL of a row."""
        return row.loss


@register_metric
@dataclass(frozen=True)
class MiaZlib(MiaLoss):
    """AUC of mean token NLL / bytes of the answer compressed by zlib (Carlini et al. 2021, arXiv 2012.07805).

    The mean loss is open-unlearning's numerator; the paper's is the total. The answer is its tokens decoded, in UTF-8.
    """

    name: ClassVar[str] = "mia_zlib"

    def scores(self, part: Part, found: Found) -> list[RowResult]:
        """Return the score of each row."""
        rows = zip(labels_of(part, found.rows(part.tokens)), part.texts, strict=True)
        return [{"score": self.score(row) / len(zlib.compress(text.encode()))} for row, text in rows]


@register_metric
@dataclass(frozen=True)
class MiaMinK(Attack):
    """AUC of −mean log p over the least likely k of a text's tokens (Min-k% Prob, Shi et al. 2024, arXiv 2310.16789).

    The end of sequence is not counted.

    Attributes:
        k: share of the tokens, max(1, int(k n)) of n; 0.4 is open-unlearning's setting, 0.2 the paper's.
    """

    k: float = 0.4
    name: ClassVar[str] = "mia_min_k"

    def __post_init__(self) -> None:
        """Refuse what is no share."""
        if not 0 < self.k <= 1:
            raise ValueError(f"`k`: expected a share of the tokens, above 0 and at most 1, got {self.k}")

    def score(self, row: Labels) -> float:
        """Return the score of a row."""
        values = self.token_values(row)[row.words]
        return -float(np.sort(values)[: max(1, int(len(values) * self.k))].mean())

    def token_values(self, row: Labels) -> FloatArray:
        """Return what the least k of the labels are chosen by, and averaged over."""
        return row.logprobs


@register_metric
@dataclass(frozen=True)
class MiaMinKPlusPlus(MiaMinK):
    """AUC of −mean (log p − μ)/σ over the k tokens where it is least (Min-k%++, Zhang et al. 2025, arXiv 2404.02936).

    μ and σ are mean and standard deviation of log p over the vocabulary, under p; σ² is at least 1e-6. The end of
    sequence is not counted.
    """

    name: ClassVar[str] = "mia_min_k_plus_plus"

    def token_values(self, row: Labels) -> FloatArray:
        """Return log p of the labels, normalised by its distribution over the vocabulary."""
        normalised: FloatArray = (row.logprobs - row.mean) / np.sqrt(np.maximum(row.std**2, _LEAST_VARIANCE))
        return normalised


@register_metric
@dataclass(frozen=True)
class MiaReference(MiaLoss):
    """AUC of mean token NLL − that of a reference model, which takes out how hard a text is.

    (Carlini et al. 2021, arXiv 2012.07805.) The reference model reads the same tokens: it must share the model's
    tokenizer.
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


@register_metric
@dataclass(frozen=True)
class PrivLeak(Metric):
    """100 · ((1 − AUC) − (1 − AUC_retain)) / ((1 − AUC_retain) + 1e-10) (MUSE, arXiv 2407.06460).

    1 − AUC is MUSE's AUC, as open-unlearning has it: ``Attack`` counts the other way round. 0 is best: the attack does
    as well as on a model trained on the retain set alone. Below 0 the forget set still shows (under-unlearning; −100
    where it always does), above it is conspicuously unlikely (over-unlearning).

    Attributes:
        attack: whose AUC; the retain model's, of the same attack, is ``retain_values[attack.name]``. Open-unlearning
            takes 0.5 where there is none; here that must be said.
    """

    attack: Attack = field(default_factory=MiaMinK)
    name: ClassVar[str] = "privleak"
    needs_holdout: ClassVar[bool] = True

    @property
    def needs_reference(self) -> bool:  # type: ignore[override]
        """What the attack needs."""
        return self.attack.needs_reference

    def check(self, holdout: Part | None, *, reference: bool, retain_values: Mapping[str, float]) -> None:
        """Raise ValueError if the metric lacks what it compares with."""
        super().check(holdout, reference=reference, retain_values=retain_values)
        self._retain(retain_values)

    def task(self, part: Part) -> Task:
        """Return the attack's."""
        return self.attack.task(part)

    def scores(self, part: Part, found: Found) -> list[RowResult]:
        """Return the attack's."""
        return self.attack.scores(part, found)

    def result(
        self, part: Part, holdout: Part | None, retain_values: Mapping[str, float], found: Found
    ) -> MetricResult:
        """Return PrivLeak and the AUCs that it is made of."""
        retain = self._retain(retain_values)
        value = float(self.attack.result(part, holdout, {}, found)["agg_value"])
        leak = ((1 - value) - (1 - retain)) / ((1 - retain) + _EPSILON) * 100
        return {"agg_value": leak, "auc": value, "retain_auc": retain}

    def _retain(self, values: Mapping[str, float]) -> float:
        value = values.get(self.attack.name)
        if value is None or not 0 <= value <= 1:
            raise ValueError(
                f"privleak: expected {self.attack.name!r} of a model trained on the retain set alone, between 0 and 1, "
                f"got {value}; evaluate that model with the same rows and the metric {self.attack.name}, or name 0.5, "
                "which open-unlearning assumes"
            )
        return value
