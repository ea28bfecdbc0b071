"""Tests of the plan of chunks for the loss."""

import itertools
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from efface_kernels.linear_loss.chunks import (
    default_chunk_rows,
    logits_budget,
    one_chunk_is_smaller,
    plan_pieces,
    plan_rows,
    plan_sequences,
)


def offsets_of(lengths: list[int]) -> list[int]:
    return [0, *itertools.accumulate(lengths)]


def units_of(offsets: list[int], pairs: int) -> list[int]:
    """Return the rows of each unit, a DPO pair or a sequence, that must stay within one chunk."""
    borders = [*offsets[: 2 * pairs : 2], *offsets[2 * pairs :]]
    return [stop - start for start, stop in itertools.pairwise(borders)]


def greedy(units: list[int], capacity: int) -> int:
    """Return the number of chunks of at most ``capacity`` rows, filled in order. A longer unit is a chunk alone."""
    chunks, room = 0, 0
    for rows in units:
        if rows > room:
            chunks, room = chunks + 1, max(capacity, rows)
        room = room - rows if rows <= capacity else 0
    return chunks


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 50), st.integers(0, 15), st.sampled_from([1, 13, 100]))
@example([32] * 256, 2048, 0, 1)
@example([32] * 256, 2092, 0, 1)
@example([1], 1, 0, 1)
@example([700, 3, 300, 300, 2000, 5], 600, 1, 1)
def test_chunks_cover_whole_sequences_in_order_within_the_workspace(
    lengths: list[int], chunk_rows: int, pairs: int, scale: int
) -> None:
    lengths, chunk_rows = [scale * length for length in lengths], scale * chunk_rows
    pairs = min(pairs, len(lengths) // 2)
    offsets = offsets_of(lengths)
    chunks = plan_sequences(offsets, chunk_rows, pairs)

    sequence, row = 0, 0
    for chunk in chunks:
        assert chunk.first == sequence < chunk.last
        assert sequence >= 2 * pairs or sequence % 2 == 0
        assert chunk.rows == slice(offsets[chunk.first], offsets[chunk.last])
        for start, stop in chunk.pieces:
            assert start == row < stop <= start + chunk_rows
            row = stop
        # a chunk has several pieces only if it is one sequence or pair that does not fit, and then as few as possible
        assert len(chunk.pieces) == 1 or chunk.last - chunk.first == (2 if sequence < 2 * pairs else 1)
        assert len(chunk.pieces) == -(-(chunk.rows.stop - chunk.rows.start) // chunk_rows)
        sequence = chunk.last
    assert (sequence, row) == (len(lengths), offsets[-1])

    units = units_of(offsets, pairs)
    assert len(chunks) == greedy(units, chunk_rows)
    # Chunks with several units are as small as possible: a smaller number of whole tiles would need more chunks.
    largest = max(
        (len(range(*chunk.rows.indices(offsets[-1]))) for chunk in chunks if len(chunk.pieces) == 1), default=0
    )
    for smaller in range(128, min(-(-largest // 128) * 128, chunk_rows + 1), 128):
        fitting = [rows for rows in units if rows <= chunk_rows]
        assert max(fitting) > smaller or greedy(units, smaller) > len(chunks)


def test_no_small_chunk_is_left_over() -> None:
    def rows(count: int, length: int, chunk_rows: int) -> list[int]:
        chunks = plan_sequences(offsets_of([length] * count), chunk_rows)
        return [chunk.rows.stop - chunk.rows.start for chunk in chunks]

    assert rows(256, 32, 2048) == [2048] * 4
    assert rows(256, 32, 2092) == [2048] * 4
    assert rows(257, 32, 2048) == [1664] * 4 + [1568]
    assert rows(66, 32, 2048) == [1152, 960]
    assert rows(3, 100, 256) == [200, 100]


def test_rows_are_cut_anywhere_without_a_weight_gradient() -> None:
    (chunk,) = plan_rows(3, 10, 4)
    assert chunk.pieces == ((0, 4), (4, 8), (8, 10))
    assert plan_rows(0, 0, 4) == plan_pieces(0, 4) == []
    (chunk,) = plan_rows(3, 2100, 2048)
    assert chunk.pieces == ((0, 1152), (1152, 2100))
    assert [chunk.pieces for chunk in plan_pieces(8200, 4096)] == [((0, 2816),), ((2816, 5632),), ((5632, 8200),)]


@given(st.integers(0, 40_000), st.integers(1, 5000))
def test_pieces_are_as_few_as_can_be_and_equal(rows: int, chunk_rows: int) -> None:
    pieces = [chunk.pieces[0] for chunk in plan_pieces(rows, chunk_rows)]
    assert [row for piece in pieces for row in range(*piece)] == list(range(rows))
    assert len(pieces) == -(-rows // chunk_rows)
    sizes = [stop - start for start, stop in pieces]
    assert all(size <= chunk_rows for size in sizes)
    assert len(set(sizes[:-1])) <= 1
    if sizes and sizes[0] < chunk_rows:
        assert sizes[0] % 128 == 0 or len(sizes) == 1
        assert sizes[0] - sizes[-1] < 128 * len(sizes)


GIB = 1 << 30


def test_default_chunk_rows() -> None:
    assert default_chunk_rows("cpu", 128256, 2) == 512
    assert default_chunk_rows("cpu", 128256, 4) == 256
    assert default_chunk_rows("cpu", 32000, 2) == 2048
    assert default_chunk_rows("cuda", 128256, 2) == 2048
    assert default_chunk_rows("cuda", 128256, 4) == 2048
    # two workspaces take half of the free memory, and have at least 256 rows
    assert default_chunk_rows("cuda", 128256, 2, 64 * GIB) == 2048
    assert default_chunk_rows("cuda", 128256, 2, 1 * GIB) == 1024
    assert default_chunk_rows("cuda", 128256, 2, 1 << 20) == 256


@pytest.mark.parametrize(
    ("gib", "mib", "rows"),
    [(23.6, 512, 2048), (39.4, 512, 2048), (79.1, 1024, 4096), (139.8, 2048, 8192), (1000, 4096, 16384)],
)
def test_a_large_card_has_larger_chunks(gib: float, mib: int, rows: int) -> None:
    total = int(gib * GIB)
    assert logits_budget("cuda", total) == mib << 20
    assert default_chunk_rows("cuda", 128256, 2, total, total) == rows
    assert default_chunk_rows("cuda", 128256, 2, 2 * GIB, total) == 2048  # little memory is free
    assert default_chunk_rows("cpu", 128256, 2, None, total) == 512


@pytest.mark.parametrize(
    ("row_bytes", "product", "beyond"),
    [(2, False, 1024), (4, False, 512), (8, False, 256), (2, True, 2048), (4, True, 1024), (8, True, 512)],
)
def test_one_chunk_takes_no_more_memory(row_bytes: int, product: bool, beyond: int) -> None:
    """N ≤ R + D, R + D / 2, R + D / 4; twice the margin with a product."""
    v, d, chunk_rows = 32000, 1024, 2048
    logits: Callable[[int], int] = lambda rows: row_bytes * v * rows  # noqa: E731
    fits = [
        one_chunk_is_smaller(chunk_rows + more, chunk_rows, (v, d), logits, product=product)
        for more in (beyond, beyond + 1)
    ]
    assert fits == [True, False]
