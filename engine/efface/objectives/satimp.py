"""SatImp (arXiv 2505.11953)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from efface.objectives.base import Objective
from efface.objectives.registry import register_objective
from efface_kernels import Sequences
from efface_kernels.linear_loss.sequences import segment_sums


def satimp_terms(sequences: Sequences, *, beta1: float, beta2: float) -> Tensor:
    """Stub."""
    logprobs = sequences.logprobs
    constant = logprobs.detach()
    weight = (beta1 * constant).exp() * (-constant.expm1()) ** beta2
    return segment_sums(weight * logprobs, sequences.row_offsets)


@register_objective
@dataclass(frozen=True, kw_only=True)
class SatImp(Objective):
    """gamma · mean over label tokens of p^β₁ (1 − p)^β₂ ℓ, with p = e^ℓ as a constant, + alpha · retain NLL."""

    beta1: float = 5.0
    beta2: float = 1.0
    gamma: float = 0.1

    name: ClassVar[str] = "satimp"
    mean_over: ClassVar[Literal["sequences", "tokens"]] = "tokens"

    def forget_terms(self, sequences: Sequences) -> Tensor:
        """See ``satimp_terms``."""
        return satimp_terms(sequences, beta1=self.beta1, beta2=self.beta2)
