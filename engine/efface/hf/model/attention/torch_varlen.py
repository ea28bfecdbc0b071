"""Packed attention through torch's own FlashAttention-2 kernel, ``torch.nn.attention.varlen`` (torch ≥ 2.10)."""

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Varlen:
    """What torch has: ``varlen_attn``, the names of its parameters, which grew with torch, and how lse is asked for."""

    kernel: Callable[..., tuple[Tensor, Tensor]]
    parameters: frozenset[str]
    with_logsumexp: Any


@functools.cache
def load() -> Varlen | None:
    """Return torch's packed attention; None where torch has none."""
    try:
        module = importlib.import_module("torch.nn.attention.varlen")
    except ModuleNotFoundError:
        return None
    parameters = frozenset(inspect.signature(module.varlen_attn).parameters)
    return Varlen(module.varlen_attn, parameters, module.AuxRequest(lse=True))


@contextmanager
def _deterministic() -> Iterator[None]:
    """Within, torch's kernels add in a fixed order; the switch is the process's, so it is put back."""
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    switches: Any = torch.utils.deterministic
    filling = switches.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    switches.fill_uninitialized_memory = False  # with NaN: a pass over every gradient
    try:
        yield
    finally:
        switches.fill_uninitialized_memory = filling
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


class _Varlen(torch.autograd.Function):
    """``varlen_attn`` with a backward pass that repeats bit for bit.

    torch sums the query gradient by atomics unless told otherwise while the backward kernel is launched, and there
    is no argument for it; so the backward is launched here.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens: Tensor,
        longest: int,
        cu_keys: Tensor,
        longest_keys: int,
        scale: float | None,
        window_size: tuple[int, int],
    ) -> Tensor:
        varlen = _loaded()
        options: dict[str, Any] = {"is_causal": True}  # torch 2.10, which has no other options
        if "window_size" in varlen.parameters:
            options = {"window_size": window_size, "scale": scale}
        if "enable_gqa" in varlen.parameters:
            options["enable_gqa"] = query.shape[1] != key.shape[1]
        out, logsumexp = varlen.kernel(
            query,
            key,
            value,
            cu_seqlens,
            cu_keys,
            longest,
            longest_keys,
            return_aux=varlen.with_logsumexp,
            **options,
        )
        ctx.save_for_backward(query, key, value, out, logsumexp, cu_seqlens, cu_keys)
        ctx.longest, ctx.longest_keys, ctx.scale, ctx.window_size = longest, longest_keys, scale, window_size
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, logsumexp, cu_seqlens, cu_keys = ctx.saved_tensors
        no_dropout_state = torch.zeros(2, dtype=torch.uint64, device=query.device)
        left, right = ctx.window_size
        with _deterministic():
            dq, dk, dv = torch.ops.aten._flash_attention_backward(  # noqa: SLF001 - what varlen_attn itself calls
                grad_out,
                query,
                key,
                value,
                out,
                logsumexp,
                cu_seqlens,
                cu_keys,
                ctx.longest,
                ctx.longest_keys,
                0.0,
                ctx.window_size == (-1, 0),
                no_dropout_state,
                query.new_empty(0),
                scale=ctx.scale,
                window_size_left=left,
                window_size_right=right,
            )
        return dq, dk, dv, None, None, None, None, None, None


def torch_varlen_attention(
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
) -> Tensor:
    """Causal attention (T, H, d) within each sequence of query (T, H, d), key and value (E, H_kv, d).

    With ``cu_keys`` a sequence's queries are those of the last of its keys: torch's kernel is FlashAttention-2's.

    Args:
        query: fp16 or bf16, on a GPU; d a multiple of 8.
        key: as query.
        value: as query.
        cu_seqlens: (S + 1,) int32.
        longest: tokens of the longest sequence.
        cu_keys: (S + 1,) int32, where keys are more than queries; None is ``cu_seqlens``.
        longest_keys: the most keys of a sequence; None is ``longest``.
        scale: factor of the scores; None is 1/√d. torch 2.10 takes None alone.
        window: tokens that a token sees, itself among them; torch 2.10 takes None alone.
    """
    group = query.shape[1] // key.shape[1]
    if group > 1 and "enable_gqa" not in _loaded().parameters:
        key, value = (states.repeat_interleave(group, dim=1) for states in (key, value))  # (E, H, d)
    # Counted in tokens to the left, without the token itself; -1 is all of them.
    window_size = (-1 if window is None else window - 1, 0)
    cu_keys = cu_seqlens if cu_keys is None else cu_keys
    longest_keys = longest if longest_keys is None else longest_keys
    out: Tensor = _Varlen.apply(  # type: ignore[no-untyped-call]
        query, key, value, cu_seqlens, longest, cu_keys, longest_keys, scale, window_size
    )
    return out


def _loaded() -> Varlen:
    varlen = load()
    if varlen is None:
        raise RuntimeError(
            f"torch_varlen_attention: expected torch 2.10 or later, got {torch.__version__}; upgrade torch"
        )
    return varlen
