"""The fingerprint of a Hugging Face model in its current state: weights, configuration, adapters and precision."""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from efface.reference import model_fingerprint

# Configuration entries that change no log-probability. The dtype and tied weights show in the weights themselves.
_VOLATILE = {
    *("_name_or_path", "transformers_version", "architectures", "torch_dtype", "dtype", "tie_word_embeddings"),
    *("use_cache", "return_dict", "output_attentions", "output_hidden_states", "chunk_size_feed_forward"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id", "problem_type"),
}

_WRAPPED = (".base_layer.", ".original_module.")  # names under which PEFT's layers keep the module that they wrap


def fingerprint(model: PreTrainedModel) -> bytes:
    """Return 16 bytes that identify everything on which the log-probabilities of ``model`` depend.

    An active autocast and TF32 are included. Adapters that are switched off are not: with all of them off, the model
    has the fingerprint of its base model.
    """
    settings = {"config": _lasting(model.config.to_dict()), **_precision(model.device)}
    if adapters := _adapters(model):
        settings["adapters"] = adapters
    return model_fingerprint(dict(_active_weights(model)), settings)


def _lasting(config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration without volatile entries, also in nested configurations."""
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
    """Return whether float32 matrix products use TF32 on CUDA devices."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # since torch 2.9, which raises if both names are used
        return bool(matmul.fp32_precision == "tf32")
    return bool(matmul.allow_tf32)


def _adapters(model: PreTrainedModel) -> dict[str, Any]:
    """Return the active adapters of each PEFT layer with their scaling; layers with adapters off are left out."""
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
    """Yield the state dict without the weights of switched-off adapters, under the names without PEFT's wrappers."""
    # In transformers' own mixin `disable_adapters` is a method.
    off = tuple(
        f"{name}." for name, module in model.named_modules() if getattr(module, "disable_adapters", None) is True
    )
    for name, value in model.state_dict().items():
        wrapped = next((word for word in _WRAPPED if word in name), ".")
        if not name.startswith(off) or wrapped != ".":
            yield name.removeprefix("base_model.model.").replace(wrapped, "."), value
