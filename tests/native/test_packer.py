"""efface_native against a naive packer. Imports no torch, so that it also runs under the sanitizers."""

import os
import sys
import threading
import time

import efface_native
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

Store = tuple[np.ndarray, np.ndarray, np.ndarray]
NAMES = ("input_ids", "position_ids", "cu_seqlens", "label_rows", "targets", "row_offsets")


def native(forget: Store, retain: Store) -> list[efface_native.TokenStore]:
    return [efface_native.TokenStore("forget", [forget]), efface_native.TokenStore("retain", [retain])]


def make_store(sequences: list[list[int]], starts: list[int]) -> Store:
    offsets = np.cumsum([0, *map(len, sequences)]).astype(np.int64)
    ids = np.array([token for sequence in sequences for token in sequence], np.int32)
    return ids, offsets, np.array(starts, np.int64)


def naive(chosen: list[tuple[list[int], int]]) -> dict[str, list[int]]:
    """The batch, token by token."""
    out: dict[str, list[int]] = {name: [] for name in NAMES}
    out["cu_seqlens"], out["row_offsets"] = [0], [0]
    for sequence, start in chosen:
        for position, token in enumerate(sequence):
            if position > 0 and position >= start:  # this token is a label; the row before it predicts it
                out["label_rows"].append(len(out["input_ids"]) - 1)
                out["targets"].append(token)
            out["input_ids"].append(token)
            out["position_ids"].append(position)
        out["cu_seqlens"].append(len(out["input_ids"]))
        out["row_offsets"].append(len(out["targets"]))
    return out


Choice = tuple[list[efface_native.TokenStore], np.ndarray, np.ndarray]


def storage_of(words: int) -> np.ndarray:
    """Poisoned, so that an entry nobody wrote shows."""
    return np.full(words, -77)


def parts(storage: np.ndarray, sequences: int, tokens: int, rows: int) -> dict[str, np.ndarray]:
    """Divide the storage up, as documented."""
    sizes = {"input_ids": tokens, "position_ids": tokens, "label_rows": rows, "targets": rows, "sequences": sequences}
    out, at = {}, 0
    for name, size in sizes.items():
        out[name] = storage[at : at + size]
        at += size
    words = (sequences + 2) // 2
    out["cu_seqlens"] = storage[at : at + words].view(np.int32)[: sequences + 1]
    out["roles"] = storage[at + words :].view(np.int8)[:sequences]
    assert len(storage) == at + words + (sequences + 7) // 8
    return out


def run_choice(choice: Choice) -> dict[str, np.ndarray]:
    *size, words = efface_native.measure(*choice)
    storage = storage_of(words)
    lengths, row_offsets, forget_sequences = efface_native.pack(*choice, storage)
    assert forget_sequences == sum(role != 1 for role in choice[1])
    got = parts(storage, *size)
    assert got.pop("roles").tolist() == choice[1].tolist()
    assert got.pop("sequences").tolist() == choice[2].tolist()
    assert np.diff(got["cu_seqlens"]).tolist() == list(lengths)
    return {**got, "row_offsets": np.array(row_offsets)}


def run(forget: Store, retain: Store, roles: np.ndarray, sequences: np.ndarray) -> dict[str, np.ndarray]:
    return run_choice((native(forget, retain), roles, sequences))


sequence_strategy = st.integers(2, 12).flatmap(
    lambda n: st.tuples(st.lists(st.integers(0, 2**31 - 1), min_size=n, max_size=n), st.integers(0, n - 1))
)


@given(
    st.lists(sequence_strategy, min_size=1, max_size=5),
    st.lists(sequence_strategy, min_size=1, max_size=5),
    st.lists(st.tuples(st.booleans(), st.integers(0, 1000)), max_size=9),
)
def test_equals_the_naive_packer(
    forget: list[tuple[list[int], int]], retain: list[tuple[list[int], int]], picks: list[tuple[bool, int]]
) -> None:
    stores = (forget, retain)
    chosen = [(int(role), pick % len(stores[role])) for role, pick in picks]
    roles = np.array([role for role, _ in chosen], np.int8)
    indices = np.array([index for _, index in chosen], np.int64)
    arrays = [make_store([s for s, _ in store], [start for _, start in store]) for store in stores]
    got = run(*arrays, roles, indices)
    expected = naive([stores[role][index] for role, index in chosen])
    for name in NAMES:
        assert got[name].tolist() == expected[name], name


def small() -> tuple[Store, Store, np.ndarray, np.ndarray]:
    return (
        make_store([[1, 2, 3], [4, 5]], [1, 1]),
        make_store([[6, 7, 8, 9]], [2]),
        np.array([0, 1], np.int8),
        np.array([1, 0], np.int64),
    )


def small_choice() -> tuple[list[efface_native.TokenStore], np.ndarray, np.ndarray]:
    forget, retain, roles, sequences = small()
    return native(forget, retain), roles, sequences


