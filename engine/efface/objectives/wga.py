"""Weighted gradient ascent: tokens that the model no longer knows stop pushing (Wang et al. 2025, arXiv 2502.19301)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from efface.objectives.base import Objective, check_not_negative
from efface.objectives.registry import register_objective
from efface_kernels import Kind, Sequences, Term


def wga_terms(sequences: Sequences, *, beta: float) -> Tensor:
    """Σ p^β ℓ, with p = e^ℓ detached. β = 0 is gradient ascent."""
    logprobs = sequences.logprobs
    return sequences.sums_of(torch.exp(beta * logprobs.detach()) * logprobs)


@register_objective
@dataclass(frozen=True, kw_only=True)
class WGA(Objective):
    """gamma · mean over label tokens of p^β ℓ, with p = e^ℓ as a constant, + alpha · retain NLL."""

    beta: float = 1.0

    name: ClassVar[str] = "wga"
    mean_over: ClassVar[Literal["sequences", "tokens"]] = "tokens"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative("beta", self.beta)

    def forget_terms(self, sequences: Sequences) -> Tensor:
        """See ``wga_terms``."""
        return wga_terms(sequences, beta=self.beta)

    def forget_term(self) -> Term:
        """See ``wga_terms``."""
        return Term(Kind.WGA, beta=self.beta)
