"""Reference models that run during training: a second model, or the policy with its adapter switched off."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from efface.batching import PackedBatch, TokenStore
from efface.hf.model.activations import answer_rows, watched
from efface.hf.model.adapted_head import base_of
from efface.hf.model.head import head_of, packed_hidden, use_packed_attention
from efface.hf.model.lora import COMPARED_TOKENS, SECOND, is_second, logits_of, without_second
from efface.hf.model.packing import readable
from efface_kernels import Head, ReferenceRows

_SWITCHED_OFF_UNFROZEN = {"modules_to_save", "token_adapter", SECOND}
"""Name components of trainable weights that switching the adapter off disables without freezing."""

_ROUNDING, _ROUNDING_HALF = 1e-5, 0.06
"""Tolerances, relative to the largest logit, for a fresh adapter that is exact only up to rounding.

Such an adapter multiplies by 1, or adds what its initialisation subtracted. The second value is for half precision.
"""


class ModelReference(ABC):
    """A frozen model that runs in addition to the policy, on the sequences whose loss reads it."""

    @abstractmethod
    def running(self) -> AbstractContextManager[PreTrainedModel]:
        """Return a context manager that yields the frozen model for a forward pass."""

    @torch.no_grad()
    def rows(self, batch: PackedBatch) -> ReferenceRows:
        """Return the frozen model's hidden states for a batch's label rows, and its head, on the batch's device."""
        device = batch.storage.device
        with self.running() as model:
            hidden = packed_hidden(model, batch.to(model.device)).to(device)
            return ReferenceRows(hidden, self._head(model, device))

    @torch.no_grad()
    def activations(self, batch: PackedBatch, module_regex: str) -> Tensor:
        """Return the output (N, D) at the batch's answer tokens of the module that ``module_regex`` matches."""
        with self.running() as model, watched(model, module_regex) as watch:
            own = readable(model, batch.to(model.device))
            packed_hidden(model, own)
            return answer_rows(watch.output()[0], own).to(batch.storage.device)

    def _head(self, model: PreTrainedModel, device: torch.device) -> Head:
        return head_of(model)


class LiveReference(ModelReference):
    """A second model as the reference.

    Args:
        model: the reference model; it is frozen and put into evaluation mode.
        device: device to which the model is moved; quantised models are not moved. If the policy is on another device,
            the head is copied to the policy's device.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        self.model = model
        self.model.requires_grad_(False)
        self.model.eval()
        self._head_copy: Head | None = None
        if not getattr(model, "is_quantized", False) and model.device != device:
            torch.nn.Module.to(self.model, device)
        use_packed_attention(self.model)  # raises here, not at the first step, if the model is unsupported

    @contextmanager
    def running(self) -> Iterator[PreTrainedModel]:
        """Yield the model."""
        yield self.model

    def _head(self, model: PreTrainedModel, device: torch.device) -> Head:
        if model.device == device:
            return head_of(model)
        if self._head_copy is None:
            self._head_copy = head_of(model).to(device)
        return self._head_copy


class AdapterReference(ModelReference):
    """The policy as its own reference, with the trained adapter switched off for the reference's forward pass.

    It needs no memory for a second model. The reference is the model to which the trained adapter was added (with the
    first adapter on, if there are two), so only the weights of that adapter can be trained. ``check_start`` checks that
    the reference is also the model with which the run begins.

    Args:
        model: the policy, a ``peft.PeftModel``.

    Raises:
        ValueError: if the model has no adapter, or weights of its base model are trained too.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._base = base_of(model)
        if self._base is model:
            raise ValueError(
                "reference 'adapter' is the model with its adapter switched off: expected a peft.PeftModel, got "
                f"{type(model).__name__}; add LoRA (--lora-r 8, or peft.get_peft_model), or use 'cached' or 'live'"
            )
        free = {name for name, weight in model.named_parameters() if weight.requires_grad}
        with self._switched_off():  # peft freezes adapters that it switches off; some versions unfreeze the base layers
            trained = [name for name, weight in model.named_parameters() if weight.requires_grad and name in free]
        trained = [name for name in trained if not _SWITCHED_OFF_UNFROZEN.intersection(name.split("."))]
        if trained:
            raise ValueError(
                f"reference 'adapter': expected a frozen base model, got one whose tensor {trained[0]!r} is trained "
                f"({len(trained)} such tensors), so the reference would change; freeze them (bias='none'), or use "
                "'cached' or 'live'"
            )

    @contextlib.contextmanager
    def running(self) -> Iterator[PreTrainedModel]:
        """Yield the model with the trained adapter switched off."""
        with self._switched_off():
            yield self._base

    def check_start(self, store: TokenStore) -> None:
        """Check that reference and policy are the same model now, on the first two sequences of ``store``.

        They must agree before the first step. They differ if the adapter's initialisation changed the base weights
        (PiSSA, OLoRA and similar), or if the adapter has been trained before. The reference "adapter" would then be
        ambiguous. Models whose weights are sharded or on the meta device are not checked.

        Raises:
            ValueError: if the logits differ by more than rounding; the message gives the possible reasons.
        """
        if any(weight.numel() == 0 or weight.is_meta for weight in self._model.parameters()):
            return
        configs = self._model.peft_config.values()
        for i in range(min(2, len(store))):
            ids = torch.from_numpy(store[i].astype("int64"))[None, :COMPARED_TOKENS].to(self._model.device)
            policy = logits_of(self._base, ids)
            with self._switched_off():
                reference = logits_of(self._base, ids)
            difference = (policy - reference).abs().max().item()
            if all(map(_exact_at_first, configs)):
                # 0 if the logits are equal; else 4 times the difference between two passes of the policy, which is not
                # 0 on a device whose sums are not deterministic.
                allowed = 0.0 if difference == 0 else 4 * (policy - logits_of(self._base, ids)).abs().max().item()
            else:
                half = self._model.dtype in (torch.float16, torch.bfloat16)
                allowed = (_ROUNDING_HALF if half else _ROUNDING) * reference.abs().max().item()
            if not difference <= allowed:
                inits = [repr(getattr(config, "init_lora_weights", None)) for config in configs]
                raise ValueError(
                    "reference 'adapter': expected the model with its adapter switched off to equal the model with "
                    f"which this run begins, got logits that differ by up to {difference:.3g}. Either the adapter's "
                    "initialisation changed the base weights or is random (init_lora_weights="
                    f"{', '.join(inits)}), or the adapter has been trained before, so it is not clear which model is "
                    "the reference. For the model as it is now, use 'cached' (computed before the first step) or "
                    "'live' (a frozen copy); for its base model, pass that as the reference model with 'live' or "
                    "'cached'"
                )

    @contextlib.contextmanager
    def _switched_off(self) -> Iterator[None]:
        """Switch the adapter and dropout off, and restore every module's mode and every requires_grad afterwards.

        peft alone would make every adapter trainable that it switches on again, including frozen ones.
        """
        modes = [(module, module.training) for module in self._model.modules()]
        trained = [(weight, weight.requires_grad) for weight in self._model.parameters()]
        self._model.eval()
        try:
            with without_second(self._model) if is_second(self._model) else self._model.disable_adapter():
                yield
        finally:
            for module, mode in modes:
                module.training = mode
            for weight, flag in trained:
                weight.requires_grad_(flag)


def _exact_at_first(config: Any) -> bool:
    """Return whether a fresh adapter adds exactly 0: plain LoRA with B initialised to zeros."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    plain = kind == "LORA" and not config.use_dora
    return plain and config.init_lora_weights in (True, "gaussian", "eva", "mica")
