"""Membership inference attacks, which try to distinguish training texts from other texts by a score, and PrivLeak."""

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

# open-unlearning's lower bound of the variance. With it, a token of a uniform distribution scores 0 instead of 0/0.
_LEAST_VARIANCE = 1e-6
# As in open-unlearning: it avoids a division by 0 if the retain model's AUC is 1.
_EPSILON = 1e-10


def auc(members: Sequence[float], others: Sequence[float]) -> float:
    """Return P(score of a member < score of a non-member) + P(equal) / 2 over all pairs: Mann-Whitney's U / (n m).

    It is 1 if every member scores lower, and ½ if the scores carry no information. open-unlearning computes the same
    as ``roc_auc_score`` with forget rows as class 0.
    """
    ranks = rankdata([*members, *others])[len(members) :]  # equal scores get their mean rank
    u = ranks.sum() - len(others) * (len(others) + 1) / 2
    return float(u / (len(members) * len(others)))


class Attack(Metric):
    """Base class of attacks. A text's score, such as its loss, is lower for members; the result is an AUC.

    The AUC compares the forget set with the holdout. Near 1, the model knows forget texts far better than similar
    texts that it never saw. At ½, the two cannot be distinguished. Below ½, the model knows forget texts less well
    than the holdout, which distinguishes them too.
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
        """Return the AUC and the scores of both parts.

        Raises:
            ValueError: there is no holdout.
        """
        del retain_values
        members, others = (summed_up(self.scores(side, found)) for side in (part, needed(self, holdout)))
        value = auc(*([row["score"] for row in side["value_by_index"].values()] for side in (members, others)))
        return {"agg_value": value, "auc": value, "forget": members, "holdout": others}


@register_metric
@dataclass(frozen=True)
class MiaLoss(Attack):
    """AUC of the mean token NLL, including the end of sequence (Yeom et al. 2018, arXiv 1709.01604)."""

    name: ClassVar[str] = "mia_loss"

    def score(self, row: Labels) -> float:
        """Return the mean NLL of a row."""
        return row.loss


@register_metric
@dataclass(frozen=True)
class MiaZlib(MiaLoss):
    """AUC of mean token NLL / number of bytes of the zlib-compressed answer (Carlini et al. 2021, arXiv 2012.07805).

    The numerator is the mean loss, as in open-unlearning; the paper uses the total loss. The answer is the decoded
    tokens, in UTF-8.
    """

    name: ClassVar[str] = "mia_zlib"

    def scores(self, part: Part, found: Found) -> list[RowResult]:
        """Return the score of each row."""
        rows = zip(labels_of(part, found.rows(part.tokens)), part.texts, strict=True)
        return [{"score": self.score(row) / len(zlib.compress(text.encode()))} for row, text in rows]


@register_metric
@dataclass(frozen=True)
class MiaMinK(Attack):
    """AUC of −mean log p over the share k of least likely tokens (Min-k% Prob, Shi et al. 2024, arXiv 2310.16789).

    The end of sequence is excluded.

    Attributes:
        k: share of the tokens: max(1, int(k n)) of n tokens. open-unlearning uses 0.4, the paper 0.2.
    """

    k: float = 0.4
    name: ClassVar[str] = "mia_min_k"

    def __post_init__(self) -> None:
        """Raise ValueError if ``k`` is not in (0, 1]."""
        if not 0 < self.k <= 1:
            raise ValueError(f"`k`: expected a share of the tokens, more than 0 and at most 1, got {self.k}")

    def score(self, row: Labels) -> float:
        """Return −mean over the share k of the smallest token values."""
        values = self.token_values(row)[row.words]
        return -float(np.sort(values)[: max(1, int(len(values) * self.k))].mean())

    def token_values(self, row: Labels) -> FloatArray:
        """Return the value of each label. The smallest ones are selected and averaged."""
        return row.logprobs


@register_metric
@dataclass(frozen=True)
class MiaMinKPlusPlus(MiaMinK):
    """AUC of −mean (log p − μ)/σ over the share k of tokens where it is smallest (Min-k%++, arXiv 2404.02936).

    (Zhang et al. 2025.) μ and σ are the mean and standard deviation of log p over the vocabulary, under p; σ² is at
    least 1e-6. The end of sequence is excluded.
    """

    name: ClassVar[str] = "mia_min_k_plus_plus"

    def token_values(self, row: Labels) -> FloatArray:
        """Return log p of the labels, normalised by the mean and deviation of log p over the vocabulary."""
        normalised: FloatArray = (row.logprobs - row.mean) / np.sqrt(np.maximum(row.std**2, _LEAST_VARIANCE))
        return normalised


@register_metric
@dataclass(frozen=True)
class MiaReference(MiaLoss):
    """AUC of mean token NLL minus a reference model's mean token NLL (Carlini et al. 2021, arXiv 2012.07805).

    The difference corrects for how difficult a text is. The reference model must share the model's tokenizer, because
    it reads the same tokens.
    """

    name: ClassVar[str] = "mia_reference"
    needs_reference: ClassVar[bool] = True

    def scores(self, part: Part, found: Found) -> list[RowResult]:
        """Return the score of each row and both losses."""
        pairs = zip(
            labels_of(part, found.rows(part.tokens)), labels_of(part, found.reference_rows(part.tokens)), strict=True
        )
        losses = [(self.score(row), self.score(reference)) for row, reference in pairs]
        return [{"score": loss - ref, "target_loss": loss, "ref_loss": ref} for loss, ref in losses]


@register_metric
@dataclass(frozen=True)
class PrivLeak(Metric):
    """100 · ((1 − AUC) − (1 − AUC_retain)) / ((1 − AUC_retain) + 1e-10) (MUSE, arXiv 2407.06460).

    1 − AUC is the AUC of MUSE and of open-unlearning, because ``Attack`` orders the classes the other way round. 0 is
    best: the attack is as successful as on a model trained only on the retain set. Below 0, the forget set is still
    recognised (under-unlearning); at −100, it always is. Above 0, the forget set is unusually unlikely
    (over-unlearning).

    Attributes:
        attack: the attack that gives the AUC. The retain model's AUC of the same attack is required as
            ``retain_values[attack.name]``; open-unlearning assumes 0.5 without it.
    """

    attack: Attack = field(default_factory=MiaMinK)
    name: ClassVar[str] = "privleak"
    needs_holdout: ClassVar[bool] = True

    @property
    def needs_reference(self) -> bool:  # type: ignore[override]
        """Whether the attack needs a reference model."""
        return self.attack.needs_reference

    def check(self, holdout: Part | None, *, reference: bool, retain_values: Mapping[str, float]) -> None:
        """Raise ValueError if the holdout, the reference model or the retain model's AUC is missing."""
        super().check(holdout, reference=reference, retain_values=retain_values)
        self._retain(retain_values)

    def task(self, part: Part) -> Task:
        """Return the attack's task."""
        return self.attack.task(part)

    def scores(self, part: Part, found: Found) -> list[RowResult]:
        """Return the attack's scores."""
        return self.attack.scores(part, found)

    def result(
        self, part: Part, holdout: Part | None, retain_values: Mapping[str, float], found: Found
    ) -> MetricResult:
        """Return PrivLeak and the two AUCs in its formula."""
        retain = self._retain(retain_values)
        value = float(self.attack.result(part, holdout, {}, found)["agg_value"])
        leak = ((1 - value) - (1 - retain)) / ((1 - retain) + _EPSILON) * 100
        return {"agg_value": leak, "auc": value, "retain_auc": retain}

    def _retain(self, values: Mapping[str, float]) -> float:
        value = values.get(self.attack.name)
        if value is None or not 0 <= value <= 1:
            raise ValueError(
                f"privleak: expected {self.attack.name!r} of a model trained only on the retain set, between 0 and 1, "
                f"got {value}; evaluate that model on the same rows with the metric {self.attack.name}, or give 0.5, "
                "which open-unlearning assumes"
            )
        return value
