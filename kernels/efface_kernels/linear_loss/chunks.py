"""The plan of the loop: which rows share a chunk of logits, and how many rows of logits are alive at a time.

The plan is pure functions, testable without a device; the rows follow from the device's budget, its free memory, and
what it refuses.
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

# Chunks of few rows pay on CPUs in the sum of dW: each makes a (V, D) product and adds it in fp32. NPO with a live
# reference in bf16, N = 1024, D = 1024, V = 32000, against the bare GEMMs (2 cores of an EPYC 9004, torch 2.13,
# 2026-11-21): 1.05 in one chunk, 1.16 in two, 1.22 in four.
_CPU_BYTES, _CPU_ROWS = 128 << 20, (256, 4096)
# On GPUs the accumulation of dW is bound by memory below about 725 rows, and the launch cost by small chunks.
_GPU_BYTES, _GPU_ROWS = (512 << 20, 4 << 30), (2048, 16384)
_GPU_SHARE = 64
# Where memory is short: fewer rows would have the GEMMs wait for the weights.
FEWEST_ROWS = 256
# A GEMM's tiles have 128 rows (or 256), and a chunk costs all tiles that it begins: 2092 rows cost 17 of 128, and with
# tiles of 128 x 256, dh at D = 2048 is then 136 of them on an H100's 132 multiprocessors, which is two waves; of 2048
# rows it is 128, which is one (computed).
_TILE, _CAPACITY_TILE = 128, 256


@dataclass(frozen=True)
class Chunk:
    """Whole sequences ``first`` .. ``last − 1`` and the pieces, (start, stop) in rows, in which their logits are made.

    One piece is the rule. A sequence, or a pair of them, longer than the workspace is a chunk of its own with several.
    """

    first: int
    last: int
    pieces: tuple[tuple[int, int], ...]

    @property
    def rows(self) -> slice:
        """The rows of the whole chunk."""
        return slice(self.pieces[0][0], self.pieces[-1][1])


def logits_budget(device: str, total_bytes: int | None = None) -> int:
    """Return the bytes of logits that may be alive, for a device type and all memory that the device has, if known.

    On a GPU the largest power of two within a 64th of its memory, between 512 MiB and 4 GiB: 512 MiB of 40 GB, 1 GiB of
    80 GB, 2 GiB of 141 GB. All of its memory, not what is free, because other chunks are other bits: a run that is
    resumed finds the optimizer's states in memory when it first asks, and the run that was killed did not.
    """
    if device == "cpu":
        return _CPU_BYTES
    least, most = _GPU_BYTES
    return min(max(least, 1 << max((total_bytes or 0) // _GPU_SHARE, 1).bit_length() - 1), most)


def default_chunk_rows(
    device: str, vocabulary: int, itemsize: int, free_bytes: int | None = None, total_bytes: int | None = None
) -> int:
    """Return the rows of a chunk: a multiple of 256, for V, the bytes of a logit, and the device's type and memory.

    Two workspaces of them, the policy's and a reference's, take half of the free memory at most, and each has 256 rows
    at least.
    """
    low, high = _CPU_ROWS if device == "cpu" else _GPU_ROWS
    rows = min(max(logits_budget(device, total_bytes) // (vocabulary * itemsize), low), high)
    if free_bytes is not None:
        rows = min(rows, max(free_bytes // (4 * vocabulary * itemsize), FEWEST_ROWS))
    return whole_tiles(rows)


def whole_tiles(rows: int) -> int:
    """Return ``rows`` rounded down to a multiple of 256 where it is at least that."""
    return rows // _CAPACITY_TILE * _CAPACITY_TILE or rows


def one_chunk_is_smaller(
    rows: int, chunk_rows: int, head: tuple[int, int], logits_bytes: Callable[[int], int], *, product: bool = False
) -> bool:
    """Whether one chunk of all N rows needs no more memory than chunks of R = ``chunk_rows``, for a bf16 head (V, D).

    The GEMM of a single chunk writes dW itself, in bf16. Those of several add it up in fp32::

        one chunk        logits_bytes(N) + 2 V D
        several chunks   logits_bytes(R) + 4 V D      (+ 2 V D where each makes a product that is then added)

    With one workspace of bf16 logits, 2 V bytes a row, one chunk is no larger where N ≤ R + D; with two where
    N ≤ R + D / 2, with two in fp32 where N ≤ R + D / 4; with a product where N exceeds R by twice as much. So the sum,
    the accumulation and the cast of what was added up are spared at no cost.

    Args:
        rows: N.
        chunk_rows: R.
        head: (V, D).
        logits_bytes: from the rows of a chunk to the bytes of all logits that are then alive.
        product: whether a chunk's dW is made in a buffer of its own before it is added to the sum.
    """
    vocabulary, hidden_size = head
    several = logits_bytes(min(chunk_rows, rows)) + (6 if product else 4) * vocabulary * hidden_size
    return logits_bytes(rows) + 2 * vocabulary * hidden_size <= several


def largest_piece(chunks: Sequence[Chunk]) -> int:
    """Return the rows of logits that are alive at a time."""
    return max((stop - start for chunk in chunks for start, stop in chunk.pieces), default=0)


def _pieces(start: int, stop: int, chunk_rows: int) -> tuple[tuple[int, int], ...]:
    """Cut the rows into as few pieces as ``chunk_rows`` allows: equal ones, rounded up to whole tiles."""
    count = -(-(stop - start) // chunk_rows)
    if count == 0:
        return ()
    rows = min(-(-(stop - start) // (count * _TILE)) * _TILE, chunk_rows)
    return tuple((row, min(row + rows, stop)) for row in range(start, stop, rows))


def _ends(starts: Sequence[int], capacity: int) -> list[int]:
    """Return where each chunk ends, as an index into ``starts``, when chunks are filled one after the other."""
    ends, first = [], 0
    while first < len(starts) - 1:
        # the last border within reach of the workspace ends the chunk; one sequence or pair at least
        first = max(bisect_right(starts, starts[first] + capacity) - 1, first + 1)
        ends.append(first)
    return ends


def _balanced(starts: Sequence[int], capacity: int) -> int:
    """Return the smallest capacity, in whole tiles, that needs no more chunks: no small one is left over at the end.

    A chunk of few rows has its GEMMs wait for the weights, and costs as many waves of tiles as a larger one.
    """
    count = len(_ends(starts, capacity))
    if count <= 1:
        return capacity
    lengths = [stop - start for start, stop in pairwise(starts)]
    longest = max((length for length in lengths if length <= capacity), default=1)  # longer ones are chunks in any case
    tiles = range(-(-longest // _TILE), capacity // _TILE + 1)
    enough = bisect_left(tiles, True, key=lambda some: len(_ends(starts, some * _TILE)) <= count)
    return tiles[enough] * _TILE if enough < len(tiles) else capacity


def plan_sequences(row_offsets: Sequence[int], chunk_rows: int, pairs: int = 0) -> list[Chunk]:
    """Return chunks of whole sequences in order, as few as ``chunk_rows`` allows, and about equally large.

    Args:
        row_offsets: (S + 1) ascending, from 0: the rows of each sequence.
        chunk_rows: rows of logits that may be alive, ≥ 1.
        pairs: the first 2 · ``pairs`` sequences are pairs, (2i, 2i + 1), that no chunk separates.
    """
    # The sequences at which a chunk may begin, and S; the rows at which they begin, and N.
    borders = [*range(0, 2 * pairs, 2), *range(2 * pairs, len(row_offsets))]
    starts = [row_offsets[border] for border in borders]
    ends = _ends(starts, _balanced(starts, chunk_rows))
    return [
        Chunk(borders[first], borders[last], _pieces(starts[first], starts[last], chunk_rows))
        for first, last in pairwise([0, *ends])
    ]


def plan_rows(sequences: int, rows: int, chunk_rows: int) -> list[Chunk]:
    """Return one chunk of all sequences in pieces that ignore their borders: exact wherever no dW is wanted."""
    return [Chunk(0, sequences, _pieces(0, rows, chunk_rows))] if rows else []


def plan_pieces(rows: int, chunk_rows: int) -> list[Chunk]:
    """Return chunks of one piece each, for coefficients that are known beforehand: one look is always enough."""
    return [Chunk(0, 1, (piece,)) for piece in _pieces(0, rows, chunk_rows)]


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
        # Outside the handler: its traceback keeps the failed run's tensors alive.
        tried = rows if tried > rows else max(FEWEST_ROWS, whole_tiles(min(tried, n) // 2))
        _known[key] = tried
        _refused.add(key)


def chunk_capacity(device: torch.device, vocabulary: int, itemsize: int) -> int:
    """Return the rows of a chunk that suit the device, for V and the bytes of a logit: the same at every call.

    Lower afterwards only where the device ran out of memory.
    """
    key = (device, vocabulary, itemsize)
    rows = _known.get(key)
    if rows is None:
        rows = default_chunk_rows(device.type, vocabulary, itemsize, free_memory(device), device_memory(device))
        if not _capturing(device):
            _known[key] = rows
    return rows


def budget(device: torch.device) -> int:
    """Return the bytes of logits that may be alive, see ``logits_budget``."""
    return logits_budget(device.type, device_memory(device))


def takes_one_chunk(
    rows: int, chunk_rows: int, head: Head, logits_bytes: Callable[[int], int], *, product: bool
) -> bool:
    """Whether all rows are one chunk although they are more than ``chunk_rows``; see ``one_chunk_is_smaller``.

    Not in fp16, whose power of two keeps even a single chunk's dW in fp32 until it was taken back.
    """
    if rows <= chunk_rows or head.weight.dtype != torch.bfloat16:
        return False
    return one_chunk_is_smaller(rows, chunk_rows, (head.vocabulary, head.hidden_size), logits_bytes, product=product)


def device_memory(device: torch.device) -> int | None:
    """Return all memory of the device; None where unknown."""
    if device.type == "cpu":
        return None
    module = torch.get_device_module(device)
    if not hasattr(module, "get_device_properties"):
        return None
    return getattr(module.get_device_properties(device), "total_memory", None)


def free_memory(device: torch.device) -> int | None:
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
