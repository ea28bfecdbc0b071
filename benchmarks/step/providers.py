"""The providers of the step suite; the first line of each docstring describes what it computes.

The file defines a provider, then open-unlearning's step (NPO, DPO, NPO with Liger-Kernel and with cut-cross-entropy),
then efface's, then both with LoRA, in which only adapters of rank 8 on every linear layer except the head are trained.
"""

import importlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor
from transformers.models.llama import modeling_llama

from benchmarks.step.inputs import PaddedBatch, Step
from benchmarks.step.measures import Stopwatch
from efface.batching import PackedBatch
from efface.hf.model.head import fuse
from efface.hf.model.head_loss import HeadLoss
from efface.hf.reference.live import AdapterReference, LiveReference

_REPLACED = ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP")  # by apply_liger_kernel_to_llama, process-wide
_ONLY_ON: dict[tuple[str, ...], str] = {
    ("cpu",): "a variant for CPUs",
    ("cuda",): "its kernels are Triton's, which need a GPU",
}


class StepProvider(ABC):
    """Computes the loss of the pairs of a step. Gradients come from ``backward``, as in any training loop.

    Args:
        policy: model that the provider owns from now on.
        reference: the reference model, owned as well; None unless ``second_model``.

    Attributes:
        name: in tables.
        reference: "live" (a second model), "cached" (its log-probabilities are given) or "adapter" (the policy's base).
        lora: whether the policy is a ``peft.PeftModel``.
        objectives: names of the objectives that it computes.
        devices: device types that it supports.
        needs: a required package.
        ours: whether its loss is efface's, with the backend that "auto" selects.
        shares: the provider that does the same with every sequence whole, if this one runs shared beginnings once.
    """

    name: ClassVar[str]
    reference: ClassVar[str]
    lora: ClassVar[bool] = False
    objectives: ClassVar[tuple[str, ...]] = ("npo",)
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    needs: ClassVar[str | None] = None
    ours: ClassVar[bool] = False
    shares: ClassVar["type[StepProvider] | None"] = None

    def __init__(self, policy: Any, reference: Any = None) -> None:
        self.policy = policy.train()
        self._frozen = None if reference is None else reference.eval().requires_grad_(False)
        self.trained = [weight for weight in policy.parameters() if weight.requires_grad]
        self._optimizer: torch.optim.Optimizer | None = None

    @classmethod
    def second_model(cls) -> bool:
        """Return whether the provider needs a reference model."""
        return cls.reference == "live"

    @classmethod
    def why_not(cls, device: str) -> str | None:
        """Return why the provider cannot run on the device, or None if it can."""
        if device not in cls.devices:
            return _ONLY_ON[cls.devices]
        if cls.needs is not None and importlib.util.find_spec(cls.needs.replace("-", "_")) is None:
            return f"{cls.needs} is not installed"
        return None

    @classmethod
    def batch(cls, step: Step) -> PackedBatch:
        """Return the packed batch that the provider reads, if it is efface's."""
        return step.batch if cls.shares is None else step.shared

    @classmethod
    def tokens(cls, step: Step) -> int:
        """Return the number of tokens that the policy's forward passes read."""
        return cls.batch(step).tokens if cls.ours else step.padded_tokens

    @property
    def models(self) -> list[Any]:
        """The policy, and the reference model if there is one."""
        return [model for model in (self.policy, self._frozen) if model is not None]

    @abstractmethod
    def loss(self, step: Step) -> Tensor:
        """Run the forward passes and return the loss."""

    def active(self) -> AbstractContextManager[None]:
        """Return a context, entered for forward and backward, for changes outside the provider's own models."""
        return nullcontext()

    def gradients(self, step: Step) -> Tensor:
        """Run forward and backward; return the loss. The gradients are in the policy's parameters."""
        with self.active():
            self.policy.zero_grad(set_to_none=True)
            loss = self.loss(step)
            loss.backward()
        return loss.detach()

    def update(self) -> None:
        """Clip the gradients and take an AdamW step, as ``transformers.Trainer`` does by default."""
        if self._optimizer is None:
            self._optimizer = torch.optim.AdamW(self.trained, lr=1e-5, weight_decay=0.0, fused=True)
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self._optimizer.step()

    def train(self, step: Step, watch: Stopwatch) -> Tensor:
        """Take a whole training step, timing its parts with ``watch``; return the loss."""
        with self.active():
            with watch.part("loss"):
                self.policy.zero_grad(set_to_none=True)
                loss = self.loss(step)
            with watch.part("backward"):
                loss.backward()
        with watch.part("update"):
            self.update()
        watch.end_step()
        return loss.detach()


