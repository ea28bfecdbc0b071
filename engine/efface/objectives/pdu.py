"""Primal-dual unlearning (arXiv 2506.05314): flat logits on the forget set, under a bound on the retain loss."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from efface.objectives.base import Objective, check_choice, register_objective
from efface.objectives.role_loss import MarginLoss, RoleLoss


@register_objective
@dataclass(frozen=True, kw_only=True)
class PDU(Objective):
    """gamma · mean over label tokens of (max z − mean z)² + alpha · retain NLL, where alpha is a dual variable.

    After every step, alpha ← max(0, alpha + dual_step_size · (retain NLL − retain_loss_eps)). The retain NLL is read on
    the host for that, which synchronises a GPU once a step.

    Attributes:
        retain_loss_eps: the bound: the retain NLL that is good enough.
        primal_dual: False leaves alpha as it is.
        dual_step_size: of the dual ascent.
        dual_update_upon: "step", from that step's retain loss; "epoch", from the whole retain set's.
        dual_warmup_epochs: epochs before the first update.
    """

    retain_loss_eps: float = 0.0
    primal_dual: bool = True
    dual_step_size: float = 1.0
    dual_update_upon: str = "step"
    dual_warmup_epochs: float = 5.0

    name: ClassVar[str] = "pdu"
    mean_over: ClassVar[Literal["sequences", "tokens"]] = "tokens"
    reads: ClassVar[Literal["logprobs", "logits", "activations"]] = "logits"
    retain_loss_types: ClassVar[tuple[str, ...]] = ("NLL",)  # what the dual variable's bound is about

    def __post_init__(self) -> None:
        check_choice("dual_update_upon", self.dual_update_upon, ("step", "epoch"))
        super().__post_init__()

    def forget_loss(self) -> RoleLoss:
        """(max z − mean z)² of every label row."""
        return MarginLoss()

    def reads_retain(self) -> bool:
        """Whether there is a retain term; with alpha 0 one may grow."""
        return self.primal_dual or super().reads_retain()

    def ascend(self, retain_loss: float) -> "PDU":
        """Return the objective after a dual step."""
        return replace(self, alpha=max(0.0, self.alpha + self.dual_step_size * (retain_loss - self.retain_loss_eps)))
