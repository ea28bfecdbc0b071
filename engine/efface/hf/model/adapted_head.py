"""Conversion of an ``lm_head`` wrapped by peft into an equivalent linear layer, and detection of peft models."""

import importlib
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from efface.extras import check_extras


@dataclass(frozen=True)
class LowRank:
    """One LoRA adapter of a layer: scaling · B (A x); B has r columns."""

    a: nn.Linear
    b: nn.Linear
    scaling: float


@dataclass(frozen=True)
class ServedHead:
    """A head in the form that the loss op supports: a linear layer and the LoRA adapters that are active on it.

    W h + Σ s B (A h) equals a single linear layer with the weight [W, B] applied to [h, s A h]. Unlike the merged
    weight W + s B A, this form keeps the adapters' contribution while it is small: in bf16, adding it to W would round
    it away.
    """

    linear: nn.Linear
    adapters: tuple[LowRank, ...] = ()

    def widen(self, hidden: Tensor) -> Tensor:
        """Append s A h of each adapter to ``hidden`` (N, D), and return (N, D + r)."""
        if not self.adapters:
            return hidden
        low = [adapter.a(hidden.to(adapter.a.weight.dtype)) * adapter.scaling for adapter in self.adapters]
        return torch.cat([hidden, *(x.to(hidden.dtype) for x in low)], 1)  # (N, D + r)

    @property
    def weight(self) -> Tensor:
        """(V, D + r) weight [W, B], in the dtype of W; differentiable."""
        weight = self.linear.weight
        if not self.adapters:
            return weight
        return torch.cat([weight, *(adapter.b.weight.to(weight.dtype) for adapter in self.adapters)], 1)


def peft_loaded() -> ModuleType | None:
    """Return the module peft if it has been imported, or None; without it, no model has adapters."""
    return sys.modules.get("peft")


def import_peft() -> Any:
    """Import and return peft.

    Raises:
        ImportError: if peft is not installed; the message gives the command that installs it.
    """
    check_extras("LoRA", "lora")
    return importlib.import_module("peft")


def base_of(model: Any) -> Any:
    """Return the transformers model inside a ``peft.PeftModel``, or any other model unchanged."""
    peft = peft_loaded()
    return model.get_base_model() if peft is not None and isinstance(model, peft.PeftModel) else model


def head_linears(layer: Any) -> list[nn.Linear]:
    """Return the plain linear layers of ``layer``: itself, LoRA's base layer, or all copies in modules_to_save."""
    if _is(layer, "peft.utils.other", "ModulesToSaveWrapper"):
        return [layer.original_module, *layer.modules_to_save.values()]
    return [layer.base_layer] if _is(layer, "peft.tuners.lora.layer", "Linear") else [layer]


def serve_head(layer: Any, plain: tuple[type, ...]) -> ServedHead:
    """Return the head equivalent to ``layer`` in its current state, with its adapters on or off.

    Args:
        layer: an ``lm_head``.
        plain: classes that count as plain linear layers.

    Raises:
        ValueError: if ``layer`` is not equivalent to a linear layer; the message gives the reason.
    """
    if _is(layer, "peft.utils.other", "ModulesToSaveWrapper"):
        active = [name for name in layer.active_adapters if name in layer.modules_to_save]
        off = layer.disable_adapters or not active
        return serve_head(layer.original_module if off else layer.modules_to_save[active[0]], plain)
    if _is(layer, "peft.tuners.lora.layer", "Linear"):
        served = serve_head(layer.base_layer, plain)
        if layer.disable_adapters and layer.merged:
            layer.unmerge()  # peft does the same when the layer is called
        if layer.disable_adapters or layer.merged:
            return served
        return ServedHead(served.linear, tuple(_low_rank(layer, n) for n in layer.active_adapters if n in layer.lora_A))
    if type(layer) not in plain:
        kind = "none" if layer is None else f"{type(layer).__module__}.{type(layer).__qualname__}"
        raise ValueError(
            f"lm_head: expected a torch.nn.Linear, got {kind}; merge or remove adapters on the head other than plain "
            "LoRA and modules_to_save, and exclude it from quantisation (llm_int8_skip_modules=['lm_head'])"
        )
    return ServedHead(layer)


def _low_rank(layer: Any, name: str) -> LowRank:
    reasons = {
        "a variant of LoRA (such as DoRA) that is not a sum W + s B A": name in layer.lora_variant,
        "dropout, which changes the weight for each row": isinstance(layer.lora_dropout[name], nn.Dropout)
        and layer.lora_dropout[name].p > 0,
        "a bias (lora_bias)": layer.lora_B[name].bias is not None,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(
                f"lm_head: expected plain LoRA without dropout and bias, got an adapter {name!r} with {reason}; leave "
                "lm_head out of target_modules, or use plain LoRA on it"
            )
    return LowRank(layer.lora_A[name], layer.lora_B[name], float(layer.scaling[name]))


def _is(layer: Any, module: str, name: str) -> bool:
    """Return whether ``layer`` is exactly of this class of peft; compared by name, since peft may not be installed."""
    return (type(layer).__module__, type(layer).__qualname__) == (module, name)
