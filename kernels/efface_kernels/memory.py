"""Large buffers of the loop: reused between calls on the CPU, and added up in fp32 without a second copy."""

import threading

import torch
from torch import Tensor

# A fresh 64 MiB buffer costs 15 to 20 ms of page faults, a tenth of the GEMM that fills it. CUDA has a caching
# allocator, the CPU has none. Larger buffers are not kept.
_KEPT_BYTES = 256 << 20
_BLOCK_ELEMENTS = 1 << 19


class _Shelf(threading.local):
    """Buffers of this thread that nobody uses at the moment."""

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []  # flat, uint8


_shelf = _Shelf()


class Loan:
    """Workspaces of one run of the loop. Given back at its end; after an error they are simply freed."""

    def __init__(self) -> None:
        self._lent: list[Tensor] = []

    def matrix(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an uninitialised (rows, columns) matrix."""
        if device.type != "cpu":
            return torch.empty(rows, columns, dtype=dtype, device=device)
        size = rows * columns * dtype.itemsize
        fitting = [buffer for buffer in _shelf.buffers if buffer.numel() >= size]
        if fitting:
            flat = min(fitting, key=Tensor.numel)
            _shelf.buffers = [buffer for buffer in _shelf.buffers if buffer is not flat]
        else:
            flat = torch.empty(size, dtype=torch.uint8)
        self._lent.append(flat)
        return flat[:size].view(dtype).view(rows, columns)

    def give_back(self) -> None:
        """Keep the largest of the buffers, lent and idle, for the next call."""
        buffers = sorted([*_shelf.buffers, *self._lent], key=Tensor.numel, reverse=True)
        self._lent = []
        _shelf.buffers, kept = [], 0
        for buffer in buffers[:2]:  # a policy's and a reference's
            if kept + buffer.numel() <= _KEPT_BYTES:
                _shelf.buffers.append(buffer)
                kept += buffer.numel()


def release_workspaces() -> None:
    """Free this thread's idle workspaces: at most 256 MiB, kept between calls for speed."""
    _shelf.buffers = []


def add_product(total: Tensor, product: Tensor, scale: Tensor | None, *, first: bool) -> None:
    """Set total to (0 if ``first`` else total) + scale · product, for an fp32 total and a half-precision product.

    On the CPU row block by row block: torch adds operands of two dtypes element by element there, several times slower
    than it converts and adds.
    """
    rows = max(1, _BLOCK_ELEMENTS // total.shape[1]) if total.device.type == "cpu" else total.shape[0]
    for part, added in zip(total.split(rows), product.split(rows), strict=True):
        if first:
            part.copy_(added)
            if scale is not None:
                part.mul_(scale)
        else:
            part.add_(added.float() if scale is None else added.float().mul_(scale))