def test_a_small_batch_by_hand() -> None:
    out = run(*small())
    assert out["input_ids"].tolist() == [4, 5, 6, 7, 8, 9]
    assert out["position_ids"].tolist() == [0, 1, 0, 1, 2, 3]
    assert out["cu_seqlens"].tolist() == [0, 2, 6]
    assert out["label_rows"].tolist() == [0, 3, 4]
    assert out["targets"].tolist() == [5, 8, 9]
    assert out["row_offsets"].tolist() == [0, 1, 3]


def test_an_empty_choice_and_empty_stores() -> None:
    empty = make_store([], [])
    out = run(empty, empty, np.empty(0, np.int8), np.empty(0, np.int64))
    assert out["cu_seqlens"].tolist() == [0]
    assert out["row_offsets"].tolist() == [0]


INT64 = np.iinfo(np.int64)


@pytest.mark.parametrize(
    ("forget", "message"),
    [
        (make_store([], []), "`forget` sequence: expected an index in 0 .. -1, got 1"),
        ((np.zeros(5, np.int32), np.array([0, 3, 9], np.int64), np.array([1, 1], np.int64)), "spans 3 .. 9"),
        ((np.zeros(5, np.int32), np.array([0, 3, 2], np.int64), np.array([1, 1], np.int64)), "spans 3 .. 2"),
        ((np.zeros(5, np.int32), np.array([0, -1, 2], np.int64), np.array([1, 1], np.int64)), "spans -1 .. 2"),
        ((np.zeros(5, np.int32), np.array([0, INT64.min, INT64.max]), np.array([1, 1], np.int64)), "ascending range"),
        ((np.zeros(5, np.int32), np.empty(0, np.int64), np.empty(0, np.int64)), "expected at least one entry"),
        ((np.zeros(5, np.int32), np.array([0, 3, 5], np.int64), np.array([1], np.int64)), "expected 2 entries"),
        ((np.zeros(5, np.int32), np.array([0, 3, 5], np.int64), np.array([1, -2], np.int64)), "sequence 1 has -2"),
        ((np.zeros(5, np.int32), np.array([0, 3, 5], np.int64), np.array([1, 2], np.int64)), "has no label"),
        ((np.zeros(5, np.int32), np.array([0, 3, 5], np.int64), np.array([1, INT64.max])), "has no label"),
        ((np.zeros(5, np.int32), np.array([0, 4, 5], np.int64), np.array([1, 0], np.int64)), "1 tokens end before"),
        ((np.zeros(5, np.int32), np.array([0, 5, 5], np.int64), np.array([1, 0], np.int64)), "0 tokens end before"),
    ],
)
def test_hostile_stores_are_refused_with_their_values(forget: Store, message: str) -> None:
    _, retain, roles, sequences = small()
    with pytest.raises(ValueError, match=message):
        efface_native.measure(native(forget, retain), roles, sequences)


@pytest.mark.parametrize(
    ("roles", "sequences", "message"),
    [
        ([0, 2], [0, 0], r"expected a store in 0 .. 1 \(0 forget, 1 retain, 2 alternate\), got 2 at position 1"),
        ([0, -1], [0, 0], "got -1 at position 1"),
        ([0, 1], [2, 0], "`forget` sequence: expected an index in 0 .. 1, got 2"),
        ([0, 1], [0, -1], "`retain` sequence: expected an index in 0 .. 0, got -1"),
        ([0], [0, 0], "expected equal lengths, got 1 and 2"),
    ],
)
def test_hostile_choices_are_refused(roles: list[int], sequences: list[int], message: str) -> None:
    forget, retain, _, _ = small()
    with pytest.raises(ValueError, match=message):
        efface_native.measure(native(forget, retain), np.array(roles, np.int8), np.array(sequences, np.int64))


@pytest.mark.parametrize("by", [-1, 1])
def test_storage_of_the_wrong_size_is_refused_before_anything_is_written(by: int) -> None:
    choice = small_choice()
    words = efface_native.measure(*choice)[-1]
    storage = storage_of(words + by)
    with pytest.raises(ValueError, match=f"`storage`: expected {words} words, got {words + by}"):
        efface_native.pack(*choice, storage)
    assert (storage == -77).all()


