"""Direct preference optimization: the alternate answer over the one to forget (Rafailov et al. 2023, arXiv 2305.18290).

IdkDPO prefers "I don't know" (TOFU, arXiv 2401.06121), AltPO a plausible other answer (arXiv 2409.13474).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn.functional import logsigmoid

from efface.objectives.base import Objective, check_positive, reference_sums
from efface.objectives.registry import register_objective
from efface_kernels import Kind, Sequences, Term


def dpo_terms(sequences: Sequences, *, beta: float) -> Tensor:
    """−(2/β) log σ(β [(L_w − L_w,ref) − (L_l − L_l,ref)]); l a forget sequence, w its alternate, which follows it.

    Defined for forget sequences; every other sequence's term means nothing.
    """
    ratio = sequences.sums - reference_sums(sequences, "DPO")
    return -2 / beta * logsigmoid(beta * (sequences.following(ratio) - ratio))


@register_objective
@dataclass(frozen=True, kw_only=True)
class DPO(Objective):
    """gamma · mean over pairs of −(2/β) log σ(β [(L_w − L_w,ref) − (L_l − L_l,ref)]) + alpha · retain NLL."""

    beta: float = 0.1

    name: ClassVar[str] = "dpo"
    forget_data: ClassVar[Literal["answer", "alternate", "both"]] = "both"
    needs_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("beta", self.beta)

    def forget_terms(self, sequences: Sequences) -> Tensor:
        """See ``dpo_terms``."""
        return dpo_terms(sequences, beta=self.beta)

    def forget_term(self) -> Term:
        """See ``dpo_terms``."""
        return Term(Kind.DPO, beta=self.beta)
