"""SatImp: gradient ascent weighted by saturation and importance (Yang et al. 2025, arXiv 2505.11953)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from efface.objectives.base import Objective, check_not_negative
from efface.objectives.registry import register_objective
from efface_kernels import Kind, Sequences, Term


def satimp_terms(sequences: Sequences, *, beta1: float, beta2: float) -> Tensor:
    """Σ p^β₁ (1 − p)^β₂ ℓ, with p = e^ℓ detached."""
    logprobs = sequences.logprobs
    known = logprobs.detach()
    # 1 − p as −expm1(ℓ): of memorised tokens the difference would keep no digit
    weights = torch.exp(beta1 * known) * (-torch.expm1(known)) ** beta2
    return sequences.sums_of(weights * logprobs)


@register_objective
@dataclass(frozen=True, kw_only=True)
class SatImp(Objective):
    """gamma · mean over label tokens of p^β₁ (1 − p)^β₂ ℓ, with p = e^ℓ as a constant, + alpha · retain NLL."""

    beta1: float = 5.0
    beta2: float = 1.0
    gamma: float = 0.1

    name: ClassVar[str] = "satimp"
    mean_over: ClassVar[Literal["sequences", "tokens"]] = "tokens"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative("beta1", self.beta1)
        check_not_negative("beta2", self.beta2)

    def forget_terms(self, sequences: Sequences) -> Tensor:
        """See ``satimp_terms``."""
        return satimp_terms(sequences, beta1=self.beta1, beta2=self.beta2)

    def forget_term(self) -> Term:
        """See ``satimp_terms``."""
        return Term(Kind.SATIMP, beta1=self.beta1, beta2=self.beta2)
