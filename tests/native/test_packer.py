"""Tests of efface_native: the packer against a naive one, and the plan of an epoch. No torch, for the sanitizers."""

import itertools
import os
import sys
import threading
import time
from typing import Any

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
    """Build the batch token by token."""
    out: dict[str, list[int]] = {name: [] for name in NAMES}
    out["cu_seqlens"], out["row_offsets"] = [0], [0]
    for sequence, start in chosen:
        for position, token in enumerate(sequence):
            if position > 0 and position >= start:  # the token is a label, and the row before it predicts it
                out["label_rows"].append(len(out["input_ids"]) - 1)
                out["targets"].append(token)
            out["input_ids"].append(token)
            out["position_ids"].append(position)
        out["cu_seqlens"].append(len(out["input_ids"]))
        out["row_offsets"].append(len(out["targets"]))
    return out


Choice = tuple[list[efface_native.TokenStore], np.ndarray, np.ndarray]


def storage_of(words: int) -> np.ndarray:
    """Return storage filled with a poison value, so that entries that were not written are visible."""
    return np.full(words, -77)


def parts(storage: np.ndarray, sequences: int, tokens: int, rows: int, path_tokens: int) -> dict[str, np.ndarray]:
    """Split the storage into its parts, as documented."""
    layout = [
        ("input_ids", np.int64, tokens),
        ("position_ids", np.int64, tokens),
        ("label_rows", np.int64, rows),
        ("targets", np.int64, rows),
        ("sequences", np.int64, sequences),
        ("cu_seqlens", np.int32, sequences + 1),
        ("roles", np.int8, sequences),
    ]
    if path_tokens:
        layout += [("paths", np.int32, path_tokens), ("cu_paths", np.int32, sequences + 1)]
    out, at = {}, 0
    for name, dtype, size in layout:
        words = -(-size * np.dtype(dtype).itemsize // 8)
        out[name] = storage[at : at + words].view(dtype)[:size]
        at += words
    assert len(storage) == at
    return out


def run_choice(choice: Choice, **settings: bool) -> dict[str, np.ndarray]:
    *size, words = efface_native.measure(*choice, **settings)
    storage = storage_of(words)
    lengths, segment_lengths, row_offsets, forget_sequences = efface_native.pack(*choice, storage, **settings)
    assert forget_sequences == sum(role != 1 for role in choice[1])
    got = parts(storage, *size)
    assert got.pop("roles").tolist() == choice[1].tolist()
    assert got.pop("sequences").tolist() == choice[2].tolist()
    assert np.diff(got["cu_seqlens"]).tolist() == list(segment_lengths)
    return {**got, "row_offsets": np.array(row_offsets), "lengths": np.array(lengths)}


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
    assert got["lengths"].tolist() == np.diff(got["cu_seqlens"]).tolist()
    assert "paths" not in got


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
    """Empty chunks, and chunks that begin in the middle of their arrays, like a sliced Arrow array."""
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
    np.full(3000, 7, np.int32)  # likely to reuse the memory of the arrays if they were freed
    out = run_choice(([store], np.zeros(1, np.int8), np.array([999])))
    assert out["input_ids"].tolist() == [1, 2, 3]


def test_alternates_are_the_third_store() -> None:
    stores = [efface_native.TokenStore(name, [make_store([[i, i + 1]], [1])]) for i, name in enumerate("far")]
    out = run_choice((stores, np.array([0, 2, 1], np.int8), np.zeros(3, np.int64)))
    assert out["input_ids"].tolist() == [0, 1, 2, 3, 1, 2]


def test_two_gibitokens_are_refused_without_being_allocated() -> None:
    """The same long sequence is chosen often, so that the sum exceeds 2^31 although the store is small."""
    stores = [efface_native.TokenStore("forget", [make_store([[1] * 1_000_000], [1])])]
    roles, sequences = np.zeros(2148, np.int8), np.zeros(2148, np.int64)
    with pytest.raises(ValueError, match=r"fewer than 2\^31 tokens, got at least 2148000000"):
        efface_native.measure(stores, roles, sequences)
    assert efface_native.measure(stores, roles[:2147], sequences[:2147])[1] == 2_147_000_000


# ---- shared beginnings: against a tree of nested dicts


Labelled = tuple[list[int], int]  # tokens, first label


def naive_tree(chosen: list[Labelled], *, share: bool, last_tokens: bool) -> dict[str, list[int]]:
    """Build the batch token by token; a node is [stored index, {next token: node}]."""
    root: list[Any] = [None, {}]
    out: dict[str, list[int]] = {name: [] for name in (*NAMES, "paths", "lengths")}
    out["cu_seqlens"], out["row_offsets"], out["cu_paths"] = [0], [0], [0]
    for sequence, start in chosen:
        run = sequence if last_tokens else sequence[:-1]
        node, path = root, []
        for position, token in enumerate(run):
            known = share and token in node[1]
            has_own = len(out["input_ids"]) > out["cu_seqlens"][-1]
            if not known or (position == len(run) - 1 and not has_own):
                path.append(len(out["input_ids"]))
                out["input_ids"].append(token)
                out["position_ids"].append(position)
                if not known:
                    node[1][token] = [path[-1], {}]
            else:
                path.append(node[1][token][0])
            node = node[1][token]
        first_label = max(start, 1)
        out["label_rows"] += path[first_label - 1 : len(sequence) - 1]
        out["targets"] += sequence[first_label:]
        out["paths"] += path
        out["cu_paths"].append(len(out["paths"]))
        out["cu_seqlens"].append(len(out["input_ids"]))
        out["row_offsets"].append(len(out["targets"]))
        out["lengths"].append(len(sequence))
    if len(out["paths"]) == len(out["input_ids"]):
        del out["paths"], out["cu_paths"]
    return out


def check_tree(stores: list[list[Labelled]], picks: list[tuple[int, int]]) -> dict[str, np.ndarray]:
    """Compare all settings with the naive tree; return the batch with sharing and without last tokens."""
    lent = [
        efface_native.TokenStore(name, [make_store([s for s, _ in store], [start for _, start in store])])
        for name, store in zip(("forget", "retain", "alternate"), stores, strict=False)
    ]
    choice = (lent, np.array([role for role, _ in picks], np.int8), np.array([i for _, i in picks], np.int64))
    chosen = [stores[role][index] for role, index in picks]
    got: dict[str, np.ndarray] = {}
    for share, last_tokens in itertools.product((False, True), (True, False)):
        got = run_choice(choice, share=share, last_tokens=last_tokens)
        expected = naive_tree(chosen, share=share, last_tokens=last_tokens)
        assert {name: part.tolist() for name, part in got.items()} == expected
        check_paths(got, chosen, last_tokens=last_tokens)
    return got


def check_paths(batch: dict[str, np.ndarray], chosen: list[Labelled], *, last_tokens: bool) -> None:
    """Check what attention and loss rely on, from the batch alone: paths read the sequences, segments end them."""
    tokens = np.arange(len(batch["input_ids"]))
    paths, cu_paths = batch.get("paths", tokens), batch.get("cu_paths", batch["cu_seqlens"])
    assert len(paths) > len(tokens) or "paths" not in batch
    for s, (sequence, _) in enumerate(chosen):
        path = paths[cu_paths[s] : cu_paths[s + 1]]
        assert batch["input_ids"][path].tolist() == (sequence if last_tokens else sequence[:-1])
        assert batch["position_ids"][path].tolist() == list(range(len(path)))
        segment = tokens[batch["cu_seqlens"][s] : batch["cu_seqlens"][s + 1]]
        assert len(segment) > 0
        assert path[len(path) - len(segment) :].tolist() == segment.tolist()
        assert (path[: len(path) - len(segment)] < segment[0]).all()  # stored by earlier sequences


def labelled(*sequences: list[int]) -> list[Labelled]:
    return [(sequence, 1) for sequence in sequences]


@pytest.mark.parametrize(
    ("sequences", "segments", "paths"),
    [
        pytest.param([[1, 2, 9], [3, 4, 9]], [2, 2], None, id="nothing"),
        pytest.param([[1, 2, 3, 9], [1, 2, 4, 9]], [3, 1], [0, 1, 2, 0, 1, 3], id="two-of-three"),
        pytest.param([[1, 2, 3, 9]] * 3, [3, 1, 1], [0, 1, 2, 0, 1, 3, 0, 1, 4], id="identical"),
        pytest.param([[1, 2, 9], [1, 2, 8]], [2, 1], [0, 1, 0, 2], id="identical-but-for-the-last-token"),
        pytest.param([[1, 9], [1, 9]], [1, 1], None, id="one-token-each"),
        pytest.param([[1, 2, 3, 4, 9], [1, 2, 9]], [4, 1], [0, 1, 2, 3, 0, 4], id="prefix-after"),
        pytest.param([[1, 2, 9], [1, 2, 3, 4, 9]], [2, 2], [0, 1, 0, 1, 2, 3], id="prefix-before"),
        # the third sequence goes on from the first one's token 2, not from the copy that the second one stores
        pytest.param([[1, 2, 9], [1, 2, 9], [1, 2, 3, 9]], [2, 1, 1], [0, 1, 0, 2, 0, 1, 3], id="after-a-copy"),
        pytest.param(
            [[1, 2, 3, 4, 9], [1, 5, 6, 7, 9], [1, 5, 6, 8, 9], [1, 5, 6, 8, 2, 9], [1, 2, 9]],
            [4, 3, 1, 1, 1],
            [0, 1, 2, 3, 0, 4, 5, 6, 0, 4, 5, 7, 0, 4, 5, 7, 8, 0, 9],
            id="depth-4",
        ),
        # a common token after a difference is no common beginning
        pytest.param([[1, 2, 3, 9], [4, 2, 3, 9]], [3, 3], None, id="equal-ends"),
    ],
)
def test_shared_beginnings_by_hand(sequences: list[list[int]], segments: list[int], paths: list[int] | None) -> None:
    got = check_tree([labelled(*sequences)], [(0, i) for i in range(len(sequences))])
    assert np.diff(got["cu_seqlens"]).tolist() == segments
    assert (got["paths"].tolist() if "paths" in got else None) == paths


def test_a_question_and_two_answers_share_their_label_row() -> None:
    """The last prompt token predicts the first token of both answers, so it is two label rows, with two targets."""
    got = check_tree([[([1, 2, 5, 9], 2)], [([1, 3, 9], 1)], [([1, 2, 6, 9], 2)]], [(0, 0), (2, 0), (1, 0)])
    assert got["input_ids"].tolist() == [1, 2, 5, 6, 3]
    assert got["label_rows"].tolist() == [1, 2, 1, 3, 0, 4]
    assert got["targets"].tolist() == [5, 9, 6, 9, 3, 9]


# Three of four tokens are 0, so that sequences share, repeat and contain one another.
few_tokens = st.integers(2, 9).flatmap(
    lambda n: st.tuples(st.lists(st.sampled_from([0, 0, 0, 1]), min_size=n, max_size=n), st.integers(0, n - 1))
)


@given(st.lists(st.lists(few_tokens, min_size=1, max_size=6), min_size=1, max_size=3), st.data())
def test_equals_the_naive_tree(stores: list[list[Labelled]], data: st.DataObject) -> None:
    roles = data.draw(st.lists(st.integers(0, len(stores) - 1), max_size=12))
    check_tree(stores, [(role, data.draw(st.integers(0, len(stores[role]) - 1))) for role in roles])


@given(st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_ragged_trees(depth: int, seed: int) -> None:
    """Branches of different lengths at every level, in an order that does not follow the tree."""
    rng = np.random.default_rng(seed)
    sequences: list[list[int]] = [[]]
    for _ in range(depth):
        children = [(s, child) for s in sequences for child in range(rng.integers(1, 4))]
        sequences = [[*s, child, *rng.integers(9, size=rng.integers(1, 20)).tolist()] for s, child in children]
    rng.shuffle(sequences)
    check_tree([labelled(*sequences)], [(0, int(i)) for i in rng.integers(len(sequences), size=2 * len(sequences))])


@pytest.mark.parametrize("length", [15, 16, 17, 31, 32, 33, 48, 100])
def test_every_length_of_a_common_beginning(length: int) -> None:
    """Tokens are compared in blocks of 16; each position of the first difference, and each end of a sequence."""
    whole = list(range(100, 101 + length))
    sequences = [whole] + [[*whole[:at], -1, *whole[at + 1 :]] for at in range(length)]
    sequences += [whole[:end] for end in range(2, length)]
    check_tree([labelled(*sequences)], [(0, i) for i in range(len(sequences))])


def test_two_thousand_branches_at_one_token() -> None:
    sequences = [[7, 7, i, j, 9] for i in range(2000) for j in range(2)]
    got = check_tree([labelled(*sequences)], [(0, i) for i in range(len(sequences))])
    assert len(got["input_ids"]) == 2 + 2000 * 3


@pytest.mark.parametrize("by", [-1, 1])
def test_storage_without_or_with_too_many_paths_is_refused_before_anything_is_written(by: int) -> None:
    store = efface_native.TokenStore("forget", [make_store([[1, 2, 3], [1, 2, 4]], [1, 1])])
    choice = ([store], np.zeros(2, np.int8), np.arange(2))
    words = efface_native.measure(*choice, share=True)[-1]
    unshared = efface_native.measure(*choice)[-1]
    for size in (words + by, unshared):
        storage = storage_of(size)
        with pytest.raises(ValueError, match=f"`storage`: expected {words} words, got {size}"):
            efface_native.pack(*choice, storage, share=True)
        assert (storage == -77).all()


@pytest.mark.parametrize(("roles", "sequences"), [([0, 2], [0, 0]), ([0, 1], [0, 9]), ([0], [0, 0])])
def test_a_refused_choice_leaves_the_storage_as_it_was(roles: list[int], sequences: list[int]) -> None:
    stores, _, _ = small_choice()
    storage = storage_of(100)
    for share in (False, True):
        with pytest.raises(ValueError, match="expected"):
            efface_native.pack(stores, np.array(roles, np.int8), np.array(sequences), storage, share=share)
        assert (storage == -77).all()


def test_paths_of_two_gibitokens_are_refused() -> None:
    """cu_paths is int32 too, so shared tokens count in each sequence."""
    stores = [efface_native.TokenStore("forget", [make_store([[1] * 1_000_000], [1])])]
    choice = (stores, np.zeros(2148, np.int8), np.zeros(2148, np.int64))
    with pytest.raises(ValueError, match=r"fewer than 2\^31 tokens, got at least 2148000000"):
        efface_native.measure(*choice, share=True)


# ---- common prefixes of stores


def naive_prefix(one: list[int], other: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


any_tokens = st.lists(st.sampled_from([0, 0, 0, 0, 0, 1, -1]), max_size=40)


@given(st.lists(st.tuples(any_tokens, any_tokens), max_size=9), any_tokens, st.integers(0, 9))
def test_common_prefixes(pairs: list[tuple[list[int], list[int]]], prefix: list[int], cut: int) -> None:
    """Sequences can be empty and need no labels; chunks are one store."""

    def store(sequences: list[list[int]], cut: int) -> efface_native.TokenStore:
        chunks = [make_store(own, [9] * len(own)) for own in (sequences[:cut], sequences[cut:])]
        return efface_native.TokenStore("store", chunks)

    ones, others = [one for one, _ in pairs], [other for _, other in pairs]
    got = efface_native.prefix_lengths(store(ones, cut), np.array(prefix, np.int32))
    assert got.dtype == np.int64
    assert got.tolist() == [naive_prefix(one, prefix) for one in ones]
    got = efface_native.pair_prefix_lengths(store(ones, cut), store(others, 3))
    assert got.dtype == np.int64
    assert got.tolist() == [naive_prefix(one, other) for one, other in pairs]


def test_common_prefixes_of_invalid_stores_are_refused() -> None:
    good = efface_native.TokenStore("retain", [make_store([[1, 2, 3], [4, 5]], [1, 1])])
    bad = efface_native.TokenStore(
        "forget", [(np.zeros(5, np.int32), np.array([0, 3, 9], np.int64), np.array([1, 1], np.int64))]
    )
    with pytest.raises(ValueError, match="`forget` offsets: sequence 1 spans 3 .. 9"):
        efface_native.prefix_lengths(bad, np.zeros(2, np.int32))
    for stores in ((good, bad), (bad, good)):
        with pytest.raises(ValueError, match="`forget` offsets: sequence 1 spans 3 .. 9"):
            efface_native.pair_prefix_lengths(*stores)
    with pytest.raises(TypeError, match="`prefix`: expected dtype int32, got int64"):
        efface_native.prefix_lengths(good, np.zeros(2, np.int64))
    one = efface_native.TokenStore("retain", [make_store([[1, 2]], [1])])
    message = "`one`, `other`: expected stores with equal numbers of sequences, got 2 and 1"
    with pytest.raises(ValueError, match=message):
        efface_native.pair_prefix_lengths(good, one)


def test_settings_are_keyword_only() -> None:
    stores, roles, sequences = small_choice()
    with pytest.raises(TypeError, match="incompatible function arguments"):
        efface_native.measure(stores, roles, sequences, True)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        efface_native.pack(stores, roles, sequences, storage_of(50), True)


def test_the_gil_is_released() -> None:
    """Another Python thread makes progress during the call that packs a large batch."""
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
    # no forced thread switches, so that the other thread runs only if the call releases the lock
    sys.setswitchinterval(60)
    try:
        for _ in range(20):  # the call can end before the other thread runs
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


# ---- the plan of an epoch: its guarantees as properties, its draws against NumPy's Philox


FORGET, RETAIN, ALTERNATE = 0, 1, 2
SAMPLINGS = ("random", "cycle", "paired")
NONE = np.empty(0, np.int64)


def plan(forget: Any, retain: Any, alternates: Any = NONE, **changes: Any) -> dict[str, Any]:
    settings = {
        "pairs_per_step": 4,
        "token_budget": 64,
        "shared_tokens": 0,
        "world_size": 1,
        "seed": 0,
        "epoch": 0,
        "retain_sampling": "random",
        "drop_last": False,
        **changes,
    }
    arrays = (np.asarray(lengths, np.int64) for lengths in (forget, retain, alternates))
    return efface_native.plan_epoch(*arrays, **settings)


# ---- the draws, implemented independently with NumPy's Philox4x64-10 ----


def word(seed: int, stream: int, round_: int, index: int) -> int:
    """Return word index % 4 of block (index

    4, round, 0, 0). NumPy increments the counter before it generates.
    """
    counter = (index // 4 + (round_ << 64) - 1) % 2**256
    block = np.random.Philox(key=np.array([seed, stream], np.uint64), counter=counter).random_raw(4)
    return int(block[index % 4])


def below(seed: int, stream: int, round_: int, index: int, bound: int) -> int:
    return (word(seed, stream, round_, index) * bound) >> 64


def shuffled(seed: int, stream: int, round_: int, count: int) -> list[int]:
    order = list(range(count))
    for i in range(count - 1, 0, -1):
        j = below(seed, stream, round_, i, i + 1)
        order[i], order[j] = order[j], order[i]
    return order


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(1, 40), st.integers(1, 40))
def test_draws_are_philox(seed: int, epoch: int, forget: int, retain: int) -> None:
    order = shuffled(seed, 1, epoch, forget)
    made = plan([3] * forget, [3] * retain, seed=seed, epoch=epoch)
    assert made["forget"].tolist() == order
    assert made["retain"].tolist() == [below(seed, 2, epoch, i, retain) for i in range(forget)]
    epoch %= 2**20  # where epoch * pairs does not overflow
    made = plan([3] * forget, [3] * retain, seed=seed, epoch=epoch, retain_sampling="cycle")
    numbers = [epoch * forget + i for i in range(forget)]
    rounds = {number // retain: shuffled(seed, 3, number // retain, retain) for number in numbers}
    assert made["retain"].tolist() == [rounds[number // retain][number % retain] for number in numbers]


def test_the_published_test_vector() -> None:
    """Random123's known answer for philox4x64-10 with all counters and keys zero."""
    assert word(0, 0, 0, 0) == 0x16554D9ECA36314C
    assert np.random.Philox(key=0, counter=2**256 - 1).random_raw() == 0x16554D9ECA36314C


# ---- guarantees ----

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=40)
cases = st.fixed_dictionaries(
    {
        "forget": lengths,
        "retain": lengths,
        "with_alternates": st.booleans(),
        "pairs_per_step": st.integers(1, 50),
        "token_budget": st.integers(1, 200),
        "shared_tokens": st.sampled_from([0, 0, 1, 24, 44, 199, 200, 201]),
        "world_size": st.sampled_from([1, 2, 3, 4, 8]),
        "retain_sampling": st.sampled_from(SAMPLINGS),
        "drop_last": st.booleans(),
        "seed": st.integers(0, 2**32),
        "epoch": st.integers(0, 5),
    }
)


def items_of(made: dict[str, Any], batch: int) -> list[tuple[int, int]]:
    own = slice(made["batch_offsets"][batch], made["batch_offsets"][batch + 1])
    return list(zip(made["roles"][own].tolist(), made["sequences"][own].tolist(), strict=True))


@given(cases)
def test_guarantees(case: dict[str, Any]) -> None:
    forget, retain = case.pop("forget"), case.pop("retain")
    if case["retain_sampling"] == "paired":
        retain = (retain * len(forget))[: len(forget)]
    alternates = [7 + i % 5 for i in range(len(forget))] if case.pop("with_alternates") else []
    if case["drop_last"] and len(forget) < case["pairs_per_step"]:
        with pytest.raises(ValueError, match="`drop_last`"):
            plan(forget, retain, alternates, **case)
        return
    made = plan(forget, retain, alternates, **case)
    per_step, budget, world = case["pairs_per_step"], case["token_budget"], case["world_size"]
    shared = case["shared_tokens"]
    tokens = [forget, retain, alternates]

    # every forget sequence exactly once, except those of a dropped last step
    planned = len(forget) // per_step * per_step if case["drop_last"] else len(forget)
    assert len(set(made["forget"].tolist())) == len(made["forget"]) == len(made["retain"]) == planned
    assert set(made["forget"].tolist()) <= set(range(len(forget)))

    steps = len(made["step_offsets"]) - 1
    assert steps == -(-planned // per_step)
    units = [n + a for n, a in itertools.zip_longest(forget, alternates, fillvalue=0)]
    for step in range(steps):
        own = slice(step * per_step, (step + 1) * per_step)
        first, last = made["step_offsets"][step : step + 2]
        micro_batches = [items_of(made, batch) for batch in range(first, last)]
        # the micro-batches contain exactly the step's pairs
        expected = [(FORGET, i) for i in made["forget"][own].tolist()]
        expected += [(RETAIN, i) for i in made["retain"][own].tolist()]
        expected += [(ALTERNATE, i) for i in made["forget"][own].tolist()] if alternates else []
        assert sorted(item for items in micro_batches for item in items) == sorted(expected)
        # each rank has the same number of micro-batches, and token counts differ by at most the longest sequence
        assert len(micro_batches) % world == 0
        sums = [sum(tokens[role][i] for items in micro_batches[r::world] for role, i in items) for r in range(world)]
        longest = max([units[i] for i in made["forget"][own]] + [retain[i] for i in made["retain"][own]])
        assert max(sums) - min(sums) <= longest
        for batch, items in zip(range(first, last), micro_batches, strict=True):
            total = sum(tokens[role][i] for role, i in items)
            assert made["batch_tokens"][batch] == (total + shared if items else 0)
            # within the budget with the shared tokens, or a single sequence (with its alternate)
            assert not items or total + shared <= budget or len({role for role, _ in items} - {ALTERNATE}) == 1
            assert not items or total + shared <= budget or len({i for _, i in items}) == 1
            # forget sequences, each followed by its alternate, then retain sequences
            forgotten = [i for role, i in items if role == FORGET]
            pair = [FORGET, ALTERNATE] if alternates else [FORGET]
            ahead = [(role, i) for i in forgotten for role in pair]
            assert items[: len(ahead)] == ahead
            assert all(role == RETAIN for role, _ in items[len(ahead) :])
    over = [units[i] for i in made["forget"]] + [retain[i] for i in made["retain"]]
    assert made["over_budget"] == sum(n + shared > budget for n in over)


@given(cases)
def test_the_pairs_of_a_step_depend_on_neither_ranks_nor_budget(case: dict[str, Any]) -> None:
    forget, retain = case.pop("forget"), case.pop("retain")
    case.pop("with_alternates")
    case.update(drop_last=False, retain_sampling="random")
    first = plan(forget, retain, **case)
    for world, budget, shared in itertools.product((1, 2, 4, 8), (1, 37, 10_000), (0, 30)):
        made = plan(forget, retain, **{**case, "world_size": world, "token_budget": budget, "shared_tokens": shared})
        assert made["forget"].tolist() == first["forget"].tolist()
        assert made["retain"].tolist() == first["retain"].tolist()


def lower_bound(tokens: int, budget: int) -> int:
    return -(-tokens // budget)


def test_shared_tokens_are_counted_once_per_micro_batch() -> None:
    """Ten units of 10 tokens, budget 64: 44 shared tokens leave room for two units, as a budget of 20 does."""
    made = plan([10] * 5, [10] * 5, pairs_per_step=5, shared_tokens=44)
    assert made["batch_tokens"].tolist() == [64] * 5
    alone = plan([10] * 5, [10] * 5, pairs_per_step=5, token_budget=20)
    for name in ("forget", "retain", "roles", "sequences", "batch_offsets", "step_offsets"):
        assert made[name].tolist() == alone[name].tolist(), name
    assert alone["batch_tokens"].tolist() == [20] * 5


@pytest.mark.parametrize("shared", [55, 63, 64, 65, 2**31 - 1])
def test_a_budget_without_room_beside_the_shared_tokens(shared: int) -> None:
    """Each sequence, with its alternate, gets its own micro-batch."""
    made = plan([5] * 4, [10] * 4, [5] * 4, shared_tokens=shared)
    assert made["over_budget"] == 8
    assert made["batch_tokens"].tolist() == [10 + shared] * 8
    # an empty micro-batch has no shared tokens
    assert plan([5], [10], world_size=4, shared_tokens=shared)["batch_tokens"].tolist() == [
        10 + shared,
        5 + shared,
        0,
        0,
    ]


def test_few_micro_batches() -> None:
    """Best-fit decreasing on 256 sequences of TOFU-like lengths needs as few micro-batches as their sum allows."""
    rng = np.random.default_rng(0)
    forget, retain = rng.integers(20, 140, 128), rng.integers(20, 140, 128)
    made = plan(forget, retain, pairs_per_step=128, token_budget=1024, retain_sampling="paired")
    assert len(made["batch_tokens"]) == lower_bound(int(forget.sum() + retain.sum()), 1024)
    full = made["batch_tokens"][:-1]
    assert full.mean() / 1024 > 0.99
    assert (np.diff(made["batch_tokens"]) <= 0).all()  # the least full batch comes last


def test_cycling_takes_every_retain_sequence_before_any_comes_again() -> None:
    """14 epochs of 5 pairs are 70 draws: ten rounds over 7 sequences, across the ends of epochs."""
    epochs = [plan([9] * 5, [9] * 7, epoch=e, retain_sampling="cycle")["retain"] for e in range(14)]
    rounds = np.concatenate(epochs).reshape(10, 7)
    assert all(sorted(row) == list(range(7)) for row in rounds.tolist())
    assert len({tuple(row) for row in rounds.tolist()}) > 1


def test_random_draws_are_independent_of_the_epoch_before_and_even() -> None:
    drawn = np.concatenate([plan([9] * 1000, [9] * 10, epoch=e)["retain"] for e in range(20)])
    counts = np.bincount(drawn, minlength=10)
    assert ((counts > 1800) & (counts < 2200)).all()  # 2000 expected, standard deviation 42


def test_pairing_keeps_the_index() -> None:
    made = plan([9] * 6, [9] * 6, retain_sampling="paired")
    assert made["retain"].tolist() == made["forget"].tolist()


def test_one_set_alone() -> None:
    for sampling in SAMPLINGS:
        made = plan([], [9] * 6, retain_sampling=sampling)
        assert sorted(made["retain"].tolist()) == list(range(6))
        assert len(made["forget"]) == 0
    assert len(plan([9] * 6, [])["retain"]) == 0


def test_more_ranks_than_sequences_leaves_empty_micro_batches() -> None:
    made = plan([9], [9], world_size=4)
    assert [len(items_of(made, b)) for b in range(4)] == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("forget", "retain", "alternates", "changes", "message"),
    [
        ([], [], [], {}, "expected at least one sequence, got two empty sets"),
        ([3, 0], [3], [], {}, r"`forget_lengths`: expected lengths in 1 .. 2\^31 - 1, got 0 at position 1"),
        ([3], [3, -1], [], {}, "`retain_lengths`: .*got -1 at position 1"),
        ([3], [INT64.max], [], {}, "`retain_lengths`: .*got 9223372036854775807"),
        ([3], [3], [INT64.min], {}, "`alternates`: expected lengths"),
        ([3, 3], [3], [3], {}, "`alternates`: expected 2 lengths, one for each forget sequence, got 1"),
        ([], [3], [3], {}, "`alternates`: expected 0 lengths"),
        ([3], [3], [], {"pairs_per_step": 0}, "`pairs_per_step`: expected 1 .. 2147483647, got 0"),
        ([3], [3], [], {"token_budget": -1}, "`token_budget`: expected 1 .. 2147483647, got -1"),
        ([3], [3], [], {"shared_tokens": -1}, "`shared_tokens`: expected 0 .. 2147483647, got -1"),
        ([3], [3], [], {"shared_tokens": 2**31}, "`shared_tokens`: expected 0 .. 2147483647, got 2147483648"),
        ([3], [3], [], {"world_size": 0}, "`world_size`: expected 1 .. 65536, got 0"),
        ([3], [3], [], {"world_size": INT64.max}, "`world_size`"),
        ([3], [3, 3], [], {"retain_sampling": "paired"}, "expected as many retain as forget sequences, got 2 and 1"),
        ([3], [3], [], {"retain_sampling": "some"}, "expected 'random', 'cycle' or 'paired', got 'some'"),
        ([3], [3], [], {"drop_last": True}, "expected at least one full step of 4 pairs, got an epoch of 1"),
    ],
)
def test_inputs_without_a_plan_are_refused(
    forget: list[int], retain: list[int], alternates: list[int], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plan(forget, retain, alternates, **changes)


def test_extreme_settings() -> None:
    """The largest lengths, budgets and step sizes do not overflow."""
    top = 2**31 - 1
    made = plan([top] * 3, [top] * 3, [top] * 3, token_budget=top, pairs_per_step=top, seed=2**64 - 1, epoch=2**64 - 1)
    assert made["batch_tokens"].tolist() == [2 * top] * 3 + [top] * 3
    assert made["over_budget"] == 3
    made = plan([top], [top], [top], token_budget=1, shared_tokens=top)
    assert made["batch_tokens"].tolist() == [3 * top, 2 * top]
