"""Tests of the fingerprint of weights and the keys of sequences: every bit counts, and only content counts."""

import random

import numpy as np
import pytest
import torch

from efface.batching import TokenStore
from efface.reference import DistinctSequences, fingerprint, model_fingerprint, sequence_keys
from support.helpers import random_store

BLOCK = 8 * fingerprint._BLOCK_WORDS  # bytes


def digest(**weights: torch.Tensor) -> bytes:
    return model_fingerprint(weights, {})


def flipped(tensor: torch.Tensor, byte: int, bit: int) -> torch.Tensor:
    copy = tensor.clone()
    copy.view(-1).view(torch.uint8)[byte] ^= 1 << bit
    return copy


@pytest.mark.parametrize(
    ("dtype", "count"),
    [
        pytest.param(torch.bfloat16, BLOCK // 2 + 3, id="two blocks, the second of 6 bytes"),
        pytest.param(torch.float32, BLOCK // 4, id="one full block"),
        pytest.param(torch.float16, 1, id="2 bytes"),
        pytest.param(torch.uint8, 5, id="5 bytes"),
        pytest.param(torch.float64, 7, id="words"),
    ],
)
def test_every_bit_counts(dtype: torch.dtype, count: int) -> None:
    tensor = torch.randint(-100, 100, (count,), generator=torch.Generator().manual_seed(0)).to(dtype)
    rng, size = random.Random(0), tensor.numel() * tensor.element_size()
    seen = {digest(w=tensor)}
    places = {(0, 0), (size - 1, 7), *((rng.randrange(size), rng.randrange(8)) for _ in range(40))}
    for byte, bit in places:
        seen.add(digest(w=flipped(tensor, byte, bit)))
    assert len(seen) == 1 + len(places)


def test_changes_that_cancel_in_a_plain_sum_count() -> None:
    """Two elements that swap places or signs, at every position in a word, and zeros of different length."""
    tensor = torch.arange(1.0, 65.0).bfloat16()
    seen = {digest(w=tensor)}
    for step in (1, 4, 32):
        swapped, negated = tensor.clone(), tensor.clone()
        swapped[[3, 3 + step]] = tensor[[3 + step, 3]]
        negated[[3, 3 + step]] *= -1  # the highest bit of a word
        seen |= {digest(w=swapped), digest(w=negated)}
    seen |= {digest(w=-tensor), digest(w=tensor.flip(0)), digest(w=torch.zeros(64)), digest(w=torch.zeros(65))}
    assert len(seen) == 11


def test_name_shape_dtype_and_settings_count() -> None:
    tensor = torch.arange(12.0)
    bits = tensor.view(torch.int32)
    seen = {
        model_fingerprint({"w": tensor}, {}),
        model_fingerprint({"v": tensor}, {}),
        model_fingerprint({"w": tensor.view(3, 4)}, {}),
        model_fingerprint({"w": bits}, {}),
        model_fingerprint({"w": tensor, "v": tensor}, {}),
        model_fingerprint({"w": tensor, "extra": "state"}, {}),
        model_fingerprint({"w": tensor}, {"rope_theta": 1e4}),
        model_fingerprint({"w": tensor}, {"rope_theta": 1e5}),
    }
    assert len(seen) == 8


def test_only_content_counts() -> None:
    a, b = torch.randn(30, 20), torch.randn(7)
    expected = digest(a=a, b=b, tied=a)
    assert digest(tied=a.clone(), b=b, a=a) == expected  # neither order nor shared memory matters
    columns = a.t().contiguous().t()
    assert columns.stride() != a.stride()
    assert digest(a=columns, b=b, tied=a) == expected
    shifted = torch.cat([b[:1], b])[1:]  # starts inside a word
    assert shifted.storage_offset() == 1
    assert digest(a=a, b=shifted, tied=a) == expected
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert digest(a=a.clone().requires_grad_(), b=b, tied=a) == expected


def test_the_weights_are_left_as_they_were() -> None:
    tensor = torch.randn(100)
    before = tensor.clone()
    digest(w=tensor)
    assert torch.equal(tensor, before)


def test_odd_shapes() -> None:
    seen = {digest(), digest(w=torch.empty(0)), digest(w=torch.empty(0, 3)), digest(w=torch.tensor(1.5))}
    seen.add(digest(w=torch.tensor([1.5])))
    assert len(seen) == 5
    with pytest.raises(ValueError, match="weight 'w': expected a tensor with content, got one on the meta device"):
        digest(w=torch.empty(3, device="meta"))


def test_a_fingerprint_stays_the_same_between_versions() -> None:
    """The digest of an earlier version, so that existing caches stay valid. Increase FORMAT to change it."""
    weights = {"w": torch.arange(10, dtype=torch.int32), "b": torch.ones(3, dtype=torch.bfloat16)}
    assert model_fingerprint(weights, {"a": [1, None]}).hex() == "bae43f3667b2ce504973b896a8ce49d2"


# ---- keys of sequences, and distinct sequences across stores


def store(*rows: tuple[list[int], int]) -> TokenStore:
    return TokenStore.from_sequences([ids for ids, _ in rows], [start for _, start in rows])


def test_tokens_and_labels_decide() -> None:
    rows = [([1, 2, 3], 1), ([1, 2, 3], 2), ([1, 2, 4], 1), ([1, 2], 1), ([1, 2, 3, 0], 1), ([2, 1, 3], 1)]
    assert len(set(sequence_keys(store(*rows)))) == len(rows)
    assert sequence_keys(store(([1, 2, 3], 0))) == sequence_keys(
        store(([1, 2, 3], 1))
    )  # no token predicts the first one
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
