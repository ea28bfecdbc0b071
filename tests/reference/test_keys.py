"""Keys of sequences, and the distinct ones among several stores."""

import numpy as np

from efface.batching import TokenStore
from efface.reference import DistinctSequences, sequence_keys
from support.helpers import random_store


def store(*rows: tuple[list[int], int]) -> TokenStore:
    return TokenStore.from_sequences([ids for ids, _ in rows], [start for _, start in rows])


def test_tokens_and_labels_decide() -> None:
    rows = [([1, 2, 3], 1), ([1, 2, 3], 2), ([1, 2, 4], 1), ([1, 2], 1), ([1, 2, 3, 0], 1), ([2, 1, 3], 1)]
    assert len(set(sequence_keys(store(*rows)))) == len(rows)
    assert sequence_keys(store(([1, 2, 3], 0))) == sequence_keys(
        store(([1, 2, 3], 1))
    )  # nothing predicts a first token
    # 3 is the label start of one and a token of the other
    assert sequence_keys(store(([3, 0, 1, 2], 1)))[0] not in sequence_keys(store(([0, 1, 2, 3], 3)))


def test_place_and_chunks_do_not_matter() -> None:
    whole = random_store(50, seed=1)
    expected = sequence_keys(whole)
    ((ids, offsets, starts),) = whole.chunks
    cut = int(offsets[20])
    empty = (np.empty(0, np.int32), np.zeros(1, np.int64), np.empty(0, np.int64))
    # offsets need not start at 0
    chunks = [(ids[:cut], offsets[:21], starts[:20]), empty, (ids, offsets[20:], starts[20:])]
    assert sequence_keys(TokenStore(chunks)) == expected
    ids.setflags(write=False)
    assert sequence_keys(whole) == expected
    assert sequence_keys(TokenStore.empty()) == []


def test_distinct_sequences_of_two_stores() -> None:
    a, b, c, d = ([1, 2], 1), ([3, 4, 5], 1), ([6, 7], 1), ([3, 4, 5], 2)
    distinct = DistinctSequences([store(a, b, a), store(b, c, d, c)])
    assert len(distinct) == 4
    assert distinct.labels.tolist() == [1, 2, 1, 1]
    located = [(numbers.tolist(), index.tolist()) for numbers, index in distinct.located(np.array([0, 1, 3]))]
    assert located == [([0, 1], [0, 1]), ([3], [2])]
    first, second = distinct.spread(np.array([10.0, 20.0, 30.0, 40.0]))
    assert first.tolist() == [10, 20, 10]
    assert second.tolist() == [20, 30, 40, 30]


def test_no_sequences() -> None:
    distinct = DistinctSequences([])
    assert len(distinct) == 0
    assert list(distinct.located(np.empty(0, np.int64))) == []