class Eager(StepProvider):
    """open-unlearning's NPO: the forget batch and the retain batch padded, a forward pass each, SDPA attention.

    It computes the logits of every position, the forget loss from cross_entropy without reduction, and the retain loss
    from ``labels=``. It is slightly favoured: the ``labels=`` loss of the forget batch, which open-unlearning computes
    and discards, is left out, and no key-value cache is filled.
    """

    name = "padded, two forwards, live"
    reference = "live"

    def loss(self, step: Step) -> Tensor:
        """compute_dpo_loss, for NPO with only losing inputs, and compute_retain_loss."""
        objective: Any = step.objective
        win = 0.0 if step.alternate is None else self._log_ratio(step.alternate)
        lose = self._log_ratio(step.forget)
        forget_loss = -2 / objective.beta * F.logsigmoid(objective.beta * (win - lose)).mean()
        total: Tensor = objective.gamma * forget_loss + objective.alpha * self._retain_loss(step.retain)
        return total

    def _log_ratio(self, batch: PaddedBatch) -> Tensor:
        return -(self._nll(self.policy, batch) - self._reference_nll(batch))

    def _nll(self, model: Any, batch: PaddedBatch) -> Tensor:
        """compute_batch_nll: the sum of the token losses of each sequence."""
        logits = _shifted_logits(model, batch).contiguous()
        shifted_labels = batch.labels[..., 1:].contiguous()
        loss_function = torch.nn.CrossEntropyLoss(ignore_index=-100, reduction="none")
        token_losses: Tensor = loss_function(logits.transpose(-1, -2), shifted_labels)
        return token_losses.sum(dim=-1)

    def _reference_nll(self, batch: PaddedBatch) -> Tensor:
        with torch.no_grad():
            return self._nll(self._frozen, batch)

    def _retain_loss(self, batch: PaddedBatch) -> Tensor:
        loss: Tensor = self.policy(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
        ).loss
        return loss


class EagerCached(Eager):
    """The eager step with the reference's sums given: the effect of a cache alone."""

    name = "padded, two forwards, cached"
    reference = "cached"

    def _reference_nll(self, batch: PaddedBatch) -> Tensor:
        return -batch.reference_sums


class EagerDpo(Eager):
    """open-unlearning's DPO: the refusals, the forget batch and the retain batch padded, a forward pass each."""

    name = "padded, three forwards, live"
    objectives = ("dpo",)


class EagerDpoCached(EagerCached):
    """The eager step of DPO with the reference's sums given."""

    name = "padded, three forwards, cached"
    objectives = ("dpo",)


class EagerFlat(Eager):
    """The eager step with a live reference and cross_entropy over flattened rows: its fastest version on a CPU.

    On transposed logits, (B, V, T), cross_entropy makes a copy and sums with strides.
    """

    name = "padded, rows, live"
    devices = ("cpu",)

    def _nll(self, model: Any, batch: PaddedBatch) -> Tensor:
        """Return the sum of the token losses of each sequence."""
        logits, labels = _shifted_logits(model, batch), batch.labels[..., 1:]
        rows = logits.reshape(-1, logits.shape[-1])
        token_losses = F.cross_entropy(rows, labels.reshape(-1), ignore_index=-100, reduction="none")
        return token_losses.view(labels.shape).sum(dim=-1)


