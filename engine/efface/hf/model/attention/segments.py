"""Packed attention on any device: torch's SDPA, one sequence after another."""

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
    """Causal attention (1, T, H, d) within each sequence of query (1, H, T, d), key and value (1, H_kv, E, d).

    With ``key_lengths`` a sequence's queries are those of the last of its keys.
    A sequence's result does not depend on its neighbours, bit for bit. On a GPU, where this is the last resort, SDPA's
    backward repeats itself only under ``torch.use_deterministic_algorithms(True)``.

    Args:
        query: any floating dtype.
        key: as query.
        value: as query.
        lengths: the tokens of each sequence.
        key_lengths: its keys, where they are more than its queries; None is ``lengths``.
        scale: factor of the scores; None is 1/√d.
        window: tokens that a token sees, itself among them.
        softcap: c in c · tanh(score / c).
        dropout: probability.
    """
    key_lengths = lengths if key_lengths is None else key_lengths
    if query.device.type == "cpu" and query.dtype in {torch.float16, torch.bfloat16}:
        # SDPA's backward is slow in bf16 on CPUs: in fp32, casts included, forward and backward together took 0.48 to
        # 0.78 of the time (16 to 150 sequences of 20 to 140 tokens, a core of an EPYC 9004, 2026-11-21). It also
        # rounds less.
        with torch.autocast("cpu", enabled=False):
            query, key, value, dtype = query.float(), key.float(), value.float(), query.dtype
            out = _by_segment(query, key, value, lengths, key_lengths, scale, window, softcap, dropout)
        return out.to(dtype)
    return _by_segment(query, key, value, lengths, key_lengths, scale, window, softcap, dropout)


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
    # batching those of like length, padded to 16 tokens, took 0.92 to 1.33: the time is in the kernel, not in calls.
    grouped = query.shape[1] != key.shape[1]
    # split's backward is one concatenation; slices would each write a gradient of the whole pack.
    parts = zip(
        query.split(lengths, dim=2), key.split(key_lengths, dim=2), value.split(key_lengths, dim=2), strict=True
    )
    outputs = []
    for q, k, v in parts:
        n, m = q.shape[2], k.shape[2]
        # SDPA aligns its own triangle to the first query and the first key.
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
    """(n, m) bool: which of m keys the last n tokens see, all up to themselves or the last ``window`` of those."""
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
    """softmax(c · tanh(q kᵀ · scale / c)) v, which SDPA does not have (Gemma-2, arXiv:2408.00118, section 2).

    Args:
        query: (B, H, n, d).
        key: (B, H_kv, m, d).
        value: (B, H_kv, m, d).
        mask: bool, true where a score counts, or the number to add to it; broadcast to (B, 1, n, m).
        softcap: c.
        scale: None is 1/√d.
        dropout: probability.

    Returns:
        (B, H, n, d), computed in the dtype of query, the softmax in fp32.
    """
    batch, heads, n, dim = query.shape
    key_heads = key.shape[1]
    # The heads of a group stand under each other as rows, so that their key head is read, not copied.
    rows = query.reshape(batch, key_heads, -1, dim)  # (B, H_kv, H/H_kv · n, d)
    scores = rows @ key.transpose(2, 3) * (dim**-0.5 if scale is None else scale)
    scores = (torch.tanh(scores / softcap) * softcap).view(batch, heads, n, -1)
    # Not −∞: a padded row, which may see nothing, would become NaN.
    nothing = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~mask, nothing) if mask.dtype == torch.bool else scores + mask
    weights = drop(scores.softmax(-1, dtype=torch.float32).to(query.dtype), p=dropout)
    return (weights.view(batch, key_heads, -1, key.shape[2]) @ value).view(batch, heads, n, -1)
