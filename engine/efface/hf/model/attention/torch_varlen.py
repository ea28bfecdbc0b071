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
    """torch's ``varlen_attn`` with its version-dependent parameter names and the option that returns the logsumexp."""

    kernel: Callable[..., tuple[Tensor, Tensor]]
    parameters: frozenset[str]
    with_logsumexp: Any


@functools.cache
def load() -> Varlen | None:
    """Return torch's packed attention, or None if this torch does not have it."""
    try:
        module = importlib.import_module("torch.nn.attention.varlen")
    except ModuleNotFoundError:
        return None
    parameters = frozenset(inspect.signature(module.varlen_attn).parameters)
    return Varlen(module.varlen_attn, parameters, module.AuxRequest(lse=True))


@contextmanager
def _deterministic() -> Iterator[None]:
    """Run the block with torch's deterministic algorithms; the process-wide setting is restored afterwards."""
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    switches: Any = torch.utils.deterministic
    filling = switches.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    switches.fill_uninitialized_memory = False  # filling with NaN would cost a pass over every gradient
    try:
        yield
    finally:
        switches.fill_uninitialized_memory = filling
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


class _Varlen(torch.autograd.Function):
    """``varlen_attn`` with a backward pass that is deterministic, bit for bit.

    torch sums the query gradient with atomics unless deterministic algorithms are enabled when the backward kernel is
    launched. ``varlen_attn`` has no argument for that, so this class launches the backward kernel itself.
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
        options: dict[str, Any] = {"is_causal": True}  # torch 2.10 has no other options
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
            dq, dk, dv = torch.ops.aten._flash_attention_backward(  # noqa: SLF001 - varlen_attn calls the same op
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
    """Compute causal attention (T, H, d) within each sequence.

    With ``cu_keys``, a sequence can have more keys than queries; its queries then belong to the last of its keys, as in
    FlashAttention-2, whose kernel torch uses.

    Args:
        query: (T, H, d) fp16 or bf16, on a GPU; d is a multiple of 8.
        key: (E, H_kv, d), dtype and device as query.
        value: (E, H_kv, d), dtype and device as query.
        cu_seqlens: (S + 1,) int32 cumulative numbers of queries.
        longest: number of queries of the longest sequence.
        cu_keys: (S + 1,) int32 cumulative numbers of keys; None is ``cu_seqlens``.
        longest_keys: largest number of keys of a sequence; None is ``longest``.
        scale: factor for the scores; None is 1/√d. torch 2.10 supports only None.
        window: number of tokens to which a token attends, including itself; None is all tokens up to itself. torch 2.10
            supports only None.

    Raises:
        RuntimeError: if torch is older than 2.10.
    """
    group = query.shape[1] // key.shape[1]
    if group > 1 and "enable_gqa" not in _loaded().parameters:
        key, value = (states.repeat_interleave(group, dim=1) for states in (key, value))  # (E, H, d)
    # torch counts tokens to the left, without the token itself; -1 is all of them.
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
