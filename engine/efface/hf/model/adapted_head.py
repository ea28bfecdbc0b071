"""What stands where the ``lm_head`` was once peft has been there, as the linear layer that it amounts to."""

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
    """One LoRA adapter of a layer: scaling · B (A x), with r columns in B."""

    a: nn.Linear
    b: nn.Linear
    scaling: float


@dataclass(frozen=True)
class ServedHead:
    """A head as the loss op can take it: a linear layer, and the LoRA adapters that are active on it.

    W h + Σ s B (A h) is one linear layer of [h, s A h] with the weight [W, B]. Beside W + s B A, which it equals, it
    keeps the adapters' own precision: in bf16, what W + s B A adds to W is rounded away while it is small.
    """

    linear: nn.Linear
    adapters: tuple[LowRank, ...] = ()

    def widen(self, hidden: Tensor) -> Tensor:
        """Return ``hidden`` (N, D) as (N, D + r)."""
        if not self.adapters:
            return hidden
        low = [adapter.a(hidden.to(adapter.a.weight.dtype)) * adapter.scaling for adapter in self.adapters]
        return torch.cat([hidden, *(x.to(hidden.dtype) for x in low)], 1)  # (N, D + r)

    @property
    def weight(self) -> Tensor:
        """(V, D + r), of the dtype of W; differentiable."""
        weight = self.linear.weight
        if not self.adapters:
            return weight
        return torch.cat([weight, *(adapter.b.weight.to(weight.dtype) for adapter in self.adapters)], 1)


def peft_loaded() -> ModuleType | None:
    """Return peft if it has been imported; a model with adapters cannot be there without it."""
    return sys.modules.get("peft")


def import_peft() -> Any:
    """Return peft.

    Raises:
        ImportError: it is not installed; says how.
    """
    check_extras("LoRA", "lora")
    return importlib.import_module("peft")


def base_of(model: Any) -> Any:
    """Return the transformers model within a ``peft.PeftModel``; any other model as it is."""
    peft = peft_loaded()
    return model.get_base_model() if peft is not None and isinstance(model, peft.PeftModel) else model


def head_linears(layer: Any) -> list[nn.Linear]:
    """Return the plain linear layers within ``layer``: itself, LoRA's base layer, or the copies of modules_to_save."""
    if _is(layer, "peft.utils.other", "ModulesToSaveWrapper"):
        return [layer.original_module, *layer.modules_to_save.values()]
    return [layer.base_layer] if _is(layer, "peft.tuners.lora.layer", "Linear") else [layer]


def serve_head(layer: Any, plain: tuple[type, ...]) -> ServedHead:
    """Return what ``layer`` computes now, adapters on or off.

    Args:
        layer: an ``lm_head``.
        plain: classes that count as a plain linear layer.

    Raises:
        ValueError: a layer that amounts to no linear layer, with the reason.
    """
    if _is(layer, "peft.utils.other", "ModulesToSaveWrapper"):
        active = [name for name in layer.active_adapters if name in layer.modules_to_save]
        off = layer.disable_adapters or not active
        return serve_head(layer.original_module if off else layer.modules_to_save[active[0]], plain)
    if _is(layer, "peft.tuners.lora.layer", "Linear"):
        served = serve_head(layer.base_layer, plain)
        if layer.disable_adapters and layer.merged:
            layer.unmerge()  # as peft does, once it is called
        if layer.disable_adapters or layer.merged:
            return served
        return ServedHead(served.linear, tuple(_low_rank(layer, n) for n in layer.active_adapters if n in layer.lora_A))
    if type(layer) not in plain:
        kind = "none" if layer is None else f"{type(layer).__module__}.{type(layer).__qualname__}"
        raise ValueError(
            f"expected an lm_head of class torch.nn.Linear, got {kind}; merge or remove adapters on the head other "
            "than plain LoRA and modules_to_save, and leave it out of quantisation (llm_int8_skip_modules=['lm_head'])"
        )
    return ServedHead(layer)


def _low_rank(layer: Any, name: str) -> LowRank:
    reasons = {
        "a variant of LoRA (DoRA and the like), which is no sum W + s B A": name in layer.lora_variant,
        "dropout, which gives every row another weight": isinstance(layer.lora_dropout[name], nn.Dropout)
        and layer.lora_dropout[name].p > 0,
        "a bias of its own (lora_bias)": layer.lora_B[name].bias is not None,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(
                f"lm_head: its LoRA adapter {name!r} has {reason}; the loss op serves plain LoRA without dropout on "
                "the head. Leave lm_head out of target_modules, or give it such an adapter"
            )
    return LowRank(layer.lora_A[name], layer.lora_B[name], float(layer.scaling[name]))


def _is(layer: Any, module: str, name: str) -> bool:
    """Whether ``layer`` is of exactly this class of peft, by name: peft itself may not be there."""
    return (type(layer).__module__, type(layer).__qualname__) == (module, name)
