"""open-unlearning's own step."""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from benchmarks.step.data import Padded, Step
from benchmarks.step.providers.base import OBJECTIVE, Provider


class Eager(Provider):
    """open-unlearning's NPO: the forget batch and the retain batch padded, a forward pass each, SDPA attention.

    Logits of every position; the forget loss from cross_entropy without reduction, the retain loss from ``labels=``.
    Two favours to it: the ``labels=`` loss of the forget batch, which open-unlearning computes and drops, is left out,
    and no key-value cache is filled.
    """

    name = "padded, two forwards, live"
    reference = "live"

    def loss(self, step: Step) -> Tensor:
        """compute_dpo_loss with losing inputs alone, and compute_retain_loss."""
        nll = self._nll(self.policy, step.forget)
        log_ratio = -(nll - self._reference_nll(step))
        forget_loss = -2 / OBJECTIVE.beta * F.logsigmoid(OBJECTIVE.beta * (0.0 - log_ratio)).mean()
        total: Tensor = OBJECTIVE.gamma * forget_loss + OBJECTIVE.alpha * self._retain_loss(step.retain)
        return total

    def _nll(self, model: Any, batch: Padded) -> Tensor:
        """compute_batch_nll: summed token losses of each sequence."""
        logits = _shifted_logits(model, batch).contiguous()
        shifted_labels = batch.labels[..., 1:].contiguous()
        loss_function = torch.nn.CrossEntropyLoss(ignore_index=-100, reduction="none")
        token_losses: Tensor = loss_function(logits.transpose(-1, -2), shifted_labels)
        return token_losses.sum(dim=-1)

    def _reference_nll(self, step: Step) -> Tensor:
        with torch.no_grad():
            return self._nll(self._frozen, step.forget)

    def _retain_loss(self, batch: Padded) -> Tensor:
        loss: Tensor = self.policy(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
        ).loss
        return loss


class EagerCached(Eager):
    """The same, with the reference's sums given: what a cache alone would do for the eager step."""

    name = "padded, two forwards, cached"
    reference = "cached"

    def _reference_nll(self, step: Step) -> Tensor:
        return -step.reference_sums[: step.batch.forget_sequences]


class EagerFlat(Eager):
    """The same with a live reference, and cross_entropy over rows: what open-unlearning's loss could be on a CPU.

    Transposed logits, (B, V, T), cost cross_entropy a copy and strided sums.
    """

    name = "padded, rows, live"
    devices = ("cpu",)

    def _nll(self, model: Any, batch: Padded) -> Tensor:
        """Summed token losses of each sequence."""
        logits, labels = _shifted_logits(model, batch), batch.labels[..., 1:]
        rows = logits.reshape(-1, logits.shape[-1])
        token_losses = F.cross_entropy(rows, labels.reshape(-1), ignore_index=-100, reduction="none")
        return token_losses.view(labels.shape).sum(dim=-1)


def _shifted_logits(model: Any, batch: Padded) -> Tensor:
    """Return the logits (B, T − 1, V) that predict a token of the batch.

    ``float()``: under its bf16 mixed precision, accelerate returns the logits in fp32. Summed in bf16, a sequence's
    loss of a few hundred nats would be rounded to a multiple of 2.
    """
    logits: Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return logits.float()[..., :-1, :]