def _shifted_logits(model: Any, batch: PaddedBatch) -> Tensor:
    """Return the logits (B, T − 1, V) that predict a token of the batch.

    ``float()``: accelerate's bf16 mixed precision returns the logits in fp32. Summed in bf16, a sequence's loss of a
    few hundred nats would be rounded to a multiple of 2.
    """
    logits: Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return logits.float()[..., :-1, :]


class Liger(Eager):
    """Padded, two forwards; ``apply_liger_kernel_to_llama`` on both models: RoPE, RMSNorm, SwiGLU and the fused head.

    The retain loss is the patched model's own fused linear cross entropy, from ``labels=``. In training that model
    returns no logits, so NPO's token losses come from the same op without reduction, on the last hidden states. That
    takes 2 head products forward and 3 backward, which recomputes the logits. The mean has all its gradients after the
    forward pass.
    """

    name = "padded, Liger, live"
    devices = ("cuda",)
    needs = "liger-kernel"

    def __init__(self, policy: Any, reference: Any = None) -> None:
        liger = importlib.import_module("liger_kernel.transformers")
        super().__init__(policy, reference)
        self._token_losses = liger.LigerFusedLinearCrossEntropyLoss(reduction="none")
        own = {name: getattr(modeling_llama, name) for name in _REPLACED}
        try:
            for model in (self.policy, self._frozen):
                liger.apply_liger_kernel_to_llama(model=model)
            self._rope = modeling_llama.apply_rotary_pos_emb
        finally:
            for name, value in own.items():
                setattr(modeling_llama, name, value)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Patch Liger's RoPE in for the whole process during the step; the other providers use transformers' own."""
        own = modeling_llama.apply_rotary_pos_emb
        modeling_llama.apply_rotary_pos_emb = self._rope
        try:
            yield
        finally:
            modeling_llama.apply_rotary_pos_emb = own

    def _nll(self, model: Any, batch: PaddedBatch) -> Tensor:
        """Return the sum of the token losses of each sequence."""
        hidden = model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        rows, labels = hidden[:, :-1].flatten(0, 1), batch.labels[:, 1:]
        token_losses: Tensor = self._token_losses(model.lm_head.weight, rows, labels.flatten())
        return token_losses.view(labels.shape).sum(dim=-1)


class CutCrossEntropy(Eager):
    """Padded, two forwards; both losses with ``linear_cross_entropy`` on the last hidden states, label rows only.

    ``filter_eps=None`` makes it exact. The default drops gradients of probabilities below 2⁻¹². With random weights
    that is nearly all of them, so the timing would leave out most of the work.
    """

    name = "padded, cut-cross-entropy, live"
    devices = ("cuda",)
    needs = "cut-cross-entropy"
    implementation: ClassVar[str] = "cce"

    def _nll(self, model: Any, batch: PaddedBatch) -> Tensor:
        """Return the sum of the token losses of each sequence."""
        return self._cross_entropy(model, batch, "none").sum(dim=-1)

    def _retain_loss(self, batch: PaddedBatch) -> Tensor:
        return self._cross_entropy(self.policy, batch, "mean")

    def _cross_entropy(self, model: Any, batch: PaddedBatch, reduction: str) -> Tensor:
        hidden = model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        loss: Tensor = importlib.import_module("cut_cross_entropy").linear_cross_entropy(
            hidden,
            model.lm_head.weight,
            batch.labels,
            shift=True,
            reduction=reduction,
            filter_eps=None,
            impl=self.implementation,
        )
        return loss.float()


class CutCompiled(CutCrossEntropy):
    """The same with its ``torch_compile`` implementation, which runs on a CPU: logits of label rows, compiled."""

    name = "padded, cut-cross-entropy compiled, live"
    devices = ("cpu",)
    implementation = "torch_compile"


class EffaceLive(StepProvider):
    """efface: one packed forward pass, the loss fused into the head, and a second model, as in ``PackedTrainer``."""

    name = "efface, live"
    reference = "live"
    objectives: ClassVar[tuple[str, ...]] = ("npo", "dpo")
    ours = True

    def __init__(self, policy: Any, reference: Any = None) -> None:
        super().__init__(fuse(policy), reference)
        self._live = LiveReference(reference, reference.device)

    def loss(self, step: Step) -> Tensor:
        batch = self.batch(step)
        loss = HeadLoss(step.objective, step.totals, forget_reference=self._live.rows(batch.forget_part()))
        total: Tensor = self.policy(batch=batch, loss=loss).loss
        return total


class EffaceCached(StepProvider):
    """efface with the reference's sums given, its default."""

    name = "efface, cached"
    reference = "cached"
    objectives: ClassVar[tuple[str, ...]] = ("npo", "dpo")
    ours = True

    def __init__(self, policy: Any, reference: Any = None) -> None:
        super().__init__(fuse(policy), reference)

    def loss(self, step: Step) -> Tensor:
        loss = HeadLoss(step.objective, step.totals, reference_sums=step.reference_sums)
        total: Tensor = self.policy(batch=self.batch(step), loss=loss).loss
        return total


