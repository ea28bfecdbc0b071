"""Planning of chunks: which rows share a chunk of logits, and how many rows of logits are in memory at a time.

The planning functions are pure and can be tested without a device. ``run_within_memory`` chooses the number of rows
from the device's budget and free memory, and lowers it when an allocation fails.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from efface_kernels.checks import check_chunk_rows
from efface_kernels.linear_loss.head import Head
from efface_kernels.memory import accumulates_in_float32

T = TypeVar("T")
_Key = tuple[torch.device, int, int]

# On CPUs small chunks are slower because of the sum of dW: each chunk computes a (V, D) product and adds it in fp32.
# Time of NPO with a live reference in bf16, N = 1024, D = 1024, V = 32000, relative to the GEMMs alone (2 cores of an
# EPYC 9004, torch 2.13, 2026-11-21): 1.05 with one chunk, 1.16 with two, 1.22 with four.
_CPU_BYTES, _CPU_ROWS = 128 << 20, (256, 4096)
# On GPUs the accumulation of dW is memory-bound below about 725 rows, and small chunks add launch overhead.
_GPU_BYTES, _GPU_ROWS = (512 << 20, 4 << 30), (2048, 16384)
_GPU_SHARE = 64
# Lower bound when memory is short: with fewer rows the GEMMs would be bound by reading the weights.
FEWEST_ROWS = 256
# A GEMM's tiles have 128 (or 256) rows, and a partly filled tile costs as much as a full one: 2092 rows need 17 tiles
# of 128 rows. With tiles of 128 x 256, dh at D = 2048 then has 136 tiles, two waves on the 132 multiprocessors of an
# H100. With 2048 rows it has 128 tiles, one wave (computed).
_TILE, _CAPACITY_TILE = 128, 256


@dataclass(frozen=True)
class Chunk:
    """Whole sequences ``first`` .. ``last − 1``, and the pieces of rows, (start, stop), in which they are processed.

    The logits of one piece are computed at a time. Most chunks have one piece. A sequence or pair that is longer than
    the workspace forms its own chunk of several pieces.
    """

    first: int
    last: int
    pieces: tuple[tuple[int, int], ...]

    @property
    def rows(self) -> slice:
        """All rows of the chunk."""
        return slice(self.pieces[0][0], self.pieces[-1][1])


def logits_budget(device: str, total_bytes: int | None = None) -> int:
    """Return the budget of logits in bytes, for a device type and the device's total memory, if known.

    On a GPU the budget is the largest power of two within 1/64 of the total memory, between 512 MiB and 4 GiB: 512 MiB
    for 40 GB, 1 GiB for 80 GB, 2 GiB for 141 GB. It depends on the total and not on the free memory, because a
    different chunk size gives bitwise different results: when a resumed run first asks, the optimizer's states are
    already in memory, whereas in the interrupted run they were not.
    """
    if device == "cpu":
        return _CPU_BYTES
    least, most = _GPU_BYTES
    return min(max(least, 1 << max((total_bytes or 0) // _GPU_SHARE, 1).bit_length() - 1), most)


def default_chunk_rows(
    device: str, vocabulary: int, itemsize: int, free_bytes: int | None = None, total_bytes: int | None = None
) -> int:
    """Return the rows of a chunk for a device type, V, the bytes of a logit, and the device's free and total memory.

    The number is rounded down to a multiple of 256 if it is at least 256. If the free memory is given, two workspaces
    of this size, the policy's and the reference's, take at most half of it, but each has at least 256 rows.
    """
    low, high = _CPU_ROWS if device == "cpu" else _GPU_ROWS
    rows = min(max(logits_budget(device, total_bytes) // (vocabulary * itemsize), low), high)
    if free_bytes is not None:
        rows = min(rows, max(free_bytes // (4 * vocabulary * itemsize), FEWEST_ROWS))
    return whole_tiles(rows)


def whole_tiles(rows: int) -> int:
    """Return ``rows`` rounded down to a multiple of 256, or unchanged if it is below 256."""
    return rows // _CAPACITY_TILE * _CAPACITY_TILE or rows


def one_chunk_is_smaller(
    rows: int, chunk_rows: int, head: tuple[int, int], logits_bytes: Callable[[int], int], *, product: bool = False
) -> bool:
    """Return whether one chunk of all N rows needs no more memory than chunks of R rows, for a bf16 head (V, D).

    The GEMM of a single chunk writes dW directly in bf16. Several chunks accumulate dW in fp32. Memory in bytes::

        one chunk        logits_bytes(N) + 2 V D
        several chunks   logits_bytes(R) + 4 V D      (+ 2 V D if each chunk computes a product that is then added)

    With one workspace of bf16 logits (2 V bytes per row) one chunk is no larger if N ≤ R + D; with two workspaces if
    N ≤ R + D / 2; with two fp32 workspaces if N ≤ R + D / 4. With a separate product N − R can be twice as large. A
    single chunk then saves the fp32 sum, its additions and its cast to bf16, at no cost in memory.

    Args:
        rows: N.
        chunk_rows: R.
        head: (V, D).
        logits_bytes: maps the rows of a chunk to the bytes of all logits in memory.
        product: whether each chunk's dW is computed in a separate buffer before it is added to the sum.
    """
    vocabulary, hidden_size = head
    several = logits_bytes(min(chunk_rows, rows)) + (6 if product else 4) * vocabulary * hidden_size
    return logits_bytes(rows) + 2 * vocabulary * hidden_size <= several


def largest_piece(chunks: Sequence[Chunk]) -> int:
    """Return the rows of the largest piece: the most rows of logits in memory at a time."""
    return max((stop - start for chunk in chunks for start, stop in chunk.pieces), default=0)


def _pieces(start: int, stop: int, chunk_rows: int) -> tuple[tuple[int, int], ...]:
    """Cut the rows into as few pieces as ``chunk_rows`` allows, of equal size rounded up to whole tiles."""
    count = -(-(stop - start) // chunk_rows)
    if count == 0:
        return ()
    rows = min(-(-(stop - start) // (count * _TILE)) * _TILE, chunk_rows)
    return tuple((row, min(row + rows, stop)) for row in range(start, stop, rows))


def _ends(starts: Sequence[int], capacity: int) -> list[int]:
    """Return the end of each chunk, as an index into ``starts``, when chunks are filled in order."""
    ends, first = [], 0
    while first < len(starts) - 1:
        # end the chunk at the last boundary that fits the workspace, but after at least one sequence or pair
        first = max(bisect_right(starts, starts[first] + capacity) - 1, first + 1)
        ends.append(first)
    return ends


def _balanced(starts: Sequence[int], capacity: int) -> int:
    """Return the smallest capacity, in whole tiles, that needs no more chunks than ``capacity``.

    This avoids a small chunk at the end. The GEMMs of a small chunk are bound by reading the weights, and the chunk
    costs as many waves of tiles as a larger one.
    """
    count = len(_ends(starts, capacity))
    if count <= 1:
        return capacity
    lengths = [stop - start for start, stop in pairwise(starts)]
    # a sequence or pair longer than the capacity is a chunk of its own in any case
    longest = max((length for length in lengths if length <= capacity), default=1)
    tiles = range(-(-longest // _TILE), capacity // _TILE + 1)
    enough = bisect_left(tiles, True, key=lambda some: len(_ends(starts, some * _TILE)) <= count)
    return tiles[enough] * _TILE if enough < len(tiles) else capacity


def plan_sequences(row_offsets: Sequence[int], chunk_rows: int, pairs: int = 0) -> list[Chunk]:
    """Return chunks of whole sequences in order: as few as ``chunk_rows`` allows, and of similar size.

    Args:
        row_offsets: (S + 1) ascending from 0: the first row of each sequence; the last entry is N.
        chunk_rows: upper bound on the rows of logits in memory, ≥ 1.
        pairs: the first 2 · ``pairs`` sequences are pairs, (2i, 2i + 1); both sequences of a pair are in the same
            chunk.
    """
    # borders: the sequences at which a chunk can begin, and S. starts: the first row of each of them, and N.
    borders = [*range(0, 2 * pairs, 2), *range(2 * pairs, len(row_offsets))]
    starts = [row_offsets[border] for border in borders]
    ends = _ends(starts, _balanced(starts, chunk_rows))
    return [
        Chunk(borders[first], borders[last], _pieces(starts[first], starts[last], chunk_rows))
        for first, last in pairwise([0, *ends])
    ]


def plan_rows(sequences: int, rows: int, chunk_rows: int) -> list[Chunk]:
    """Return one chunk of all sequences in pieces that ignore sequence boundaries; exact without dW and db."""
    return [Chunk(0, sequences, _pieces(0, rows, chunk_rows))] if rows else []


def plan_pieces(rows: int, chunk_rows: int) -> list[Chunk]:
    """Return chunks of one piece each, for coefficients that are known in advance; each piece is read once."""
    return [Chunk(0, 1, (piece,)) for piece in _pieces(0, rows, chunk_rows)]


# (device, V, bytes of a logit) -> rows. The free memory is read once, because reading it is a call to the driver, and
# because a chunk size that changed between steps would change the bits of the results. The rows are lowered when the
# device runs out of memory.
_known: dict[_Key, int] = {}
# Keys for which the device ran out of memory: a single chunk of all rows is not tried again.
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
    """Return ``run(rows)``, where ``rows`` is ``chunk_rows`` or, if that is None, the number that fits the device.

    If the device runs out of memory, the call is repeated with half the rows, down to 256, and the smaller number is
    used from then on. An explicit ``chunk_rows`` is never changed.

    Args:
        run: maps the rows of a chunk to the result.
        chunk_rows: rows that the user asked for, or None.
        hidden: (N, D).
        head: head that produces the logits.
        logits: dtype of the logits, if it differs from that of ``hidden``.
        sums_weight: given if dW is summed over chunks: maps the rows of a chunk to the bytes of its logits, of all
            models. All rows then form one chunk if that needs no more memory.

    Raises:
        TypeError: if ``chunk_rows`` is not an int.
        ValueError: if ``chunk_rows`` is below 1.
        torch.OutOfMemoryError: if the device runs out of memory with 256 rows or fewer, with an explicit
            ``chunk_rows``, or while a CUDA graph is captured.
    """
    if chunk_rows is not None:
        check_chunk_rows(chunk_rows)
        return run(chunk_rows)
    key = (hidden.device, head.vocabulary, (logits or hidden.dtype).itemsize)
    rows, n = chunk_capacity(*key), hidden.shape[0]
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
        # Outside the except block, whose traceback keeps the tensors of the failed run alive.
        tried = rows if tried > rows else max(FEWEST_ROWS, whole_tiles(min(tried, n) // 2))
        _known[key] = tried
        _refused.add(key)


def chunk_capacity(device: torch.device, vocabulary: int, itemsize: int) -> int:
    """Return the rows of a chunk that fit the device, for V and the bytes of a logit.

    The result is the same at every call, until the device runs out of memory.
    """
    key = (device, vocabulary, itemsize)
    rows = _known.get(key)
    if rows is None:
        rows = default_chunk_rows(device.type, vocabulary, itemsize, free_memory(device), device_memory(device))
        if not _capturing(device):
            _known[key] = rows
    return rows


def budget(device: torch.device) -> int:
    """Return the device's budget of logits in bytes, see ``logits_budget``."""
    return logits_budget(device.type, device_memory(device))


