"""Fine-tuning on refusals: the forget questions with "I don't know." as their answers (arXiv 2401.06121, section 4)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from efface.objectives.base import Objective, nll_terms
from efface.objectives.registry import register_objective
from efface_kernels import Kind, Sequences, Term


@register_objective
@dataclass(frozen=True, kw_only=True)
class IdkNLL(Objective):
    """gamma · NLL of the alternate answers to the forget questions + alpha · retain NLL."""

    name: ClassVar[str] = "idk_nll"
    mean_over: ClassVar[Literal["sequences", "tokens"]] = "tokens"
    forget_data: ClassVar[Literal["answer", "alternate", "both"]] = "alternate"

    def forget_terms(self, sequences: Sequences) -> Tensor:
        """−L_s."""
        return nll_terms(sequences)

    def forget_term(self) -> Term:
        """See ``nll_terms``."""
        return Term(Kind.NLL)
