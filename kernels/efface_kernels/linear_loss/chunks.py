"""The plan of the loop: which rows share a chunk of logits. Pure functions, testable without a device."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

# Chunks of few rows pay on CPUs in the sum of dW: each makes a (V, D) product and adds it in fp32. NPO with a live
# reference in bf16, N = 1024, D = 1024, V = 32000, against the bare GEMMs (2 cores of an EPYC 9004, torch 2.13,
# 2026-11-21): 1.05 in one chunk, 1.16 in two, 1.22 in four.
_CPU_BYTES, _CPU_ROWS = 128 << 20, (256, 4096)
# On GPUs the accumulation of dW is bound by memory below about 725 rows, and the launch cost by small chunks.
_GPU_BYTES, _GPU_ROWS = 512 << 20, (2048, 16384)
# Where memory is short: fewer rows would have the GEMMs wait for the weights.
FEWEST_ROWS = 256


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


def default_chunk_rows(device: str, vocabulary: int, itemsize: int, free_bytes: int | None = None) -> int:
    """Return the rows of a chunk for a device type, V, the bytes of a logit, and the device's free memory if known.

    Two workspaces of them, the policy's and a reference's, take half of the free memory at most.
    """
    budget, (low, high) = (_CPU_BYTES, _CPU_ROWS) if device == "cpu" else (_GPU_BYTES, _GPU_ROWS)
    rows = min(max(budget // (vocabulary * itemsize), low), high)
    if free_bytes is None:
        return rows
    return min(rows, max(free_bytes // (4 * vocabulary * itemsize), FEWEST_ROWS))


def largest_piece(chunks: Sequence[Chunk]) -> int:
    """Return the rows of logits that are alive at a time."""
    return max((stop - start for chunk in chunks for start, stop in chunk.pieces), default=0)


def _pieces(start: int, stop: int, chunk_rows: int) -> tuple[tuple[int, int], ...]:
    return tuple((row, min(row + chunk_rows, stop)) for row in range(start, stop, chunk_rows))


def plan_sequences(row_offsets: Sequence[int], chunk_rows: int, pairs: int = 0) -> list[Chunk]:
    """Return chunks of whole sequences, as many to a chunk as ``chunk_rows`` holds, in order.

    Args:
        row_offsets: (S + 1) ascending, from 0: the rows of each sequence.
        chunk_rows: rows of logits that may be alive, ≥ 1.
        pairs: the first 2 · ``pairs`` sequences are pairs, (2i, 2i + 1), that no chunk separates.
    """
    # The sequences at which a chunk may begin, and S; the rows at which they begin, and N.
    borders = [*range(0, 2 * pairs, 2), *range(2 * pairs, len(row_offsets))]
    starts = [row_offsets[border] for border in borders]
    chunks = []
    first = 0
    while first < len(borders) - 1:
        # the last border within reach of the workspace ends the chunk; one sequence or pair at least
        last = max(bisect_right(starts, starts[first] + chunk_rows) - 1, first + 1)
        pieces = _pieces(starts[first], starts[last], chunk_rows)
        chunks.append(Chunk(borders[first], borders[last], pieces))
        first = last
    return chunks


def plan_rows(sequences: int, rows: int, chunk_rows: int) -> list[Chunk]:
    """Return one chunk of all sequences in pieces that ignore their borders: exact wherever no dW is wanted."""
    return [Chunk(0, sequences, _pieces(0, rows, chunk_rows))] if rows else []


def plan_pieces(rows: int, chunk_rows: int) -> list[Chunk]:
    """Return chunks of one piece each, for coefficients that are known beforehand: one look is always enough."""
    return [Chunk(0, 1, (piece,)) for piece in _pieces(0, rows, chunk_rows)]
