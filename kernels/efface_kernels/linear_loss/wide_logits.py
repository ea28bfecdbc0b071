"""Logits with more precision than half precision, for losses that compare two distributions."""

import functools

import torch
from torch import Tensor

from efface_kernels.linear_loss.head import Head
from efface_kernels.logits import Logits, accumulation_dtype
from efface_kernels.memory import BufferPool


class WideLogits:
    """A model's logits in fp32 (fp64), or as a pair of bf16 matrices, computed piece by piece in one workspace.

    The pair is the rounded logits and the residual, their rounding error. It takes as much memory as fp32 logits and
    has 17 significant bits instead of fp32's 24. Two bf16 GEMMs compute it, on CPUs where bf16 GEMMs are faster than
    fp32: the second one subtracts the rounded logits in fp32 and then rounds the difference to bf16.
    """

    def __init__(self, hidden: Tensor, head: Head, pool: BufferPool, largest: int, *, pairs: bool) -> None:
        """``pairs``: whether the pass that reads the logits supports a residual."""
        rows, device = min(largest, hidden.shape[0]), hidden.device
        self._hidden, self._residuals = hidden, None
        if pairs and _makes_residuals(hidden, head):
            both = pool.matrix(2 * rows, head.vocabulary, hidden.dtype, device)
            self._head, self._workspace, self._residuals = head, both[:rows], both[rows:]
        else:
            dtype = accumulation_dtype(hidden.dtype)
            self._head = head.writing(dtype)
            self._workspace = pool.matrix(rows, head.vocabulary, dtype, device)

    def __call__(self, rows: slice) -> Logits:
        """Return the logits of these rows, valid until the next call."""
        hidden = self._hidden[rows].to(self._head.weight.dtype)
        values = self._head.logits(hidden, self._workspace)
        residual = None if self._residuals is None else self._head.residual(hidden, values, self._residuals)
        return Logits(values, self._head.softcap, residual)


def _makes_residuals(hidden: Tensor, head: Head) -> bool:
    """Return whether this machine should compute this head's logits with two bf16 GEMMs.

    oneDNN runs bf16 GEMMs only if the processor has bf16 instructions; otherwise they are slower than fp32 GEMMs. At
    (256, 1024) x (1024, 32000) in bf16, ``torch.mm(out=)`` takes 11.7 ms and ``torch.addmm(beta=-1, out=)`` 12.7 ms. In
    fp32 ``mm`` takes 69.4 ms, and copying the head another 32 ms (minimum of 15 interleaved runs, 2 cores of an Intel
    Xeon with AMX, torch 2.13, 2026-11-27).
    """
    if hidden.device.type != "cpu" or hidden.dtype != torch.bfloat16 or head.bias is not None:
        return False
    return _has_fast_bfloat16() and _subtracts_before_rounding(hidden.shape[1])


@functools.cache
def _has_fast_bfloat16() -> bool:
    ask = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return ask is not None and bool(ask())


@functools.cache
def _subtracts_before_rounding(depth: int) -> bool:
    """Return whether this machine's bf16 GEMM over ``depth`` products subtracts in fp32 before rounding; runs a trial.

    A GEMM that rounds the product first would give residuals that are zero, or the difference of two roundings.
    """
    generator = torch.Generator("cpu").manual_seed(0)

    def random(rows: int) -> Tensor:
        return torch.randn(rows, depth, generator=generator, dtype=torch.float32, device="cpu").bfloat16()

    head = Head(random(256))
    for rows in (1, 32):  # a single row uses different kernels
        hidden = random(rows)
        values, residual = (torch.empty(rows, head.vocabulary, dtype=hidden.dtype, device="cpu") for _ in range(2))
        values = head.logits(hidden, values)
        residual = head.residual(hidden, values, residual)
        exact = hidden.double() @ head.weight.double().t()
        if not (values.double() + residual - exact).abs().max() <= 2**-16 * exact.abs().max():
            return False
    return True
