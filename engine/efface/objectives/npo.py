"""Negative preference optimization (Zhang et al. 2024, arXiv 2404.05868, equation 3)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from efface.objectives.base import Objective, check_positive, reference_sums
from efface.objectives.registry import register_objective
from efface_kernels import Kind, Sequences, Term


def npo_terms(sequences: Sequences, *, beta: float) -> Tensor:
    """−(2/β) log σ(−β (L − L_ref)). With β → 0 it becomes gradient ascent; L falls only until L ≪ L_ref."""
    return -2 / beta * logsigmoid(-beta * (sequences.sums - reference_sums(sequences, "NPO")))


@register_objective
@dataclass(frozen=True, kw_only=True)
class NPO(Objective):
    """gamma · mean over sequences of −(2/β) log σ(−β (L − L_ref)) + alpha · retain NLL."""

    beta: float = 0.1

    name: ClassVar[str] = "npo"
    needs_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("beta", self.beta)

    def forget_terms(self, sequences: Sequences) -> Tensor:
        """See ``npo_terms``."""
        return npo_terms(sequences, beta=self.beta)

    def forget_term(self) -> Term:
        """See ``npo_terms``."""
        return Term(Kind.NPO, beta=self.beta)
