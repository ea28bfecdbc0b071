"""The plan of the loop."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from efface_kernels.linear_loss.chunks import default_chunk_rows, plan_rows, plan_sequences


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 50), st.integers(0, 15))
def test_chunks_cover_whole_sequences_in_order_within_the_workspace(
    lengths: list[int], chunk_rows: int, pairs: int
) -> None:
    pairs = min(pairs, len(lengths) // 2)
    offsets = [0]
    for length in lengths:
        offsets.append(offsets[-1] + length)
    chunks = plan_sequences(offsets, chunk_rows, pairs)

    def behind(sequence: int) -> int:
        """What cannot be separated from a sequence that begins a chunk ends here."""
        return sequence + (2 if sequence < 2 * pairs else 1)

    sequence, row = 0, 0
    for chunk in chunks:
        assert chunk.first == sequence < chunk.last
        assert sequence >= 2 * pairs or sequence % 2 == 0
        assert chunk.rows == slice(offsets[chunk.first], offsets[chunk.last])
        for start, stop in chunk.pieces:
            assert start == row < stop <= start + chunk_rows
            row = stop
        # several pieces only where one sequence or pair does not fit
        assert len(chunk.pieces) == 1 or chunk.last == behind(chunk.first)
        sequence = chunk.last
    assert (sequence, row) == (len(lengths), offsets[-1])
    for left, right in itertools.pairwise(chunks):
        assert offsets[behind(right.first)] - offsets[left.first] > chunk_rows  # greedy: none would have fitted


def test_rows_are_cut_anywhere_without_a_weight_gradient() -> None:
    (chunk,) = plan_rows(3, 10, 4)
    assert chunk.pieces == ((0, 4), (4, 8), (8, 10))
    assert plan_rows(0, 0, 4) == []


def test_default_chunk_rows() -> None:
    assert default_chunk_rows("cpu", 128256, 2) == 523
    assert default_chunk_rows("cpu", 128256, 4) == 261
    assert default_chunk_rows("cpu", 32000, 2) == 2097
    assert default_chunk_rows("cuda", 128256, 2) == 2092
    assert default_chunk_rows("cuda", 128256, 4) == 2048
    # two workspaces take half of what is free, and are never smaller than 256 rows
    assert default_chunk_rows("cuda", 128256, 2, 64 << 30) == 2092
    assert default_chunk_rows("cuda", 128256, 2, 1 << 30) == 1046
    assert default_chunk_rows("cuda", 128256, 2, 1 << 20) == 256
