"""The attention implementation ``efface_varlen`` for transformers, and the model arguments for packed batches.

Without the arguments of a packed batch (in generation, or for padded batches) the implementation calls transformers'
SDPA attention. Soft-capped scores, which that does not support, are computed here.
"""

import functools
import inspect
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from efface.batching import PackedBatch
from efface.hf.model.attention import flash_attn, torch_varlen
from efface.hf.model.attention.choice import AttentionCall, Installed, choose_kernel
from efface.hf.model.attention.paths import Paths
from efface.hf.model.attention.segments import segment_attention, soft_capped_attention, working_dtype
from efface.hf.model.supported import uncompiled

NAME = "efface_varlen"

UNKNOWN_TERMS = ("s_aux", "position_bias")
"""Arguments for score terms that no kernel here supports: attention sinks (GPT-OSS), relative positions (T5)."""


@dataclass(frozen=True)
class PackedLengths:
    """The lengths of packed sequences, on the host.

    This is an object and not a tuple, because torch.compile would compile a new graph for every length of a tuple.

    Attributes:
        tokens: S integers, number of tokens stored for each sequence.
        paths: the paths along which the tokens attend; None if sequences share no tokens.
    """

    tokens: tuple[int, ...]
    paths: Paths | None = None


def varlen_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    packed_lengths: PackedLengths | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute causal attention within each packed sequence, with the signature of ``transformers.AttentionInterface``.

    Args:
        module: the attention layer.
        query: (1, H, T, d).
        key: (1, H_kv, T, d); H is a multiple of H_kv.
        value: (1, H_kv, T, d).
        attention_mask: mask of an ordinary batch; ignored for packed batches, whose lengths define the mask.
        dropout: dropout probability during training.
        scaling: factor for the scores; None is 1/√d.
        sliding_window: number of tokens to which a token attends, including itself; None is all tokens up to itself.
        softcap: c in c · tanh(score / c); None applies no soft-cap.
        packed_lengths: lengths of the packed sequences, on the host; None for an ordinary batch.
        cu_seq_lens_q: (S + 1,) int32 cumulative sums of these lengths, on the device.
        **kwargs: further arguments of transformers' attention functions.

    Returns:
        The output (1, T, H, d), and None instead of the attention weights.

    Raises:
        ValueError: if the layer uses a score term that no kernel here supports, or the lengths do not match the query.
    """
    for name in UNKNOWN_TERMS:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{NAME!r} attention: expected no {name}, got one from {type(module).__name__}; use the model's own "
                "attention, which `fuse(model)` selects automatically"
            )
    if packed_lengths is None:
        if softcap is not None:
            return _soft_capped_batch(module, query, key, value, attention_mask, dropout, scaling, softcap), None
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    return _packed_attention(
        query,
        key,
        value,
        packed_lengths,
        cu_seq_lens_q,
        dropout=dropout,
        scaling=scaling,
        sliding_window=sliding_window,
        softcap=softcap,
    ), None


# Excluded from torch.compile, which would compile a new graph for the lengths of every batch.
@uncompiled
def _packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed_lengths: PackedLengths,
    cu_seq_lens_q: Tensor | None,
    *,
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    lengths = packed_lengths.tokens
    if cu_seq_lens_q is None or query.shape[0] != 1 or sum(lengths) != query.shape[2]:
        raise ValueError(
            f"{NAME!r} attention: expected one row of {sum(lengths)} tokens, as in packed_lengths, and cu_seq_lens_q, "
            f"got query of shape {tuple(query.shape)} and cu_seq_lens_q of shape "
            f"{None if cu_seq_lens_q is None else tuple(cu_seq_lens_q.shape)}; call with packed_arguments(model, batch)"
        )
    query, key, value = _autocast(query, key, value)
    paths = packed_lengths.paths
    key_lengths, cu_keys = (lengths, cu_seq_lens_q) if paths is None else (paths.lengths, paths.cu_lengths)
    longest, longest_keys = max(lengths), max(key_lengths)
    window = None if sliding_window is None or sliding_window >= longest_keys else sliding_window
    call = AttentionCall(
        device=query.device.type,
        capability=torch.cuda.get_device_capability(query.device) if query.is_cuda else (0, 0),
        dtype=query.dtype,
        head_dim=query.shape[3],
        value_dim=value.shape[3],
        scale=scaling,
        window=window,
        softcap=softcap,
        dropout=dropout,
    )
    kernel = choose_kernel(call, _installed(query.device))
    if paths is not None:
        dtype = working_dtype(query) if kernel == "segments" else key.dtype
        key, value = (paths.gather(states, dtype) for states in (key, value))  # (1, H_kv, E, d)
    if kernel == "segments":
        return segment_attention(
            query,
            key,
            value,
            lengths,
            key_lengths=key_lengths,
            scale=scaling,
            window=window,
            softcap=softcap,
            dropout=dropout,
        )
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))  # (T, H, d), (E, H_kv, d)
    if kernel == "flash_attn":
        out = flash_attn.flash_attention(
            query,
            key,
            value,
            cu_seq_lens_q,
            longest,
            cu_keys=cu_keys,
            longest_keys=longest_keys,
            scale=scaling,
            window=window,
            softcap=softcap,
            dropout=dropout,
        )
    else:
        out = torch_varlen.torch_varlen_attention(
            query,
            key,
            value,
            cu_seq_lens_q,
            longest,
            cu_keys=cu_keys,
            longest_keys=longest_keys,
            scale=scaling,
            window=window,
        )
    return out[None]


def _autocast(*states: Tensor) -> tuple[Tensor, ...]:
    """Cast to the autocast dtype, as autocast does for SDPA; it does not cast for the other kernels."""
    kind = states[0].device.type
    if not torch.is_autocast_enabled(kind):
        return states
    return tuple(x.to(torch.get_autocast_dtype(kind)) for x in states)


def _installed(device: torch.device) -> Installed:
    if device.type != "cuda":
        return Installed()
    varlen = torch_varlen.load()
    return Installed(
        flash_attn=flash_attn.load() is not None,
        torch_varlen=frozenset() if varlen is None else varlen.parameters,
    )


def _soft_capped_batch(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float,
) -> Tensor:
    """Compute soft-capped attention (B, n, H, d) for an ordinary batch; no mask means the same as for SDPA."""
    n, m = query.shape[2], key.shape[2]
    if attention_mask is None:
        mask = torch.ones(n, m, dtype=torch.bool, device=query.device)
        if n > 1 and getattr(module, "is_causal", True):
            mask = mask.tril()
    else:
        mask = attention_mask[..., :m]
    out = soft_capped_attention(query, key, value, mask, softcap, scale=scaling, dropout=dropout)
    return out.transpose(1, 2).contiguous()


def hands_windows_on(model: PreTrainedModel) -> bool:
    """Return whether the code of every attention layer passes its window to the attention function.

    True if the configuration has no window. The check reads the source, because the argument is optional.
    """
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if not ("sliding_attention" in kinds if kinds else getattr(config, "sliding_window", None)):
        return True
    return all("sliding_window" in code for code in _attention_code(model))


def hands_packs_on(model: PreTrainedModel) -> bool:
    """Return whether the code of every attention layer passes its keyword arguments on, and no unsupported score term.

    The check reads the source of the layers' forward methods.
    """
    calls = [code.rpartition("attention_interface(")[2] for code in _attention_code(model)]
    around = _sources({type(module) for module in model.modules() if hasattr(module, "self_attn")})
    if not all("**kwargs" in code.rpartition("self.self_attn(")[2].partition("\n        )")[0] for code in around):
        return False  # Nemotron's layers do not pass keyword arguments to their attention
    return bool(calls) and all("**kwargs" in c and not any(name in c for name in UNKNOWN_TERMS) for c in calls)


def _attention_code(model: PreTrainedModel) -> list[str]:
    """Return the source of the forward methods that call the attention interface."""
    sources = _sources({type(module) for module in model.modules() if hasattr(module, "layer_idx")})
    return [code for code in sources if "attention_interface(" in code]


def _sources(kinds: set[type[torch.nn.Module]]) -> list[str]:
    """Return the source of the classes' forward methods; classes without source are left out."""
    found = []
    for kind in kinds:
        with suppress(OSError, TypeError):  # defined in an interactive session, or not in Python
            found.append(inspect.getsource(kind.forward))
    return found


