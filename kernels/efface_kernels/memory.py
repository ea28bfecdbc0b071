"""Memory of the loop: workspaces that are reused between calls on the CPU, and fp32 accumulation of products."""

import functools
import threading

import torch
from torch import Tensor

from efface_kernels.checks import HALVES

# On the CPU a new buffer of 64 MiB costs 15 to 20 ms of page faults, a tenth of the time of the GEMM that fills it.
# CUDA has a caching allocator, the CPU has none. At most this many bytes are kept per thread.
_KEPT_BYTES = 256 << 20
_BLOCK_ELEMENTS = 1 << 19


class _Idle(threading.local):
    """Buffers of this thread that are not in use."""

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []  # flat, uint8


_idle = _Idle()


class BufferPool:
    """Workspaces of one run of the loop, taken from the thread's idle buffers. After an error they are freed."""

    def __init__(self) -> None:
        self._used: list[Tensor] = []

    def matrix(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an uninitialised (rows, columns) matrix with a column stride of 1."""
        if device.type != "cpu":
            return aligned(rows, columns, dtype, device)
        size = rows * columns * dtype.itemsize
        fitting = [buffer for buffer in _idle.buffers if buffer.numel() >= size]
        if fitting:
            flat = min(fitting, key=Tensor.numel)
            _idle.buffers = [buffer for buffer in _idle.buffers if buffer is not flat]
        else:
            with torch.inference_mode(False):  # the buffer can be reused outside the caller's inference mode
                flat = torch.empty(size, dtype=torch.uint8, device=device)
        self._used.append(flat)
        return flat[:size].view(dtype).view(rows, columns)

    def release(self) -> None:
        """Keep the two largest of the used and idle buffers for the next run, up to 256 MiB in all."""
        buffers = sorted([*_idle.buffers, *self._used], key=Tensor.numel, reverse=True)
        self._used = []
        _idle.buffers, kept = [], 0
        for buffer in buffers[:2]:  # one for the policy, one for a reference
            if kept + buffer.numel() <= _KEPT_BYTES:
                _idle.buffers.append(buffer)
                kept += buffer.numel()


def release_workspaces() -> None:
    """Free this thread's idle CPU workspaces: at most 256 MiB, which are kept between calls for speed."""
    _idle.buffers = []


def aligned(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialised matrix; on a GPU its rows begin at multiples of 16 elements.

    GPUs load and store 16 bytes at once, which contiguous rows of V = 50257 elements would prevent. Triton uses such
    accesses if it knows that the stride is a multiple of 16, for every dtype. GEMMs take the stride as their leading
    dimension and make no copy.
    """
    lanes = 1 if device.type == "cpu" else 16
    return torch.empty(rows, -(-columns // lanes) * lanes, dtype=dtype, device=device)[:, :columns]


@functools.cache
def accumulates_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether this device's GEMM can add half-precision products to an fp32 matrix, found by a 16 x 16 trial.

    Only CUDA supports this, since torch 2.8. The first versions refused to add to an fp32 matrix.
    """
    if device.type != "cuda" or dtype not in HALVES:
        return False
    tiny, total = torch.zeros(16, 16, dtype=dtype, device=device), torch.zeros(16, 16, device=device)
    try:
        _add_in_gemm(total, tiny, tiny, first=False)
        _add_in_gemm(total, tiny, tiny, first=True)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError):
        return False
    return True


def _add_in_gemm(total: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    if first:
        torch.mm(left, right, out_dtype=torch.float32, out=total)
    else:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)


def accumulate_product(
    total: Tensor | None, left: Tensor, right: Tensor, scale: Tensor | None, product: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return total + scale · left @ right in fp32, for half-precision factors, and the buffer for the next product.

    If the device supports it, the GEMM itself adds to ``total``, so that no (V, D) product is written and read again.
    This is not possible with a scale, as in fp16: the scale is on the device, and a GEMM takes its factor from the
    host.
    """
    first = total is None
    if total is None:
        total = left.new_empty(left.shape[0], right.shape[1], dtype=torch.float32)
    if scale is None and accumulates_in_float32(left.device, left.dtype):
        _add_in_gemm(total, left, right, first=first)
        return total, None
    if product is None:
        product = left.new_empty(total.shape)
    torch.mm(left, right, out=product)
    add_product(total, product, scale, first=first)
    return total, product


def add_product(total: Tensor, product: Tensor, scale: Tensor | None, *, first: bool) -> None:
    """Set total to (0 if ``first`` else total) + scale · product, for an fp32 total and a half-precision product.

    On the CPU this converts and adds blocks of rows, because adding operands of two dtypes is several times slower in
    torch than converting first.
    """
    rows = max(1, _BLOCK_ELEMENTS // total.shape[1]) if total.device.type == "cpu" else total.shape[0]
    for part, added in zip(total.split(rows), product.split(rows), strict=True):
        if first:
            part.copy_(added)
            if scale is not None:
                part.mul_(scale)
        else:
            part.add_(added.float() if scale is None else added.float().mul_(scale))


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy a small host tensor to ``device`` without waiting for the device.

    CUDA copies from pinned memory asynchronously, in stream order. From pageable memory, torch would wait for the
    stream or, with ``non_blocking``, for a copy into a buffer of the driver.
    """
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
