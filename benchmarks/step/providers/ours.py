"""efface's own step."""

from typing import Any

from torch import Tensor

from benchmarks.step.data import Step
from benchmarks.step.providers.base import OBJECTIVE, Provider
from efface.hf.model.head import fuse
from efface.hf.model.head_loss import HeadLoss
from efface.hf.reference.live import LiveReference


class EffaceLive(Provider):
    """efface: one packed forward pass, the loss in the head, a second model beside it; as ``PackedTrainer`` does."""

    name = "efface, live"
    reference = "live"
    ours = True

    def __init__(self, policy: Any, reference: Any = None) -> None:
        super().__init__(fuse(policy), reference)
        self._live = LiveReference(reference, reference.device)

    def loss(self, step: Step) -> Tensor:
        """See ``PackedTrainer.compute_loss``."""
        loss = HeadLoss(OBJECTIVE, step.totals, forget_reference=self._live.rows(step.batch.forget_part()))
        total: Tensor = self.policy(batch=step.batch, loss=loss).loss
        return total


class EffaceCached(Provider):
    """efface with the reference's sums given, its default."""

    name = "efface, cached"
    reference = "cached"
    ours = True

    def __init__(self, policy: Any, reference: Any = None) -> None:
        super().__init__(fuse(policy), reference)

    def loss(self, step: Step) -> Tensor:
        """See ``PackedTrainer.compute_loss``."""
        loss = HeadLoss(OBJECTIVE, step.totals, reference_sums=step.reference_sums)
        total: Tensor = self.policy(batch=step.batch, loss=loss).loss
        return total
