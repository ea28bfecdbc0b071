"""A training step by everybody who is timed: each has a policy of its own, with the same weights at the start."""

import copy
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.step.data import Padded, Step
from efface import NPO
from efface.hf.head import fuse
from efface.hf.head_loss import HeadLoss
from efface.hf.live_reference import LiveReference

OBJECTIVE = NPO(beta=0.1, alpha=1.0)


class Provider(ABC):
    """Computes NPO's loss for the pairs of a step. Gradients come from ``backward``, as in any training loop."""

    name: ClassVar[str]

    def __init__(self, policy: PreTrainedModel, reference: PreTrainedModel) -> None:
        self.policy = copy.deepcopy(policy).train()
        self._frozen = copy.deepcopy(reference).eval().requires_grad_(False)
        self._optimizer: torch.optim.Optimizer | None = None

    @abstractmethod
    def loss(self, step: Step) -> Tensor:
        """Run the forward passes."""

    def gradients(self, step: Step) -> Tensor:
        """Run forward and backward; return the loss. The gradients lie in the policy's parameters."""
        self.policy.zero_grad(set_to_none=True)
        loss = self.loss(step)
        loss.backward()
        return loss.detach()

    def update(self) -> None:
        """Clip the gradients and take an AdamW step, both as ``transformers.Trainer`` does by default."""
        if self._optimizer is None:
            self._optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self._optimizer.step()


class Eager(Provider):
    """open-unlearning's NPO: the forget batch and the retain batch padded, a forward pass each, SDPA attention.

    Logits of every position; the forget loss from cross_entropy without reduction, the retain loss from ``labels=``.
    Two favours to it: the ``labels=`` loss of the forget batch, which open-unlearning computes and drops, is left out,
    and no key-value cache is filled.
    """

    name = "padded, two forwards, live"

    def loss(self, step: Step) -> Tensor:
        """compute_dpo_loss with losing inputs alone, and compute_retain_loss."""
        nll = self._nll(self.policy, step.forget)
        log_ratio = -(nll - self._reference_nll(step))
        forget_loss = -2 / OBJECTIVE.beta * F.logsigmoid(OBJECTIVE.beta * (0.0 - log_ratio)).mean()
        retain = step.retain
        retain_loss = self.policy(
            input_ids=retain.input_ids, attention_mask=retain.attention_mask, labels=retain.labels
        ).loss
        total: Tensor = OBJECTIVE.gamma * forget_loss + OBJECTIVE.alpha * retain_loss
        return total

    def _nll(self, model: PreTrainedModel, batch: Padded) -> Tensor:
        """compute_batch_nll: summed token losses of each sequence."""
        logits = _shifted_logits(model, batch).contiguous()
        shifted_labels = batch.labels[..., 1:].contiguous()
        loss_function = torch.nn.CrossEntropyLoss(ignore_index=-100, reduction="none")
        token_losses: Tensor = loss_function(logits.transpose(-1, -2), shifted_labels)
        return token_losses.sum(dim=-1)

    def _reference_nll(self, step: Step) -> Tensor:
        with torch.no_grad():
            return self._nll(self._frozen, step.forget)


class EagerCached(Eager):
    """The same, with the reference's sums given: what a cache alone would do for the eager step."""

    name = "padded, two forwards, cached"

    def _reference_nll(self, step: Step) -> Tensor:
        return -step.reference_sums[: step.batch.forget_sequences]


class EagerFlat(Eager):
    """The same with a live reference, and cross_entropy over rows: what open-unlearning's loss could be on a CPU.

    Transposed logits, (B, V, T), cost cross_entropy a copy and strided sums.
    """

    name = "padded, rows, live"

    def _nll(self, model: PreTrainedModel, batch: Padded) -> Tensor:
        """Summed token losses of each sequence."""
        logits, labels = _shifted_logits(model, batch), batch.labels[..., 1:]
        rows = logits.reshape(-1, logits.shape[-1])
        token_losses = F.cross_entropy(rows, labels.reshape(-1), ignore_index=-100, reduction="none")
        return token_losses.view(labels.shape).sum(dim=-1)


class EffaceLive(Provider):
    """efface: one packed forward pass, the loss in the head, a second model beside it; as ``PackedTrainer`` does."""

    name = "efface, live"

    def __init__(self, policy: PreTrainedModel, reference: PreTrainedModel) -> None:
        super().__init__(policy, reference)
        fuse(self.policy)
        self._live = LiveReference(self._frozen, policy.device)

    def loss(self, step: Step) -> Tensor:
        """See ``PackedTrainer.compute_loss``."""
        loss = HeadLoss(OBJECTIVE, step.totals, forget_reference=self._live.rows(step.batch.forget_part()))
        total: Tensor = self.policy(batch=step.batch, loss=loss).loss
        return total


class EffaceCached(Provider):
    """efface with the reference's sums given, its default."""

    name = "efface, cached"

    def __init__(self, policy: PreTrainedModel, reference: PreTrainedModel) -> None:
        super().__init__(policy, reference)
        fuse(self.policy)

    def loss(self, step: Step) -> Tensor:
        """See ``PackedTrainer.compute_loss``."""
        loss = HeadLoss(OBJECTIVE, step.totals, reference_sums=step.reference_sums)
        total: Tensor = self.policy(batch=step.batch, loss=loss).loss
        return total


PROVIDERS: tuple[type[Provider], ...] = (Eager, EagerCached, EagerFlat, EffaceLive, EffaceCached)


def _shifted_logits(model: PreTrainedModel, batch: Padded) -> Tensor:
    """Return the logits (B, T − 1, V) that predict a token of the batch.

    ``float()``: under its bf16 mixed precision, accelerate returns the logits in fp32. Summed in bf16, a sequence's
    loss of a few hundred nats would be rounded to a multiple of 2.
    """
    logits: Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return logits.float()[..., :-1, :]
