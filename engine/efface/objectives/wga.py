"""Weighted gradient ascent (Wang et al. 2025, arXiv 2502.19301)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from efface.objectives.base import Objective
from efface.objectives.registry import register_objective
from efface_kernels import Sequences
from efface_kernels.linear_loss.sequences import segment_sums


def wga_terms(sequences: Sequences, *, beta: float) -> Tensor:
    """Stub."""
    logprobs = sequences.logprobs
    return segment_sums((beta * logprobs.detach()).exp() * logprobs, sequences.row_offsets)


@register_objective
@dataclass(frozen=True, kw_only=True)
class WGA(Objective):
    """gamma · mean over label tokens of p^β ℓ, with p = e^ℓ as a constant, + alpha · retain NLL."""

    beta: float = 1.0

    name: ClassVar[str] = "wga"
    mean_over: ClassVar[Literal["sequences", "tokens"]] = "tokens"

    def forget_terms(self, sequences: Sequences) -> Tensor:
        """See ``wga_terms``."""
        return wga_terms(sequences, beta=self.beta)
