"""Kernel selection for attention calls: a pure function of the call and the installed kernels."""

from dataclasses import dataclass
from typing import Literal

import torch

Kernel = Literal["flash_attn", "torch_varlen", "segments"]

MAXIMUM_HEAD_DIM = 256  # limit of both FlashAttention-2 builds, flash-attn's and torch's


@dataclass(frozen=True)
class AttentionCall:
    """The properties of one attention call on which the kernel selection depends.

    Attributes:
        device: device type, such as ``"cuda"``.
        capability: compute capability of the GPU; (0, 0) on other devices.
        dtype: dtype of query, key and value.
        head_dim: head dimension of query and key.
        value_dim: head dimension of value.
        scale: factor for the scores; None is 1/√head_dim.
        window: number of tokens to which a token attends, including itself; None is all tokens up to itself.
        softcap: soft-cap of the scores, or None.
        dropout: dropout probability.
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
    """The installed kernels.

    Attributes:
        flash_attn: whether flash-attn can be imported.
        torch_varlen: names of the parameters of torch's ``varlen_attn``; empty if torch does not have the function.
    """

    flash_attn: bool = False
    torch_varlen: frozenset[str] = frozenset()


def choose_kernel(call: AttentionCall, installed: Installed) -> Kernel:
    """Return the fastest kernel that supports everything that ``call`` needs."""
    if not _on_tensor_cores(call):
        return "segments"
    # flash-attn supports soft-capping and dropout, but not both in one call.
    if installed.flash_attn and not (call.softcap and call.dropout):
        return "flash_attn"
    if _torch_serves(call, installed.torch_varlen):
        return "torch_varlen"
    return "segments"


def _on_tensor_cores(call: AttentionCall) -> bool:
    """Return whether the call meets the requirements of every FlashAttention-2 kernel."""
    return (
        call.device == "cuda"
        and call.capability >= (8, 0)
        and call.dtype in {torch.float16, torch.bfloat16}
        and call.head_dim == call.value_dim <= MAXIMUM_HEAD_DIM
    )


def _torch_serves(call: AttentionCall, parameters: frozenset[str]) -> bool:
    # torch requires that 8 divides head_dim; flash-attn pads other values.
    if not parameters or call.softcap or call.dropout or call.head_dim % 8:
        return False
    # torch 2.10 has neither the window_size nor the scale argument; torch 2.11 has both.
    default_scale = call.scale in {None, call.head_dim**-0.5}
    return (call.window is None or "window_size" in parameters) and (default_scale or "scale" in parameters)
