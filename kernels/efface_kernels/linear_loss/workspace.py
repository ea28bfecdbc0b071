"""How many rows of logits are alive at a time: from the device's budget, its free memory, and what it refuses."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from efface_kernels.linear_loss.chunks import FEWEST_ROWS, default_chunk_rows
from efface_kernels.linear_loss.head import Head

T = TypeVar("T")

# (device, V, bytes of a logit) -> rows. Free memory is asked for once: the answer costs a call of the driver, and other
# chunks in every step would be other bits in every step. Lowered when the device runs out of memory.
_known: dict[tuple[torch.device, int, int], int] = {}


def run_within_memory(
    run: Callable[[int], T], chunk_rows: int | None, hidden: Tensor, head: Head, *, logits: torch.dtype | None = None
) -> T:
    """Return ``run(rows)`` for the rows of a chunk: ``chunk_rows``, or what suits the device.

    Where the device refuses the memory, tries again with half the rows, down to 256, and remembers. ``chunk_rows``
    that were asked for are kept to. ``logits``: their dtype, where it is not that of ``hidden``.

    Raises:
        ValueError: ``chunk_rows`` below 1.
    """
    if chunk_rows is not None:
        if chunk_rows < 1:
            raise ValueError(f"`chunk_rows`: expected at least 1, got {chunk_rows}")
        return run(chunk_rows)
    key = (hidden.device, head.vocabulary, (logits or hidden.dtype).itemsize)
    rows = _known.get(key)
    if rows is None:
        rows = default_chunk_rows(hidden.device.type, *key[1:], free_bytes(hidden.device))
        if not _capturing(hidden.device):
            _known[key] = rows
    while True:
        try:
            return run(rows)
        except torch.OutOfMemoryError:
            if min(rows, hidden.shape[0]) <= FEWEST_ROWS or _capturing(hidden.device):
                raise
        # Outside the handler: its traceback keeps the failed run's tensors alive.
        rows = max(FEWEST_ROWS, min(rows, hidden.shape[0]) // 2)
        _known[key] = rows


def free_bytes(device: torch.device) -> int | None:
    """Return what could be allocated: the driver's free memory and the allocator's idle blocks; None where unknown."""
    if device.type == "cpu" or _capturing(device):
        return None
    module = torch.get_device_module(device)
    if not hasattr(module, "mem_get_info"):
        return None
    free, _total = module.mem_get_info(device)
    return int(free + module.memory_reserved(device) - module.memory_allocated(device))


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