class EffaceSharedLive(EffaceLive):
    """efface with a second model; both run what the sequences of a step share from the first token on only once."""

    name = "efface, shared beginnings, live"
    shares = EffaceLive


class EffaceSharedCached(EffaceCached):
    """efface with the reference's sums given; what sequences share from the first token on is run only once."""

    name = "efface, shared beginnings, cached"
    shares = EffaceCached


class EagerLora(Eager):
    """open-unlearning's NPO with LoRA: padded, two forwards, and a copy of the policy as second model."""

    name = "LoRA, padded, two forwards, live"
    lora = True
    needs = "peft"


class EagerLoraCached(EagerCached):
    """open-unlearning's NPO with LoRA and the reference's sums given."""

    name = "LoRA, padded, two forwards, cached"
    lora = True
    needs = "peft"


class EffaceLora(StepProvider):
    """efface with LoRA: one packed forward pass, and one of the forget part with adapters disabled as the reference."""

    name = "LoRA, efface, adapter"
    reference = "adapter"
    ours = True
    lora = True
    needs = "peft"

    def __init__(self, policy: Any, reference: Any = None) -> None:
        super().__init__(fuse(policy), reference)
        self._base = AdapterReference(policy)

    def loss(self, step: Step) -> Tensor:
        loss = HeadLoss(step.objective, step.totals, forget_reference=self._base.rows(step.batch.forget_part()))
        total: Tensor = self.policy(batch=step.batch, loss=loss).loss
        return total


class EffaceLoraCached(EffaceCached):
    """efface with LoRA and the reference's sums given, its default."""

    name = "LoRA, efface, cached"
    lora = True
    objectives = ("npo",)
    needs = "peft"


PROVIDERS: tuple[type[StepProvider], ...] = (
    Eager,
    EagerCached,
    EagerDpo,
    EagerDpoCached,
    EagerFlat,
    Liger,
    CutCrossEntropy,
    CutCompiled,
    EffaceLive,
    EffaceCached,
    EffaceSharedLive,
    EffaceSharedCached,
    EagerLora,
    EagerLoraCached,
    EffaceLora,
    EffaceLoraCached,
)


def baseline(kind: type[StepProvider], objective: str) -> tuple[type[Eager], type[Eager]]:
    """Return the eager steps with which a provider is compared: with a live and with a cached reference."""
    if objective == "dpo":
        return EagerDpo, EagerDpoCached
    return (EagerLora, EagerLoraCached) if kind.lora else (Eager, EagerCached)