def takes_one_chunk(
    rows: int, chunk_rows: int, head: Head, logits_bytes: Callable[[int], int], *, product: bool
) -> bool:
    """Return whether all rows form one chunk although they exceed ``chunk_rows``; see ``one_chunk_is_smaller``.

    This holds for bf16 heads only. In fp16 even a single chunk's dW is fp32 until the power-of-two scale of its
    coefficients is undone.
    """
    if rows <= chunk_rows or head.weight.dtype != torch.bfloat16:
        return False
    return one_chunk_is_smaller(rows, chunk_rows, (head.vocabulary, head.hidden_size), logits_bytes, product=product)


def device_memory(device: torch.device) -> int | None:
    """Return the total memory of the device in bytes, or None if it is unknown."""
    if device.type == "cpu":
        return None
    module = torch.get_device_module(device)
    if not hasattr(module, "get_device_properties"):
        return None
    return getattr(module.get_device_properties(device), "total_memory", None)


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that can be allocated: the driver's free memory plus the allocator's idle blocks.

    Returns None on the CPU, while a CUDA graph is captured, and if the device's torch module does not report it.
    """
    if device.type == "cpu" or _capturing(device):
        return None
    module = torch.get_device_module(device)
    if not hasattr(module, "mem_get_info"):
        return None
    free, _total = module.mem_get_info(device)
    return int(free + module.memory_reserved(device) - module.memory_allocated(device))


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
