"""Gradient ascent on the forget set; gradient difference adds a retain term (arXiv 2401.06121, section 4)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from efface.objectives.base import Objective
from efface.objectives.registry import register_objective
from efface_kernels import Kind, Sequences, Term


def grad_ascent_terms(sequences: Sequences) -> Tensor:
    """+L_s: the negative of the NLL. It has no lower bound, so long runs destroy the model."""
    return sequences.sums


@register_objective
@dataclass(frozen=True, kw_only=True)
class GradAscent(Objective):
    """gamma · mean over label tokens of ℓ; no retain term by default."""

    alpha: float = 0.0

    name: ClassVar[str] = "grad_ascent"
    mean_over: ClassVar[Literal["sequences", "tokens"]] = "tokens"

    def forget_terms(self, sequences: Sequences) -> Tensor:
        """See ``grad_ascent_terms``."""
        return grad_ascent_terms(sequences)

    def forget_term(self) -> Term:
        """See ``grad_ascent_terms``."""
        return Term(Kind.ASCENT)


@register_objective
@dataclass(frozen=True, kw_only=True)
class GradDiff(GradAscent):
    """gamma · mean over label tokens of ℓ + alpha · retain NLL."""

    alpha: float = 1.0

    name: ClassVar[str] = "graddiff"
