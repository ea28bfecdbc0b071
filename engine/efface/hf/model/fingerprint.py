"""The fingerprint of a Hugging Face model as it is now: its weights, its configuration, its precision."""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from efface.reference import model_fingerprint

# Entries of a configuration that change no log-probability. The dtype and tied weights show in the weights themselves.
_VOLATILE = {
    *("_name_or_path", "transformers_version", "architectures", "torch_dtype", "dtype", "tie_word_embeddings"),
    *("use_cache", "return_dict", "output_attentions", "output_hidden_states", "chunk_size_feed_forward"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id", "problem_type"),
}

_WRAPPED = (".base_layer.", ".original_module.")  # what PEFT's layers call the module that they stand for


def fingerprint(model: PreTrainedModel) -> bytes:
    """Return what ``model``'s log-probabilities depend on, as 16 bytes; an active autocast is part of it.

    Adapters that are switched off do not count: the model has the fingerprint of its base model.
    """
    settings = {"config": _lasting(model.config.to_dict()), **_precision(model.device)}
    if adapters := _adapters(model):
        settings["adapters"] = adapters
    return model_fingerprint(dict(_active_weights(model)), settings)


def _lasting(config: dict[str, Any]) -> dict[str, Any]:
    """Leave out what is volatile, in nested configurations too."""
    return {
        str(name): _lasting(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in _VOLATILE and not str(name).startswith("_attn_implementation")
    }


def _precision(device: torch.device) -> dict[str, Any]:
    autocast = torch.is_autocast_enabled(device.type)
    return {
        "autocast": str(torch.get_autocast_dtype(device.type)) if autocast else None,
        "tf32": device.type == "cuda" and tf32(),
    }


def tf32() -> bool:
    """Return whether matrix products of float32 are rounded to TF32 on CUDA devices."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # torch 2.9; it raises if both names are used
        return bool(matmul.fp32_precision == "tf32")
    return bool(matmul.allow_tf32)


def _adapters(model: PreTrainedModel) -> dict[str, Any]:
    """Return which adapters each of PEFT's layers uses, and by what it scales them; nothing where they are off."""
    found = {}
    for name, module in model.named_modules():
        if getattr(module, "disable_adapters", None) is False:
            active = list(module.active_adapters)
            scaling = getattr(module, "scaling", {})
            found[name.removeprefix("base_model.model.")] = [
                [adapter, float(scaling[adapter]) if adapter in scaling else None] for adapter in active
            ]
    return found


def _active_weights(model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """Yield the state dict under the names that it has without PEFT's wrappers, without what is switched off."""
    # In transformers' own mixin `disable_adapters` is a method.
    off = tuple(
        f"{name}." for name, module in model.named_modules() if getattr(module, "disable_adapters", None) is True
    )
    for name, value in model.state_dict().items():
        wrapped = next((word for word in _WRAPPED if word in name), ".")
        if not name.startswith(off) or wrapped != ".":
            yield name.removeprefix("base_model.model.").replace(wrapped, "."), value
