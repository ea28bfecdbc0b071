"""Packed attention on any device: torch's SDPA, called for one sequence at a time."""

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention


def segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    *,
    key_lengths: tuple[int, ...] | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Compute causal attention (1, T, H, d) within each sequence.

    With ``key_lengths``, a sequence can have more keys than queries; its queries then belong to the last of its keys.
    The result of a sequence does not depend on the other sequences, bit for bit. On a GPU, where this function is the
    fallback, SDPA's backward pass is deterministic only under ``torch.use_deterministic_algorithms(True)``.

    Args:
        query: (1, H, T, d), any floating dtype.
        key: (1, H_kv, E, d), dtype as query, or ``working_dtype(query)``.
        value: (1, H_kv, E, d), dtype as key.
        lengths: number of queries of each sequence.
        key_lengths: number of keys of each sequence; None is ``lengths``.
        scale: factor for the scores; None is 1/√d.
        window: number of tokens to which a token attends, including itself; None is all tokens up to itself.
        softcap: c in c · tanh(score / c); None applies no soft-cap.
        dropout: dropout probability.
    """
    key_lengths = lengths if key_lengths is None else key_lengths
    dtype = query.dtype
    if (wide := working_dtype(query)) == dtype:
        return _by_segment(query, key, value, lengths, key_lengths, scale, window, softcap, dropout)
    with torch.autocast(query.device.type, enabled=False):
        query, key, value = query.to(wide), key.to(wide), value.to(wide)
        out = _by_segment(query, key, value, lengths, key_lengths, scale, window, softcap, dropout)
    return out.to(dtype)


def working_dtype(query: Tensor) -> torch.dtype:
    """Return the dtype in which ``segment_attention`` computes; keys and values can have it already.

    SDPA's backward pass is slow in bf16 on CPUs. In fp32, casts included, forward and backward together took 0.48 to
    0.78 of the time (16 to 150 sequences of 20 to 140 tokens, one core of an EPYC 9004, 2026-11-21). fp32 also rounds
    less.
    """
    half = query.dtype in {torch.float16, torch.bfloat16}
    return torch.float32 if half and query.device.type == "cpu" else query.dtype


def _by_segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    key_lengths: tuple[int, ...],
    scale: float | None,
    window: int | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    # enable_gqa, because repeating keys and values took 1.03 to 1.41 times as long. One sequence at a time, because
    # batches of sequences of similar length, padded to 16 tokens, took 0.92 to 1.33 times as long: the time is spent
    # in the kernel, not in the calls.
    grouped = query.shape[1] != key.shape[1]
    # The backward pass of split is one concatenation; that of each slice would write a gradient for the whole batch.
    parts = zip(
        query.split(lengths, dim=2), key.split(key_lengths, dim=2), value.split(key_lengths, dim=2), strict=True
    )
    outputs = []
    for q, k, v in parts:
        n, m = q.shape[2], k.shape[2]
        # SDPA's is_causal aligns the mask to the first query and the first key, so n != m needs an explicit mask.
        banded = n != m or (window is not None and n > window)
        if softcap is not None:
            out = soft_capped_attention(q, k, v, band(n, m, window, q.device), softcap, scale=scale, dropout=dropout)
        else:
            mask = band(n, m, window, q.device) if banded else None
            out = scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=not banded, scale=scale, enable_gqa=grouped
            )
        outputs.append(out)
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def band(n: int, m: int, window: int | None, device: torch.device) -> Tensor:
    """Return the (n, m) bool mask of the keys to which the last n of m tokens attend.

    A token attends to all tokens up to itself, or to the last ``window`` of these.
    """
    triangle = torch.ones(n, m, dtype=torch.bool, device=device).tril(m - n)
    return triangle if window is None else triangle.triu(m - n + 1 - window)


def soft_capped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    softcap: float,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Compute softmax(c · tanh(q kᵀ · scale / c)) v, which SDPA does not have (Gemma-2, arXiv:2408.00118, section 2).

    Args:
        query: (B, H, n, d).
        key: (B, H_kv, m, d).
        value: (B, H_kv, m, d).
        mask: bool, true for scores that are kept, or floats that are added to the scores; broadcast to (B, 1, n, m).
        softcap: c.
        scale: factor for the scores; None is 1/√d.
        dropout: dropout probability.

    Returns:
        (B, H, n, d), computed in the dtype of query, with the softmax in fp32.
    """
    batch, heads, n, dim = query.shape
    key_heads = key.shape[1]
    # The query heads of a group become rows of one matrix, so that their common key head need not be repeated.
    rows = query.reshape(batch, key_heads, -1, dim)  # (B, H_kv, H/H_kv · n, d)
    scores = rows @ key.transpose(2, 3) * (dim**-0.5 if scale is None else scale)
    scores = (torch.tanh(scores / softcap) * softcap).view(batch, heads, n, -1)
    # Not −∞: the softmax of a padding row, in which every score can be masked, would be NaN.
    nothing = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~mask, nothing) if mask.dtype == torch.bool else scores + mask
    weights = drop(scores.softmax(-1, dtype=torch.float32).to(query.dtype), p=dropout)
    return (weights.view(batch, key_heads, -1, key.shape[2]) @ value).view(batch, heads, n, -1)