def test_dtypes_layouts_and_types_are_refused() -> None:
    (ids, offsets, starts), _, roles, sequences = small()

    def store(*chunk: object) -> efface_native.TokenStore:
        return efface_native.TokenStore("forget", [chunk])

    with pytest.raises(TypeError, match="`ids`: expected dtype int32, got int64"):
        store(ids.astype(np.int64), offsets, starts)
    with pytest.raises(TypeError, match="`offsets`: expected a NumPy array"):
        store(ids, [0, 3, 5], starts)
    with pytest.raises(TypeError, match=r"expected tuples \(ids, offsets, label_starts\), got"):
        store(ids, offsets)
    with pytest.raises(TypeError, match=r"expected tuples \(ids, offsets, label_starts\), got"):
        efface_native.TokenStore("forget", [ids])
    with pytest.raises(ValueError, match="`ids`: expected a contiguous 1-D array, got 2 dim"):
        store(ids[:, None], offsets, starts)
    with pytest.raises(ValueError, match="strided"):
        store(np.zeros(10, np.int32)[::2], offsets, starts)
    stores, _, _ = small_choice()
    with pytest.raises(TypeError, match="`roles`: expected dtype int8"):
        efface_native.measure(stores, roles.astype(np.int32), sequences)
    with pytest.raises(TypeError, match="`stores`: expected TokenStore, got None"):
        efface_native.measure([None, *stores], roles, sequences)
    storage = storage_of(efface_native.measure(stores, roles, sequences)[-1])
    storage.flags.writeable = False
    with pytest.raises(ValueError, match="`storage`: expected a writeable array"):
        efface_native.pack(stores, roles, sequences, storage)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        efface_native.pack(stores, roles, sequences)


@given(st.lists(st.lists(sequence_strategy, max_size=4), max_size=4), st.data())
def test_chunks_are_one_store(chunks: list[list[tuple[list[int], int]]], data: st.DataObject) -> None:
    """Empty chunks, and chunks that begin in the middle of their arrays, as a sliced Arrow array does."""
    flat = [item for chunk in chunks for item in chunk]
    arrays = []
    for chunk in chunks:
        ids, offsets, starts = make_store([s for s, _ in chunk], [start for _, start in chunk])
        arrays.append((np.concatenate([np.full(3, -5, np.int32), ids]), offsets + 3, starts))
    store = efface_native.TokenStore("retain", arrays)
    assert len(store) == len(flat)
    picks = data.draw(st.lists(st.integers(0, len(flat) - 1), max_size=9)) if flat else []
    out = run_choice(([store], np.zeros(len(picks), np.int8), np.array(picks, np.int64)))
    expected = naive([flat[pick] for pick in picks])
    for name in NAMES:
        assert out[name].tolist() == expected[name], name


def test_a_store_keeps_its_arrays_alive() -> None:
    store = efface_native.TokenStore("forget", iter([make_store([[1, 2, 3]] * 1000, [1] * 1000)]))
    np.full(3000, 7, np.int32)  # likely to land where the arrays would have been freed
    out = run_choice(([store], np.zeros(1, np.int8), np.array([999])))
    assert out["input_ids"].tolist() == [1, 2, 3]


def test_alternates_are_the_third_store() -> None:
    stores = [efface_native.TokenStore(name, [make_store([[i, i + 1]], [1])]) for i, name in enumerate("far")]
    out = run_choice((stores, np.array([0, 2, 1], np.int8), np.zeros(3, np.int64)))
    assert out["input_ids"].tolist() == [0, 1, 2, 3, 1, 2]


def test_two_gibitokens_are_refused_without_being_allocated() -> None:
    """The same long sequence, chosen often: the sum passes 2^31 while the store is small."""
    stores = [efface_native.TokenStore("forget", [make_store([[1] * 1_000_000], [1])])]
    roles, sequences = np.zeros(2148, np.int8), np.zeros(2148, np.int64)
    with pytest.raises(ValueError, match=r"fewer than 2\^31 tokens, got at least 2148000000"):
        efface_native.measure(stores, roles, sequences)
    assert efface_native.measure(stores, roles[:2147], sequences[:2147])[1] == 2_147_000_000


def test_the_gil_is_released() -> None:
    """Another Python thread makes progress within the call that packs a large batch."""
    stores = [efface_native.TokenStore("forget", [make_store([list(range(2000))] * 10, [1] * 10)])]
    roles, sequences = np.zeros(5000, np.int8), np.arange(5000, dtype=np.int64) % 10
    storage = storage_of(efface_native.measure(stores, roles, sequences)[-1])
    ticks, within = 0, 0

    def work() -> None:
        nonlocal within
        before = ticks
        efface_native.pack(stores, roles, sequences, storage)
        within = ticks - before

    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)  # no thread is made to hand the lock on: within the call it is released or not
    try:
        for _ in range(20):  # one may be over before this thread has its turn
            worker = threading.Thread(target=work)
            worker.start()
            while worker.is_alive():
                ticks += 1
                time.sleep(0)
            if within:
                break
    finally:
        sys.setswitchinterval(interval)
    assert within > 0
    assert storage[0] == 0
    assert storage[1999] == 1999


def test_the_module_under_test_is_the_one_that_was_built_for_it() -> None:
    """`make sanitize` must not test the ordinary build by accident."""
    assert os.environ.get("EFFACE_EXPECT_NATIVE", "") in efface_native.__file__
