"""PDU, primal-dual unlearning: flat forget-set logits under a bound on the retain loss (arXiv 2506.05314)."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from efface.objectives.base import Objective, check_choice, register_objective
from efface.objectives.role_loss import MarginLoss, RoleLoss


@register_objective
@dataclass(frozen=True, kw_only=True)
class PDU(Objective):
    """gamma · mean over label tokens of (max z − mean z)² + alpha · retain NLL, where alpha is a dual variable.

    A dual update sets alpha ← max(0, alpha + dual_step_size · (retain NLL − retain_loss_eps)). With
    ``dual_update_upon="step"`` the retain NLL is read on the host after every step, which synchronises a GPU once per
    step.

    Attributes:
        retain_loss_eps: upper bound for the retain NLL; alpha grows while the retain NLL exceeds it.
        primal_dual: whether to update alpha; False keeps it constant.
        dual_step_size: step size of the dual ascent.
        dual_update_upon: "step" updates after every step, from that step's retain loss; "epoch" updates after every
            epoch, from the retain loss of the whole retain set.
        dual_warmup_epochs: number of epochs before the first update.
    """

    retain_loss_eps: float = 0.0
    primal_dual: bool = True
    dual_step_size: float = 1.0
    dual_update_upon: str = "step"
    dual_warmup_epochs: float = 5.0

    name: ClassVar[str] = "pdu"
    mean_over: ClassVar[Literal["sequences", "tokens"]] = "tokens"
    reads: ClassVar[Literal["logprobs", "logits", "activations"]] = "logits"
    retain_loss_types: ClassVar[tuple[str, ...]] = ("NLL",)  # the loss that retain_loss_eps bounds

    def __post_init__(self) -> None:
        check_choice("dual_update_upon", self.dual_update_upon, ("step", "epoch"))
        super().__post_init__()

    def forget_loss(self) -> RoleLoss:
        """Return the loss (max z − mean z)² of each label row's logits z."""
        return MarginLoss()

    def reads_retain(self) -> bool:
        """Return whether there is a retain term, now or later: dual updates can raise alpha from 0."""
        return self.primal_dual or super().reads_retain()

    def ascend(self, retain_loss: float) -> "PDU":
        """Return the objective with alpha updated by one dual step from ``retain_loss``, the retain NLL."""
        return replace(self, alpha=max(0.0, self.alpha + self.dual_step_size * (retain_loss - self.retain_loss_eps)))
