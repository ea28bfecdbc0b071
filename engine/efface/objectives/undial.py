"""UNDIAL: self-distillation with the true token's logit lowered (Dong et al. 2024, arXiv 2402.10052)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from efface.objectives.base import Objective, check_positive, register_objective
from efface.objectives.role_loss import DistributionLoss


@register_objective
@dataclass(frozen=True, kw_only=True)
class UNDIAL(Objective):
    """gamma · mean over label tokens of the cross entropy to softmax(z_ref − β onehot(y)) + alpha · retain NLL.

    Attributes:
        beta: amount by which the true token's logit is lowered.
    """

    beta: float = 10.0
    alpha: float = 0.0

    name: ClassVar[str] = "undial"
    mean_over: ClassVar[Literal["sequences", "tokens"]] = "tokens"
    reads: ClassVar[Literal["logprobs", "logits", "activations"]] = "logits"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("beta", self.beta)

    def forget_loss(self) -> DistributionLoss:
        """Return the cross entropy to the frozen model's distribution with the true token's logit lowered by beta."""
        return DistributionLoss(shift=self.beta, cross_entropy=True)
