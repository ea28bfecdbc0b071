"""What surrounds a model: what is refused, evaluation that leaves no trace, what ``torch.compile`` leaves alone."""

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
    "DataParallel": "give the model itself, `model.module`, and start one process a device with torchrun",
    "DistributedDataParallel": "give the model itself, `model.module`; the trainer wraps it",
    "FullyShardedDataParallel": "give the model itself; the trainer wraps it, see the argument `fsdp`",
    "DeepSpeedEngine": "give the model itself, `model.module`; the trainer wraps it, see the argument `deepspeed`",
}


def check_loaded(model: Any, name: str = "model", *, kinds: tuple[type, ...] = (nn.Module,)) -> None:
    """Raise TypeError for what is no model: a name, a class, a module of another kind.

    Args:
        model: what was given.
        name: of the argument.
        kinds: what counts as a model, beside peft's.
    """
    # Both of peft's kinds of models have the method; a fused model's class has the bases of its own.
    if isinstance(model, kinds) or (isinstance(model, nn.Module) and hasattr(model, "get_base_model")):
        return
    got = model.__name__ if isinstance(model, type) else type(model).__name__
    raise TypeError(
        f"`{name}`: expected a transformers.PreTrainedModel, or a peft.PeftModel around one, got {got}; load it with "
        "AutoModelForCausalLM.from_pretrained"
    )


def check_model(model: Any, name: str = "model") -> None:
    """Raise TypeError for what is neither a transformers model nor peft's around one.

    Args:
        model: what was given.
        name: of the argument.
    """
    kind = type(model).__name__
    if kind in _WRAPPERS:
        raise TypeError(f"`{name}`: expected a model without a wrapper, got {kind}; {_WRAPPERS[kind]}")
    check_loaded(model, name, kinds=(PreTrainedModel,))


def check_placed(base: Any) -> None:
    """Raise ValueError for a model whose layers are on several devices, as of ``device_map="auto"``."""
    places = {str(place) for place in (getattr(base, "hf_device_map", None) or {}).values()}
    if len(places) > 1:
        raise ValueError(
            f"{type(base).__name__}: expected a model on one device, got one that is spread over "
            f"{', '.join(sorted(places))} (device_map), while the loss op takes hidden states and head from one; load "
            "it without device_map, or with device_map={'': 0}, and shard it over several GPUs with `fsdp`"
        )


def check_adapters(model: Any, base: Any) -> None:
    """Raise ValueError for adapters that need a batch axis; the arguments are those of ``check_servable``."""
    if model is not base:
        for name, config in model.peft_config.items():
            _check_adapter(name, config)


def check_servable(model: Any, base: Any) -> None:
    """Raise ValueError for adapters that need a batch axis, and for a loss with a term that the head does not know.

    Args:
        model: the model as it is called, a ``peft.PeftModel`` perhaps.
        base: the transformers model within.
    """
    check_adapters(model, base)
    config = base.config.get_text_config()
    coefficient = getattr(config, "router_aux_loss_coef", None)
    if getattr(config, "output_router_logits", False) and coefficient != 0:
        raise ValueError(
            f"{type(base).__name__}: its loss includes a router's auxiliary loss (output_router_logits=True, "
            f"router_aux_loss_coef={coefficient}), which an unlearning objective has not; set "
            "model.config.output_router_logits = False"
        )


def _check_adapter(name: str, config: Any) -> None:
    kind = getattr(config.peft_type, "value", config.peft_type)
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise ValueError(
            f"adapter {name!r}: expected weights of layers (LoRA and its kin), got {kind}, whose virtual tokens belong "
            "to no sequence of a packed batch; use LoRA"
        )
    if getattr(config, "alora_invocation_tokens", None):
        raise ValueError(
            f"adapter {name!r}: an activated LoRA looks for its invocation tokens in input_ids, one row a sequence, "
            "which a packed batch has not; use plain LoRA"
        )


F = TypeVar("F", bound=Callable[..., Any])


def uncompiled(function: F) -> F:
    """Decorator: run ``function``, and all that it calls, as written."""
    decorated: F = torch.compiler.disable(function)
    return decorated


def uncompiled_frame(function: F) -> F:
    """Decorator: run ``function`` as written; what it calls may be compiled."""
    decorated: F = torch.compiler.disable(function, recursive=False)
    return decorated


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within; afterwards modes and random-number generators are what they were."""
    modes = [(module, module.training) for module in model.modules()]
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the generator that others draw from
    cards = sorted({weight.get_device() for weight in model.parameters() if weight.is_cuda})
    model.eval()
    try:
        with torch.random.fork_rng(cards):  # without the list it warns of every card that the model is not on
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        for module, mode in modes:
            module.training = mode
