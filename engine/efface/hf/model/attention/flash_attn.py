"""Packed attention through the flash-attn package (FlashAttention-2)."""

import functools
import importlib
import warnings
from collections.abc import Callable

from torch import Tensor


@functools.cache
def load() -> Callable[..., Tensor] | None:
    """Return flash-attn's function for packed batches, or None if the package is missing or fails to load."""
    try:
        kernel: Callable[..., Tensor] = importlib.import_module("flash_attn").flash_attn_varlen_func
    except ModuleNotFoundError as error:
        if error.name == "flash_attn":
            return None
        reason = str(error)
    except ImportError as error:  # an undefined symbol, if it was built for another torch
        reason = str(error)
    else:
        return kernel
    warnings.warn(
        f"flash-attn is installed but fails to load ({reason}), so packed attention does not use it; rebuild it for "
        "this torch, or uninstall it",
        stacklevel=2,
    )
    return None


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    *,
    cu_keys: Tensor | None = None,
    longest_keys: int | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Compute causal attention (T, H, d) within each sequence.

    With ``cu_keys``, a sequence can have more keys than queries; its queries then belong to the last of its keys.

    Args:
        query: (T, H, d) fp16 or bf16, on a GPU.
        key: (E, H_kv, d), dtype and device as query.
        value: (E, H_kv, d), dtype and device as query.
        cu_seqlens: (S + 1,) int32 cumulative numbers of queries.
        longest: number of queries of the longest sequence.
        cu_keys: (S + 1,) int32 cumulative numbers of keys; None is ``cu_seqlens``.
        longest_keys: largest number of keys of a sequence; None is ``longest``.
        scale: factor for the scores; None is 1/√d.
        window: number of tokens to which a token attends, including itself; None is all tokens up to itself.
        softcap: c in c · tanh(score / c); None applies no soft-cap.
        dropout: dropout probability.

    Raises:
        RuntimeError: if flash-attn is not installed or fails to load.
    """
    kernel = load()
    if kernel is None:
        raise RuntimeError("flash_attention: expected the flash-attn package, got none; install efface[flash]")
    return kernel(
        query,
        key,
        value,
        cu_seqlens,
        cu_seqlens if cu_keys is None else cu_keys,
        longest,
        longest if longest_keys is None else longest_keys,
        dropout_p=dropout,
        softmax_scale=scale,
        causal=True,  # since flash-attn 2.1, aligned to the last query and the last key
        # flash-attn counts tokens to the left, without the token itself.
        window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=softcap or 0.0,
        # Otherwise the query gradient is summed with atomics, in a different order each time.
        deterministic=True,
    )