@uncompiled
def packed_arguments(model: PreTrainedModel, batch: PackedBatch, decoder: Any = None) -> dict[str, Any]:
    """Return the keyword arguments for a forward pass of ``model``'s decoder on a packed batch.

    Args:
        model: a transformers model, without wrappers.
        batch: the packed batch.
        decoder: the decoder. If its forward has no ``**kwargs``, arguments that it does not name are left out. None
            returns all arguments.

    Raises:
        ValueError: if sequences of the batch share tokens, and the attention implementation does not support that.
    """
    longest = max(batch.segment_lengths)
    own = model.config._attn_implementation == NAME  # noqa: SLF001 - there is no public attribute
    if batch.shared and not own:
        raise ValueError(
            f"`batch`: expected {NAME!r} attention for sequences that share tokens, got "
            f"{model.config._attn_implementation!r}; use batch.unshared()"  # noqa: SLF001
        )
    arguments: dict[str, Any] = {
        "input_ids": batch.input_ids[None],
        "position_ids": batch.position_ids[None],
        "use_cache": False,
        # Names of transformers' FlashAttention; other implementations derive the packing from position_ids.
        "cu_seq_lens_q": batch.cu_seqlens,
        "cu_seq_lens_k": batch.cu_seqlens,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    if own:
        # transformers passes a 4-D mask on unchanged; given an empty one, it does not build a (T, T) mask.
        arguments["attention_mask"] = batch.input_ids.new_empty(1, 1, 0, 0)
        paths = Paths.of(batch) if batch.shared else None
        arguments["packed_lengths"] = PackedLengths(batch.segment_lengths, paths)
    names = None if decoder is None else _named(type(decoder).forward)
    return arguments if names is None else {name: value for name, value in arguments.items() if name in names}


@functools.cache
def _named(function: Callable[..., Any]) -> frozenset[str] | None:
    """Return the names of a function's parameters, or None if it has ``**kwargs``."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return frozenset(parameter.name for parameter in parameters)


AttentionInterface.register(NAME, varlen_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
