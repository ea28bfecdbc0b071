"""The step with LoRA: adapters of rank 8 on every linear layer but the head, trained alone."""

from typing import Any

from torch import Tensor

from benchmarks.step.data import Step
from benchmarks.step.providers.base import OBJECTIVE, Provider
from benchmarks.step.providers.eager import Eager, EagerCached
from benchmarks.step.providers.ours import EffaceCached
from efface.hf.model.head import fuse
from efface.hf.model.head_loss import HeadLoss
from efface.hf.reference.live import AdapterReference


class EagerLora(Eager):
    """open-unlearning's NPO with LoRA: padded, two forwards, and still a second model, a copy of the policy."""

    name = "LoRA, padded, two forwards, live"
    lora = True
    needs = "peft"


class EagerLoraCached(EagerCached):
    """The same, with the reference's sums given."""

    name = "LoRA, padded, two forwards, cached"
    lora = True
    needs = "peft"


class EffaceLora(Provider):
    """efface with LoRA: one packed forward pass, and one of the forget part with the adapters off as its reference."""

    name = "LoRA, efface, adapter"
    reference = "adapter"
    ours = True
    lora = True
    needs = "peft"

    def __init__(self, policy: Any, reference: Any = None) -> None:
        super().__init__(fuse(policy), reference)
        self._base = AdapterReference(policy)

    def loss(self, step: Step) -> Tensor:
        """See ``PackedTrainer.compute_loss``."""
        loss = HeadLoss(OBJECTIVE, step.totals, forget_reference=self._base.rows(step.batch.forget_part()))
        total: Tensor = self.policy(batch=step.batch, loss=loss).loss
        return total


class EffaceLoraCached(EffaceCached):
    """efface with LoRA and the reference's sums given, its default."""

    name = "LoRA, efface, cached"
    lora = True
    needs = "peft"
