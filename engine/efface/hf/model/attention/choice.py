"""Which kernel serves an attention call: a pure function of what is asked and what is installed."""

from dataclasses import dataclass
from typing import Literal

import torch

Kernel = Literal["flash_attn", "torch_varlen", "segments"]

MAXIMUM_HEAD_DIM = 256  # of both FlashAttention-2 builds


@dataclass(frozen=True)
class AttentionCall:
    """What one call asks for.

    Attributes:
        device: its type, ``"cuda"`` or another.
        capability: compute capability of the GPU; (0, 0) elsewhere.
        dtype: of query, key and value.
        head_dim: of query and key.
        value_dim: of value.
        scale: factor of the scores; None is 1/√head_dim.
        window: tokens that a token sees, itself among them; None where it sees all before it.
        softcap: bound of the scores, or None.
        dropout: probability.
    """

    device: str
    capability: tuple[int, int]
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    dropout: float = 0.0


@dataclass(frozen=True)
class Installed:
    """What is at hand.

    Attributes:
        flash_attn: whether flash-attn can be imported.
        torch_varlen: the parameters of torch's ``varlen_attn``; empty where torch has none.
    """

    flash_attn: bool = False
    torch_varlen: frozenset[str] = frozenset()


def choose_kernel(call: AttentionCall, installed: Installed) -> Kernel:
    """Return the kernel that serves ``call``: the fastest of those that compute all it asks for."""
    if not _on_tensor_cores(call):
        return "segments"
    # flash-attn has soft-capping and dropout, but refuses the two together.
    if installed.flash_attn and not (call.softcap and call.dropout):
        return "flash_attn"
    if _torch_serves(call, installed.torch_varlen):
        return "torch_varlen"
    return "segments"


def _on_tensor_cores(call: AttentionCall) -> bool:
    """What every FlashAttention-2 kernel needs."""
    return (
        call.device == "cuda"
        and call.capability >= (8, 0)
        and call.dtype in {torch.float16, torch.bfloat16}
        and call.head_dim == call.value_dim <= MAXIMUM_HEAD_DIM
    )


def _torch_serves(call: AttentionCall, parameters: frozenset[str]) -> bool:
    # flash-attn pads a head_dim that 8 does not divide; torch refuses it.
    if not parameters or call.softcap or call.dropout or call.head_dim % 8:
        return False
    # torch 2.10 has neither argument, 2.11 both.
    default_scale = call.scale in {None, call.head_dim**-0.5}
    return (call.window is None or "window_size" in parameters) and (default_scale or "scale" in parameters)
