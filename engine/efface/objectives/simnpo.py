"""SimNPO: NPO without a reference model, normalised by length (Fan et al. 2024, arXiv 2410.07163, equation 4)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from efface.objectives.base import Objective, check_positive
from efface.objectives.registry import register_objective
from efface_kernels import Kind, Sequences, Term


def simnpo_terms(sequences: Sequences, *, beta: float, delta: float) -> Tensor:
    """−(2/β) log σ(β (−L/n − δ)): the reward is the mean token loss, and δ its margin."""
    return -2 / beta * logsigmoid(beta * (-sequences.sums / sequences.lengths - delta))


@register_objective
@dataclass(frozen=True, kw_only=True)
class SimNPO(Objective):
    """gamma · mean over sequences of −(2/β) log σ(β (−L/n − δ)) + alpha · retain NLL."""

    beta: float = 4.5
    delta: float = 0.0
    gamma: float = 0.125

    name: ClassVar[str] = "simnpo"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("beta", self.beta)

    def forget_terms(self, sequences: Sequences) -> Tensor:
        """See ``simnpo_terms``."""
        return simnpo_terms(sequences, beta=self.beta, delta=self.delta)

    def forget_term(self) -> Term:
        """See ``simnpo_terms``."""
        return Term(Kind.SIMNPO, beta=self.beta, delta=self.delta)
