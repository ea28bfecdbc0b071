"""Packed attention through the flash-attn package (FlashAttention-2)."""

import functools
import importlib
import warnings
from collections.abc import Callable

from torch import Tensor


@functools.cache
def load() -> Callable[..., Tensor] | None:
    """Return flash-attn's function for packed batches, or None where the package is absent or does not load."""
    try:
        kernel: Callable[..., Tensor] = importlib.import_module("flash_attn").flash_attn_varlen_func
    except ModuleNotFoundError as error:
        if error.name == "flash_attn":
            return None
        reason = str(error)
    except ImportError as error:  # built for another torch: an undefined symbol
        reason = str(error)
    else:
        return kernel
    warnings.warn(
        f"flash-attn is installed but does not load ({reason}); packed attention goes without it. Rebuild it for "
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
    """Causal attention (T, H, d) within each sequence of query (T, H, d), key and value (E, H_kv, d).

    With ``cu_keys`` a sequence's queries are those of the last of its keys.

    Args:
        query: fp16 or bf16, on a GPU.
        key: as query.
        value: as query.
        cu_seqlens: (S + 1,) int32.
        longest: tokens of the longest sequence.
        cu_keys: (S + 1,) int32, where keys are more than queries; None is ``cu_seqlens``.
        longest_keys: the most keys of a sequence; None is ``longest``.
        scale: factor of the scores; None is 1/√d.
        window: tokens that a token sees, itself among them.
        softcap: c in c · tanh(score / c).
        dropout: probability.
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
        causal=True,  # aligned to the last query and the last key, since 2.1
        # Counted in tokens to the left, without the token itself.
        window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=softcap or 0.0,
        # Otherwise the query gradient is summed by atomics, in an order of its own each time.
        deterministic=True,
    )
