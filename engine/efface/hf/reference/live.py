"""A frozen model that runs beside the policy: a second model, or the policy with its adapter switched off."""

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
from efface_kernels import Head, ReferenceRows

_ADAPTERS_OF_THEIR_OWN = {"modules_to_save", "token_adapter", SECOND}
"""Parts of the names of trainable weights that are switched off without being frozen."""

_ROUNDING, _ROUNDING_HALF = 1e-5, 0.06
"""Of the largest logit: what an adapter that multiplies by 1, or adds what it has subtracted, may change at first."""


class ModelReference(ABC):
    """A frozen model that runs, beside the policy, on the sequences whose loss reads it."""

    @abstractmethod
    def running(self) -> AbstractContextManager[PreTrainedModel]:
        """Hand out the frozen model for a forward pass."""

    @torch.no_grad()
    def rows(self, batch: PackedBatch) -> ReferenceRows:
        """Return its hidden states for the label rows of a pack, and its head, on the pack's device."""
        device = batch.storage.device
        with self.running() as model:
            hidden = packed_hidden(model, batch.to(model.device)).to(device)
            return ReferenceRows(hidden, self._head(model, device))

    @torch.no_grad()
    def activations(self, batch: PackedBatch, module_regex: str) -> Tensor:
        """Return what the module of that name puts out at the answer tokens of a pack, (N, D)."""
        with self.running() as model, watched(model, module_regex) as watch:
            own = batch.to(model.device)
            packed_hidden(model, own)
            return answer_rows(watch.output()[0], own).to(batch.storage.device)

    def _head(self, model: PreTrainedModel, device: torch.device) -> Head:
        return head_of(model)


class LiveReference(ModelReference):
    """A second model.

    Args:
        model: frozen and put into evaluation mode here.
        device: where it runs; its head is copied to the policy's device if that is another one. Quantised models stay
            where they are.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        self.model = model
        self.model.requires_grad_(False)
        self.model.eval()
        self._far_head: Head | None = None
        if not getattr(model, "is_quantized", False) and model.device != device:
            torch.nn.Module.to(self.model, device)
        use_packed_attention(self.model)  # refuses now what it could not serve at the first step

    @contextmanager
    def running(self) -> Iterator[PreTrainedModel]:
        """Hand out the model."""
        yield self.model

    def _head(self, model: PreTrainedModel, device: torch.device) -> Head:
        if model.device == device:
            return head_of(model)
        if self._far_head is None:
            self._far_head = head_of(model).to(device)
        return self._far_head


class AdapterReference(ModelReference):
    """The reference model is the policy with the adapter that is trained switched off for a forward pass.

    It costs no second model. It is the model that the adapter was put on (with the first of two adapters on), so
    nothing but that adapter may be trained. ``check_start`` tells whether it is also the model that a run begins with.

    Raises:
        ValueError: a model without adapters, or one whose base is trained too.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._base = base_of(model)
        if self._base is model:
            raise ValueError(
                "reference 'adapter' is the base model with its adapters switched off: expected a peft.PeftModel, got "
                f"{type(model).__name__}; give it LoRA (--lora-r 8, or peft.get_peft_model), or use 'cached' or 'live'"
            )
        free = {name for name, weight in model.named_parameters() if weight.requires_grad}
        with self._switched_off():  # peft freezes what it switches off, and some versions free what lies under it
            trained = [name for name, weight in model.named_parameters() if weight.requires_grad and name in free]
        trained = [name for name in trained if not _ADAPTERS_OF_THEIR_OWN.intersection(name.split("."))]
        if trained:
            raise ValueError(
                f"reference 'adapter': expected a frozen base model, got one of which {trained[0]!r} is trained "
                f"({len(trained)} tensors), so that it would not stay the reference; freeze them (bias='none'), or use "
                "'cached' or 'live'"
            )

    @contextlib.contextmanager
    def running(self) -> Iterator[PreTrainedModel]:
        """Hand out the model without the adapter that is trained."""
        with self._switched_off():
            yield self._base

    def check_start(self, store: TokenStore) -> None:
        """Compare the reference with the policy as it is now, on the first two sequences of ``store``.

        Before the first step they have to be one model. They are not where an initialisation changed the base weights
        (PiSSA, OLoRA and the like), and where the adapter has been trained before; then "adapter" could mean two
        models. Does nothing for sharded models.

        Raises:
            ValueError: they differ, with the reason.
        """
        if any(weight.numel() == 0 or weight.is_meta for weight in self._model.parameters()):
            return
        configs = self._model.peft_config.values()
        for i in range(min(2, len(store))):
            ids = torch.from_numpy(store[i].astype("int64"))[None, :COMPARED_TOKENS].to(self._model.device)
            policy = logits_of(self._base, ids)
            with self._switched_off():
                reference = logits_of(self._base, ids)
            apart = (policy - reference).abs().max().item()
            if all(map(_exact_at_first, configs)):
                # Nothing, unless the device's own sums come out otherwise each time.
                allowed = 0.0 if apart == 0 else 4 * (policy - logits_of(self._base, ids)).abs().max().item()
            else:
                half = self._model.dtype in (torch.float16, torch.bfloat16)
                allowed = (_ROUNDING_HALF if half else _ROUNDING) * reference.abs().max().item()
            if not apart <= allowed:
                inits = [repr(getattr(config, "init_lora_weights", None)) for config in configs]
                raise ValueError(
                    "reference 'adapter': expected the model with its adapter switched off to be the model that this "
                    f"run begins with, got logits that differ by up to {apart:.3g}. Either the adapter's "
                    "initialisation changed the base weights or starts from noise (init_lora_weights="
                    f"{', '.join(inits)}), or the adapter has been trained before; so the reference could be either of "
                    "two models. For the model as it is now use 'cached', computed before the first step, or 'live', a "
                    "frozen copy; for its base model give that as the reference model of 'live' or 'cached'"
                )

    @contextlib.contextmanager
    def _switched_off(self) -> Iterator[None]:
        """Adapter and dropout off; afterwards every module's mode and every requires_grad is what it was.

        peft alone would leave trainable every adapter that it switches on again, those that were frozen among them.
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
    """Return whether a fresh adapter adds nothing but zeros: plain LoRA whose B is zero."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    plain = kind == "LORA" and not config.use_dora
    return plain and config.init_lora_weights in (True, "gaussian", "eva", "mica")
