"""Attention over packed batches, registered with transformers as ``efface_varlen``.

Each sequence attends to itself alone, so the cost is Σ n² and never T². Without packed keyword arguments (generation,
padded batches) it is transformers' own SDPA attention.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from efface.batching import PackedBatch

NAME = "efface_varlen"


def varlen_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed_lengths: tuple[int, ...] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each packed sequence; the signature is that of ``transformers.AttentionInterface``.

    Args:
        module: the attention layer.
        query: (1, H, T, d).
        key: (1, H_kv, T, d); H a multiple of H_kv.
        value: (1, H_kv, T, d).
        attention_mask: ignored for packed batches, whose borders say everything.
        dropout: probability, during training.
        scaling: factor of the scores; None is 1/√d.
        packed_lengths: the tokens of each sequence, on the host; None is an ordinary batch.
        **kwargs: transformers' own; ``sliding_window`` is honoured, ``softcap`` refused.

    Returns:
        (1, T, H, d), and None for the weights.
    """
    if kwargs.get("softcap") is not None:
        raise ValueError(f"{NAME!r} attention does not soft-cap its scores; load the model with 'eager' attention")
    if packed_lengths is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    window: int | None = kwargs.get("sliding_window")
    grouped = query.shape[1] != key.shape[1]
    # split's backward is one concatenation; slices would each write a gradient of the whole pack.
    parts = zip(*(states.split(packed_lengths, dim=2) for states in (query, key, value)), strict=True)
    outputs = []
    for q, k, v in parts:
        n = q.shape[2]
        band = None if window is None or n <= window else _band(n, window, q.device)
        outputs.append(
            scaled_dot_product_attention(
                q, k, v, attn_mask=band, dropout_p=dropout, is_causal=band is None, scale=scaling, enable_gqa=grouped
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _band(n: int, window: int, device: torch.device) -> Tensor:
    """(n, n) bool: the causal triangle, ``window`` wide."""
    return torch.ones(n, n, dtype=torch.bool, device=device).tril().triu(1 - window)


def use_packed_attention(model: PreTrainedModel) -> None:
    """Switch ``model`` to packed attention; a model that soft-caps its scores (Gemma-2) keeps its own.

    Any implementation of transformers is exact on packs. Those that build a (T, T) mask cost T² instead of Σ n².
    """
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is None:
        model.set_attn_implementation(NAME)


def packed_arguments(model: PreTrainedModel, batch: PackedBatch) -> dict[str, Any]:
    """Return the keyword arguments with which ``model``'s decoder reads a packed batch."""
    longest = max(batch.lengths)
    arguments: dict[str, Any] = {
        "input_ids": batch.input_ids[None],
        "position_ids": batch.position_ids[None],
        "use_cache": False,
        # FlashAttention's names; other implementations see the packing in position_ids.
        "cu_seq_lens_q": batch.cu_seqlens,
        "cu_seq_lens_k": batch.cu_seqlens,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    if model.config._attn_implementation == NAME:  # noqa: SLF001 - the only place that knows the choice
        # A 4-D mask is handed through as it is: with an empty one, transformers does not build its own (T, T).
        arguments["attention_mask"] = batch.input_ids.new_empty(1, 1, 0, 0)
        arguments["packed_lengths"] = batch.lengths
    return arguments


AttentionInterface.register(NAME, varlen_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
