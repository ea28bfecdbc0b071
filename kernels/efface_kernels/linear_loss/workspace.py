"""How many rows of logits are alive at a time: from the device's budget, its free memory, and what it refuses."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from efface_kernels.checks import check_chunk_rows
from efface_kernels.linear_loss.chunks import (
    FEWEST_ROWS,
    default_chunk_rows,
    logits_budget,
    one_chunk_is_smaller,
    whole_tiles,
)
from efface_kernels.linear_loss.head import Head
from efface_kernels.memory import accumulates_in_float32

T = TypeVar("T")
_Key = tuple[torch.device, int, int]

# (device, V, bytes of a logit) -> rows. Free memory is asked for once: the answer costs a call of the driver, and other
# chunks in every step would be other bits in every step. Lowered when the device runs out of memory.
_known: dict[_Key, int] = {}
# Those that ran out of memory: there nothing beyond the rows of a chunk is tried any more.
_refused: set[_Key] = set()


def run_within_memory(
    run: Callable[[int], T],
    chunk_rows: int | None,
    hidden: Tensor,
    head: Head,
    *,
    logits: torch.dtype | None = None,
    sums_weight: Callable[[int], int] | None = None,
) -> T:
    """Return ``run(rows)`` for the rows of a chunk: ``chunk_rows``, or what suits the device.

    Where the device refuses the memory, tries again with half the rows, down to 256, and remembers. ``chunk_rows``
    that were asked for are kept to.

    Args:
        run: from the rows of a chunk to what is wanted.
        chunk_rows: what the caller was asked for, or None.
        hidden: (N, D).
        head: its parameters.
        logits: their dtype, where it is not that of ``hidden``.
        sums_weight: where dW is added up over the chunks: from the rows of a chunk to the bytes of its logits, of all
            models. All rows are one chunk where that needs no more memory.

    Raises:
        TypeError: ``chunk_rows`` that are no whole number.
        ValueError: ``chunk_rows`` below 1.
    """
    if chunk_rows is not None:
        check_chunk_rows(chunk_rows)
        return run(chunk_rows)
    key = (hidden.device, head.vocabulary, (logits or hidden.dtype).itemsize)
    rows, n = capacity(*key), hidden.shape[0]
    tried = rows
    if sums_weight is not None and n > rows and key not in _refused:
        product = not accumulates_in_float32(hidden.device, head.weight.dtype)
        tried = n if takes_one_chunk(n, rows, head, sums_weight, product=product) else rows
    while True:
        try:
            return run(tried)
        except torch.OutOfMemoryError:
            if min(tried, n) <= FEWEST_ROWS or _capturing(hidden.device):
                raise
        # Outside the handler: its traceback keeps the failed run's tensors alive.
        tried = rows if tried > rows else max(FEWEST_ROWS, whole_tiles(min(tried, n) // 2))
        _known[key] = tried
        _refused.add(key)


def capacity(device: torch.device, vocabulary: int, itemsize: int) -> int:
    """Return the rows of a chunk that suit the device, for V and the bytes of a logit: the same at every call.

    Lower afterwards only where the device ran out of memory.
    """
    key = (device, vocabulary, itemsize)
    rows = _known.get(key)
    if rows is None:
        rows = default_chunk_rows(device.type, vocabulary, itemsize, free_bytes(device), total_bytes(device))
        if not _capturing(device):
            _known[key] = rows
    return rows


def budget(device: torch.device) -> int:
    """Return the bytes of logits that may be alive, see ``logits_budget``."""
    return logits_budget(device.type, total_bytes(device))


def takes_one_chunk(
    rows: int, chunk_rows: int, head: Head, logits_bytes: Callable[[int], int], *, product: bool
) -> bool:
    """Whether all rows are one chunk although they are more than ``chunk_rows``; see ``one_chunk_is_smaller``.

    Not in fp16, whose power of two keeps even a single chunk's dW in fp32 until it was taken back.
    """
    if rows <= chunk_rows or head.weight.dtype != torch.bfloat16:
        return False
    return one_chunk_is_smaller(rows, chunk_rows, (head.vocabulary, head.hidden_size), logits_bytes, product=product)


def total_bytes(device: torch.device) -> int | None:
    """Return all memory of the device; None where unknown."""
    if device.type == "cpu":
        return None
    module = torch.get_device_module(device)
    if not hasattr(module, "get_device_properties"):
        return None
    return getattr(module.get_device_properties(device), "total_memory", None)


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
