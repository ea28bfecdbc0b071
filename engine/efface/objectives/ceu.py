"""CE-U: cross entropy to what the model itself says without the true token (Yang 2025, arXiv 2503.01224)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from efface.batching.roles import StepTotals
from efface.objectives.base import Objective, check_not_negative
from efface.objectives.registry import register_objective
from efface_kernels import Kind, Sequences, Term


def ceu_terms(sequences: Sequences, *, ignore_first_n_answer_tokens: int = 1) -> Tensor:
    """Σ −log(1 − p) over all but the first labels of a sequence.

    The target q is the model's softmax without the true token, detached. The cross entropy to it is −log(1 − p) + H(q),
    and its gradient p − q is that of −log(1 − p) with live p: c = p / (1 − p).
    """
    logprobs = sequences.logprobs
    # ℓ near 0 is known to eps, so 1 − p may be 0: with eps added c stays finite, and c (softmax − onehot) below about 1
    rest = torch.finfo(logprobs.dtype).eps - torch.expm1(logprobs)
    ignored = sequences.places < ignore_first_n_answer_tokens
    return sequences.sums_of((-torch.log(rest)).masked_fill(ignored, 0))


@register_objective
@dataclass(frozen=True, kw_only=True)
class CEU(Objective):
    """gamma · mean over label tokens, but the first ones of an answer, of −log(1 − p) + alpha · retain NLL.

    Attributes:
        ignore_first_n_answer_tokens: which stand neither in the sum nor in the mean.
    """

    alpha: float = 0.0
    ignore_first_n_answer_tokens: int = 1

    name: ClassVar[str] = "ceu"
    mean_over: ClassVar[Literal["sequences", "tokens"]] = "tokens"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative("ignore_first_n_answer_tokens", self.ignore_first_n_answer_tokens)

    def forget_terms(self, sequences: Sequences) -> Tensor:
        """See ``ceu_terms``."""
        return ceu_terms(sequences, ignore_first_n_answer_tokens=self.ignore_first_n_answer_tokens)

    def forget_term(self) -> Term:
        """See ``ceu_terms``."""
        return Term(Kind.CEU, ignored=self.ignore_first_n_answer_tokens)

    def forget_weight(self, totals: StepTotals) -> float:
        """Gamma divided by the label tokens that count."""
        return self.gamma / max(totals.forget_tokens_after(self.ignore_first_n_answer_tokens), 1)
