"""Checks that a model is supported, exclusion of functions from ``torch.compile``, and temporary evaluation mode."""

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

_WRAPPERS = {
    "OptimizedModule": "give the model itself, `model._orig_mod`, and set `torch_compile=True` in the arguments",
    "DataParallel": "give the model itself, `model.module`, and start one process per device with torchrun",
    "DistributedDataParallel": "give the model itself, `model.module`; the trainer wraps it",
    "FullyShardedDataParallel": "give the model itself; the trainer wraps it, see the argument `fsdp`",
    "DeepSpeedEngine": "give the model itself, `model.module`; the trainer wraps it, see the argument `deepspeed`",
}


def check_loaded(model: Any, name: str = "model", *, kinds: tuple[type, ...] = (nn.Module,)) -> None:
    """Raise TypeError unless ``model`` is a loaded model, and not a name, a class or another kind of object.

    Args:
        model: the argument to check.
        name: name of the argument.
        kinds: classes that count as models, in addition to peft's.
    """
    # Both of peft's model classes have get_base_model. A fused model is still an instance of its own class.
    if isinstance(model, kinds) or (isinstance(model, nn.Module) and hasattr(model, "get_base_model")):
        return
    got = model.__name__ if isinstance(model, type) else type(model).__name__
    raise TypeError(
        f"`{name}`: expected a transformers.PreTrainedModel, or a peft.PeftModel around one, got {got}; load it with "
        "AutoModelForCausalLM.from_pretrained"
    )


def check_model(model: Any, name: str = "model") -> None:
    """Raise TypeError unless ``model`` is a transformers model or a peft model around one, without other wrappers.

    Args:
        model: the argument to check.
        name: name of the argument.
    """
    kind = type(model).__name__
    if kind in _WRAPPERS:
        raise TypeError(f"`{name}`: expected a model without a wrapper, got {kind}; {_WRAPPERS[kind]}")
    check_loaded(model, name, kinds=(PreTrainedModel,))


def check_placed(base: Any) -> None:
    """Raise ValueError if the layers of a model are on several devices, as ``device_map="auto"`` places them."""
    places = {str(place) for place in (getattr(base, "hf_device_map", None) or {}).values()}
    if len(places) > 1:
        raise ValueError(
            f"{type(base).__name__}: expected a model on one device, got one that is spread over "
            f"{', '.join(sorted(places))} (device_map), while the loss op needs hidden states and head on one device; "
            "load it without device_map or with device_map={'': 0}, and use `fsdp` to shard it over several GPUs"
        )


def check_adapters(model: Any, base: Any) -> None:
    """Raise ValueError if an adapter needs a batch axis; the arguments are those of ``check_servable``."""
    if model is not base:
        for name, config in model.peft_config.items():
            _check_adapter(name, config)


def check_servable(model: Any, base: Any) -> None:
    """Raise ValueError if an adapter needs a batch axis, or the model's own loss has a router's auxiliary term.

    Args:
        model: a transformers model, or a ``peft.PeftModel`` around one.
        base: the transformers model itself.
    """
    check_adapters(model, base)
    config = base.config.get_text_config()
    coefficient = getattr(config, "router_aux_loss_coef", None)
    if getattr(config, "output_router_logits", False) and coefficient != 0:
        raise ValueError(
            f"{type(base).__name__}: expected a loss without a router's auxiliary loss, which unlearning objectives do "
            f"not include, got output_router_logits=True with router_aux_loss_coef={coefficient}; set "
            "model.config.output_router_logits = False"
        )


def _check_adapter(name: str, config: Any) -> None:
    kind = getattr(config.peft_type, "value", config.peft_type)
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise ValueError(
            f"adapter {name!r}: expected an adapter of layer weights (such as LoRA), got {kind}, whose virtual tokens "
            "do not work in packed batches; use LoRA"
        )
    if getattr(config, "alora_invocation_tokens", None):
        raise ValueError(
            f"adapter {name!r}: expected plain LoRA, got an activated LoRA, which looks for its invocation tokens in "
            "one row of input_ids per sequence, while a packed batch has one row in total; use plain LoRA"
        )


F = TypeVar("F", bound=Callable[..., Any])


def uncompiled(function: F) -> F:
    """Exclude ``function`` and everything that it calls from torch.compile; a decorator."""
    decorated: F = torch.compiler.disable(function)
    return decorated


def uncompiled_frame(function: F) -> F:
    """Exclude ``function`` itself from torch.compile, but not the functions that it calls; a decorator."""
    decorated: F = torch.compiler.disable(function, recursive=False)
    return decorated


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put ``model`` into evaluation mode; restore modes and random-number generators when the block ends."""
    modes = [(module, module.training) for module in model.modules()]
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global generator, which others use
    cards = sorted({weight.get_device() for weight in model.parameters() if weight.is_cuda})
    model.eval()
    try:
        with torch.random.fork_rng(cards):  # without a list of devices, it warns if there are several GPUs
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        for module, mode in modes:
            module.training = mode
