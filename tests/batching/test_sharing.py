"""Tests of shared beginnings: parts of batches against batches of their own, and what plans count."""

import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from efface.batching import (
    Assembler,
    EpochPlan,
    EpochPlanner,
    PackedBatch,
    Role,
    TokenStore,
    added_tokens,
    pack_items,
    packed_size,
    plan_epoch,
)
from efface.batching.planner import WORTH_SHARING
from efface.batching.prefixes import common_prefix
from efface.hf.train.dataset import PackedSteps
from support.trees import Labelled, check_batch, check_reading, chosen_from, naive_tree, ragged

TENSORS = (
    "input_ids",
    "position_ids",
    "label_rows",
    "targets",
    "sequences",
    "cu_seqlens",
    "roles",
    "paths",
    "cu_paths",
)
ON_HOST = ("lengths", "segment_lengths", "path_lengths", "row_offsets", "forget_sequences", "last_tokens", "shared")

Stores = tuple[TokenStore, ...]


def same(left: PackedBatch, right: PackedBatch) -> None:
    for name in TENSORS:
        assert getattr(left, name).dtype == getattr(right, name).dtype, name
        assert torch.equal(getattr(left, name), getattr(right, name)), name
    for name in ON_HOST:
        assert getattr(left, name) == getattr(right, name), name


# ---- parts of a batch


# Three of four tokens are 0, so that sequences share, repeat and contain one another.
sequence = st.integers(2, 9).flatmap(
    lambda n: st.tuples(st.lists(st.sampled_from([0, 0, 0, 1]), min_size=n, max_size=n), st.integers(0, n - 1))
)


def store_of(rows: Sequence[Labelled]) -> TokenStore:
    return TokenStore.from_sequences([ids for ids, _ in rows], [start for _, start in rows])


@st.composite
def choices(draw: st.DrawFn) -> tuple[Stores, np.ndarray, np.ndarray]:
    """Return three stores, and the roles and indices of a batch in which each role can be missing."""
    stores = tuple(store_of(draw(st.lists(sequence, min_size=1, max_size=5))) for _ in range(3))
    first = draw(st.lists(st.sampled_from([Role.FORGET, Role.ALTERNATE]), max_size=6))
    roles = [*first, *[Role.RETAIN] * draw(st.integers(0, 6))]
    indices = [draw(st.integers(0, len(stores[role]) - 1)) for role in roles]
    return stores, np.array(roles, np.int8), np.array(indices, np.int64)


def check_parts(stores: Stores, roles: np.ndarray, sequences: np.ndarray, *, last_tokens: bool) -> PackedBatch:
    """Compare the parts of a shared batch with batches that were packed from only their sequences."""

    def packed(own: slice, **options: bool) -> PackedBatch:
        return pack_items(stores, roles[own], sequences[own], **options)

    options = {"share": True, "last_tokens": last_tokens}
    everything = slice(None)
    batch = packed(everything, **options)
    chosen = [chosen_from(stores[role], [i])[0] for role, i in zip(roles, sequences, strict=True)]
    check_batch(batch, chosen, **options)
    assert packed_size(stores, roles, sequences, **options).tokens == batch.tokens
    first, last = slice(batch.forget_sequences), slice(batch.forget_sequences, None)
    same(batch.forget_part(), packed(first, **options))
    retain = batch.retain_part()
    check_reading(retain, chosen[last])
    assert (retain.roles.tolist(), retain.sequences.tolist()) == (roles[last].tolist(), sequences[last].tolist())
    alone = packed(last, **options)
    if keep_no_copy(chosen, last_tokens=last_tokens):
        same(retain, alone)
    assert alone.tokens <= retain.tokens <= batch.tokens
    same(batch.forget_part().forget_part(), packed(first, **options))
    same(batch.forget_part().retain_part(), packed(slice(0), **options))
    same(retain.retain_part(), retain)
    if len(roles):
        check_unshared(batch, packed(everything))
    for part, own in ((batch.forget_part(), first), (retain, last)):
        if part.lengths:
            check_unshared(part, packed(own))
    return batch


def keep_no_copy(chosen: list[Labelled], *, last_tokens: bool) -> bool:
    """Return whether no sequence is the beginning of an earlier one, so that its last token is stored twice."""
    runs = [ids if last_tokens else ids[:-1] for ids, _ in chosen]
    return not any(run == other[: len(run)] for n, run in enumerate(runs) for other in runs[:n])


def check_unshared(batch: PackedBatch, expected: PackedBatch) -> None:
    whole = batch.unshared()
    same(whole, expected)
    assert whole.unshared() is whole
    assert whole is batch.unshared()  # made once
    assert (whole is batch) == (batch.last_tokens and not batch.shared)


@given(choices(), st.booleans())
def test_parts_are_batches_of_their_sequences(choice: tuple[Stores, np.ndarray, np.ndarray], last_tokens: bool) -> None:
    check_parts(*choice, last_tokens=last_tokens)


@given(st.integers(1, 4), st.integers(0, 2**32 - 1), st.booleans())
def test_parts_of_ragged_trees(depth: int, seed: int, last_tokens: bool) -> None:
    """Forget, alternate and retain sequences are branches of one tree."""
    store, rng = ragged(depth, seed=seed), np.random.default_rng(seed)
    sequences = rng.integers(len(store), size=2 * len(store))
    roles = np.sort(rng.choice([Role.FORGET, Role.RETAIN], len(sequences))).astype(np.int8)
    roles[(roles == Role.FORGET) & (rng.random(len(roles)) < 0.3)] = Role.ALTERNATE
    assert check_parts((store,) * 3, roles, sequences, last_tokens=last_tokens).shared


@given(choices(), st.booleans())
def test_parts_on_a_device_are_made_from_the_batch_on_the_host(
    choice: tuple[Stores, np.ndarray, np.ndarray], last_tokens: bool
) -> None:
    """The meta device stands for an accelerator: a copy from it would fail."""
    stores, roles, sequences = choice
    options = {"share": True, "last_tokens": last_tokens}
    batch = pack_items(stores, roles, sequences, **options)
    assert batch.to("cpu") is batch
    assert batch.host is None
    moved = batch.to("meta")
    assert moved.host is batch
    assert moved.to("meta") is moved
    for name in TENSORS:
        on_device, on_host = getattr(moved, name), getattr(batch, name)
        assert (on_device.device.type, on_device.shape, on_device.dtype) == ("meta", on_host.shape, on_host.dtype)
    for name in ON_HOST:
        assert getattr(moved, name) == getattr(batch, name)
    parts = [(moved.forget_part(), batch.forget_part())]
    if batch.shared:
        parts += [(moved.retain_part(), batch.retain_part()), (moved.unshared(), batch.unshared())]
    for on_device, on_host in parts:
        assert on_device.storage.device.type == "meta"
        assert on_device.host is not None
        same(on_device.host, on_host)
        if on_host.lengths and (on_host.shared or not on_host.last_tokens):
            whole = on_device.unshared()
            assert whole.storage.device.type == "meta"
            assert whole.host is not None
            same(whole.host, on_host.unshared())


def test_a_retain_part_is_made_once() -> None:
    store = TokenStore.from_sequences([[1, 2, 3], [1, 2, 4]], [1, 1])
    batch = pack_items((store, store), np.array([0, 1, 1], np.int8), np.array([0, 1, 0]), share=True)
    assert batch.retain_part() is batch.retain_part()


def test_a_retain_sequence_that_begins_a_forget_sequence_keeps_its_copy() -> None:
    forget = TokenStore.from_sequences([[1, 2, 3]], [1])
    retain = TokenStore.from_sequences([[1, 2], [1, 2, 4]], [1, 1])
    batch = pack_items((forget, retain), np.array([0, 1, 1], np.int8), np.array([0, 0, 1]), share=True)
    part = batch.retain_part()
    assert part.input_ids.tolist() == [1, 2, 2, 4]
    assert part.paths.tolist() == [0, 1, 0, 2, 3]


def test_a_retain_part_keeps_the_prefix_that_only_the_forget_part_stores() -> None:
    forget = TokenStore.from_sequences([[1, 2, 3, 4], [1, 2, 3, 5]], [2, 2])
    retain = TokenStore.from_sequences([[1, 2, 6], [7, 8], [1, 2, 6, 9]], [2, 1, 2])
    batch = pack_items((forget, retain), np.array([0, 0, 1, 1, 1], np.int8), np.array([0, 1, 0, 1, 2]), share=True)
    assert batch.segment_lengths == (4, 1, 1, 2, 1)
    part = batch.retain_part()
    assert part.segment_lengths == (3, 2, 1)
    assert part.input_ids.tolist() == [1, 2, 6, 7, 8, 9]
    assert part.paths.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5]
    assert part.label_rows.tolist() == [1, 3, 1, 2]
    alone = batch.forget_part()
    assert alone.paths.tolist() == [0, 1, 2, 3, 0, 1, 2, 4]


# ---- prefixes and the tokens that sequences add


def saved(prefix: tuple[int, ...], store: TokenStore) -> int:
    """Return the tokens that are saved if ``prefix`` is stored once."""
    return len(prefix) * (sum(tuple(store[i][: len(prefix)]) == prefix for i in range(len(store))) - 1)


@given(st.lists(sequence, min_size=1, max_size=9))
def test_the_common_prefix_saves_most(rows: list[Labelled]) -> None:
    store = store_of(rows)
    found = tuple(common_prefix(store).tolist())
    beginnings = {tuple(ids[:n]) for ids, _ in rows for n in range(1, len(ids) + 1)}
    best = max(saved(beginning, store) for beginning in beginnings)
    assert (saved(found, store) if found else 0) == best


def with_prefix(
    count: int, prefix: Sequence[int], *, seed: int = 0, low: int = 4, high: int = 20, outliers: int = 0
) -> TokenStore:
    """Return sequences that begin with ``prefix``, the first ``outliers`` ones excepted, and then with other tokens."""
    rng = np.random.default_rng(seed)
    rows = [rng.integers(100, 10**6, n).tolist() for n in rng.integers(low, high, count)]
    rows = [row if i < outliers else [*prefix, *row] for i, row in enumerate(rows)]
    return TokenStore.from_sequences(rows, [len(row) - 2 for row in rows])


TEMPLATE, OTHER_TEMPLATE = list(range(30)), [*range(7), *range(50, 75)]


@pytest.mark.parametrize("outliers", [0, 1, 3, 40])
@pytest.mark.parametrize("count", [50, 64, 65, 1000])
def test_outliers_do_not_hide_the_common_prefix(count: int, outliers: int) -> None:
    assert common_prefix(with_prefix(count, TEMPLATE, outliers=outliers)).tolist() == TEMPLATE


def test_stores_without_a_common_prefix() -> None:
    assert len(common_prefix(TokenStore.empty())) == 0
    assert len(common_prefix(with_prefix(1, TEMPLATE))) == 0
    assert len(common_prefix(with_prefix(50, []))) == 0
    added = added_tokens((TokenStore.empty(), with_prefix(1, TEMPLATE)), share=True)
    assert (added.shared, added.forget.tolist(), added.alternate) == (0, [], None)


def test_both_prefixes_count_once() -> None:
    stores = (with_prefix(40, TEMPLATE, outliers=1), with_prefix(90, OTHER_TEMPLATE, seed=1))
    added = added_tokens(stores, share=True)
    assert added.shared == len(TEMPLATE) + len(OTHER_TEMPLATE) - 7
    # 30 or 32 shared tokens count as 3 or 4, because attention copies their keys and values.
    assert added.forget.tolist() == [stores[0].lengths[0], *(stores[0].lengths[1:] - len(TEMPLATE) + 3)]
    assert added.retain.tolist() == (stores[1].lengths - len(OTHER_TEMPLATE) + 4).tolist()
    assert added_tokens(stores[:1] * 2, share=True).shared == len(TEMPLATE)
    short = added_tokens(stores, share=True, last_tokens=False)
    assert short.shared == added.shared
    assert short.retain.tolist() == (added.retain - 1).tolist()
    apart = added_tokens(stores, share=False)
    assert (apart.shared, apart.retain.tolist()) == (0, stores[1].lengths.tolist())


def test_an_alternate_adds_what_its_forget_sequence_does_not_contain() -> None:
    forget = TokenStore.from_sequences([[1, 2, 3, 4, 5], [1, 2, 3, 6], [1, 2, 3, 7]], [3, 3, 3])
    alternate = TokenStore.from_sequences([[1, 2, 3, 4, 9, 9], [1, 2, 3, 6], [8, 2, 3, 7]], [3, 3, 3])
    for last_tokens, expected in ((True, [2, 1, 4]), (False, [1, 1, 3])):
        added = added_tokens((forget, with_prefix(9, [1, 2]), alternate), share=True, last_tokens=last_tokens)
        assert added.alternate is not None
        assert added.alternate.tolist() == expected


def test_an_alternate_that_begins_with_the_whole_forget_sequence_adds_its_last_token() -> None:
    # Without last tokens, the last token of the forget sequence is not stored, so the alternate stores it.
    stores = (*(TokenStore.from_sequences([ids], [1]) for ids in ([1, 2, 3], [9, 8], [1, 2, 3, 4, 5])),)
    roles, sequences = np.array([Role.FORGET, Role.ALTERNATE], np.int8), np.zeros(2, np.int64)
    for last_tokens, expected in ((True, 2), (False, 2)):
        added = added_tokens(stores, share=True, last_tokens=last_tokens)
        assert added.alternate is not None
        assert added.alternate.tolist() == [expected]
        stored = packed_size(stores, roles, sequences, share=True, last_tokens=last_tokens).tokens
        assert stored == added.shared + added.forget[0] + expected


# ---- plans


def quiet_plan(stores: Stores, *, share: bool, last_tokens: bool, **settings: Any) -> EpochPlan:
    added = added_tokens(stores, share=share, last_tokens=last_tokens)
    for lengths in (added.forget, added.retain, *(() if added.alternate is None else (added.alternate,))):
        assert (lengths >= 1).all()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*longer than the token budget")
        return plan_epoch(
            added.forget, added.retain, alternates=added.alternate, shared_tokens=added.shared, **settings
        )


def items(plan: EpochPlan, batch: int) -> tuple[np.ndarray, np.ndarray]:
    own = slice(plan.batch_offsets[batch], plan.batch_offsets[batch + 1])
    return plan.roles[own], plan.sequences[own]


def contents(plan: EpochPlan) -> list[list[tuple[int, int]]]:
    """Return the sorted (role, sequence) of each step, on all ranks."""
    found = []
    for start, end in itertools.pairwise(plan.step_offsets.tolist()):
        parts = [zip(*(part.tolist() for part in items(plan, batch)), strict=True) for batch in range(start, end)]
        found.append(sorted(itertools.chain(*parts)))
    return found


def check_plan(stores: Stores, plan: EpochPlan, *, share: bool, last_tokens: bool) -> int:
    """Assert that the plan bounds the stored tokens of its micro-batches; return the number of full batches."""
    over = 0
    for batch, planned in enumerate(plan.batch_tokens.tolist()):
        roles, sequences = items(plan, batch)
        stored = packed_size(stores, roles, sequences, share=share, last_tokens=last_tokens).tokens
        chosen = [chosen_from(stores[role], [i])[0] for role, i in zip(roles, sequences, strict=True)]
        assert stored == len(naive_tree(chosen, share=share, last_tokens=last_tokens)["input_ids"])
        assert stored <= planned if share else stored == planned
        units = sum(role != Role.ALTERNATE for role in roles)
        assert planned <= plan.token_budget or units == 1
        over += planned > plan.token_budget
    return over


@given(
    st.lists(sequence, min_size=1, max_size=8),
    st.lists(sequence, min_size=1, max_size=8),
    st.booleans(),
    st.booleans(),
    st.data(),
)
def test_plans_bound_the_stored_tokens_and_pair_the_same_sequences(
    forget: list[Labelled], retain: list[Labelled], last_tokens: bool, alternates: bool, data: st.DataObject
) -> None:
    stores: Stores = (store_of(forget), store_of(retain))
    if alternates:
        count = len(forget)
        stores = (*stores, store_of(data.draw(st.lists(sequence, min_size=count, max_size=count))))
    settings: dict[str, Any] = {
        "pairs_per_step": data.draw(st.integers(1, 5)),
        "retain_sampling": data.draw(st.sampled_from(["random", "cycle"])),
        "seed": data.draw(st.integers(0, 2**64 - 1)),
        "epoch": data.draw(st.integers(0, 3)),
    }
    whole = quiet_plan(stores, share=False, last_tokens=True, token_budget=10**6, **settings)
    for share in (False, True):
        layout = {"token_budget": data.draw(st.integers(1, 60)), "world_size": data.draw(st.integers(1, 4))}
        plan = quiet_plan(stores, share=share, last_tokens=last_tokens, **settings, **layout)
        check_plan(stores, plan, share=share, last_tokens=last_tokens)
        assert np.array_equal(plan.forget, whole.forget)
        assert np.array_equal(plan.retain, whole.retain)
        assert contents(plan) == contents(whole)


CHATS = (
    with_prefix(60, TEMPLATE, seed=1, low=20, high=90, outliers=2),
    with_prefix(200, TEMPLATE, seed=2, low=20, high=90, outliers=5),
)


@pytest.mark.parametrize("last_tokens", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("budget", [20, 31, 100, 400, 2000])
def test_plans_of_chats(budget: int, world_size: int, last_tokens: bool) -> None:
    """Budgets below the template, just above it, and of 2 to 40 sequences."""
    settings = {"pairs_per_step": 16, "token_budget": budget, "world_size": world_size, "seed": 3, "epoch": 1}
    plan = quiet_plan(CHATS, share=True, last_tokens=last_tokens, **settings)
    apart = quiet_plan(CHATS, share=False, last_tokens=True, **settings)
    over = check_plan(CHATS, plan, share=True, last_tokens=last_tokens)
    assert (over > 0) == (budget <= 100)
    assert contents(plan) == contents(apart)
    assert len(plan.batch_tokens) <= len(apart.batch_tokens)
    if budget >= 400:
        assert plan.batch_tokens.sum() < 0.8 * apart.batch_tokens.sum()
    # what the ranks assemble is what was planned
    ranks = [
        Assembler(plan, CHATS, rank=rank, share=True, last_tokens=last_tokens, ahead=0) for rank in range(world_size)
    ]
    for step in range(len(plan)):
        steps = [rank[step] for rank in ranks]
        assert len({len(one.batches) for one in steps}) == 1
        found = [
            (role, index)
            for one in steps
            for batch in one.batches
            for role, index in zip(batch.roles.tolist(), batch.sequences.tolist(), strict=True)
            if role != Role.IDLE
        ]
        assert sorted(found) == contents(plan)[step]
        assert {one.totals for one in steps} == {Assembler(apart, CHATS, ahead=0).totals(step)}


# ---- whether to share


def planner_of(stores: Stores, *, share: bool = True, **changes: Any) -> EpochPlanner:
    settings = {"pairs_per_step": 8, "token_budget": 300, "seed": 0, **changes}
    return EpochPlanner(stores, share=share, **settings)


def first_saved(stores: Stores, plan: EpochPlan, *, last_tokens: bool) -> float:
    """Return the share of the tokens of the first 16 micro-batches that a naive tree saves."""
    stored = full = 0
    for batch in range(min(16, len(plan.batch_tokens))):
        chosen = [chosen_from(stores[role], [i])[0] for role, i in zip(*items(plan, batch), strict=True)]
        tree = naive_tree(chosen, share=True, last_tokens=last_tokens)
        stored += len(tree["input_ids"])
        full += sum(len(ids) - (not last_tokens) for ids, _ in chosen)
    return 1 - stored / full


@pytest.mark.parametrize("last_tokens", [True, False])
def test_tokens_are_shared_if_that_saves_a_32nd(last_tokens: bool) -> None:
    decisions = set()
    for prefix in range(8):
        stores = tuple(
            with_prefix(count, TEMPLATE[:prefix], seed=seed, low=50, high=90) for seed, count in enumerate((40, 80))
        )
        planner = planner_of(stores, last_tokens=last_tokens)
        layout = {"pairs_per_step": 8, "token_budget": 300, "seed": 0, "epoch": 0}
        plan = quiet_plan(stores, share=True, last_tokens=last_tokens, **layout)
        saving = first_saved(stores, plan, last_tokens=last_tokens)
        assert planner.shares == (saving >= WORTH_SHARING)
        assert planner.saved == pytest.approx(saving if planner.shares else 0.0)
        assert planner.packing == {"share": planner.shares, "last_tokens": last_tokens or not planner.shares}
        assert planner.added.shared == (prefix if planner.shares else 0)
        decisions.add(planner.shares)
        expected = plan if planner.shares else quiet_plan(stores, share=False, last_tokens=True, **layout)
        got = planner.plan(0)
        assert np.array_equal(got.sequences, expected.sequences)
        assert np.array_equal(got.batch_offsets, expected.batch_offsets)
        whole = [packed_size(stores, *items(got, b), **planner.packing).tokens for b in range(len(got.batch_tokens))]
        assert planner.tokens(got)[0] == sum(whole)
        assert planner.tokens(got, batches=3)[0] == sum(whole[:3])
    assert decisions == {False, True}


def test_sharing_is_off_unless_it_is_asked_for() -> None:
    planner = planner_of(CHATS, share=False, last_tokens=False)
    assert (planner.shares, planner.saved) == (False, 0.0)
    assert planner.packing == {"share": False, "last_tokens": True}


def test_sharing_can_be_stopped() -> None:
    planner, apart = planner_of(CHATS, last_tokens=False), planner_of(CHATS, share=False)
    assert planner.shares
    assert planner.saved > 0.2
    shared = planner.plan(2)
    assert planner.plan(2) is shared
    planner.stop_sharing()
    assert (planner.shares, planner.saved) == (False, 0.0)
    assert planner.packing == apart.packing
    plan = planner.plan(2)
    assert contents(plan) == contents(shared)
    assert np.array_equal(plan.batch_tokens, apart.plan(2).batch_tokens)
    assert len(plan.batch_tokens) > len(shared.batch_tokens)


# ---- steps


def steps_of(stores: Stores = CHATS, **changes: Any) -> PackedSteps:
    settings = {"pairs_per_step": 8, "token_budget": 400, "seed": 5, "share": True, "last_tokens": False, **changes}
    return PackedSteps(*stores, **settings)


def same_steps(left: PackedSteps, right: PackedSteps, order: Sequence[int]) -> None:
    for k in order:
        step, expected = left[k], right[k]
        assert step.totals == expected.totals
        for one, other in zip(step.batches, expected.batches, strict=True):
            assert one.layout == other.layout
            same(one, other)


@pytest.mark.parametrize("last_tokens", [True, False])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_neither_threads_nor_the_step_of_resuming_change_a_bit(workers: int, last_tokens: bool) -> None:
    expected = steps_of(last_tokens=last_tokens)
    assert len(expected) == 8
    for epoch in (0, 1):
        expected.begin_epoch(epoch)
        assert any(batch.shared for batch in expected[0].batches)
        for first in range(len(expected)):
            resumed = steps_of(workers=workers, last_tokens=last_tokens)
            resumed.begin_epoch(epoch)
            same_steps(resumed, expected, range(first, len(expected)))
            resumed.assembler.close()
        again = steps_of(workers=workers, last_tokens=last_tokens)
        again.begin_epoch(1 - epoch)
        again[3]
        again.begin_epoch(epoch)
        same_steps(again, expected, (7, 3, 3, 0))
        again.assembler.close()
    expected.assembler.close()


def test_steps_that_stop_sharing_contain_the_same_sequences() -> None:
    steps, apart = steps_of(), steps_of(share=False)
    assert steps.prefixes_saved > 0.2
    steps.begin_epoch(3)
    apart.begin_epoch(3)
    before = contents(steps.assembler.plan)
    steps[0]
    steps.stop_sharing()
    assert steps.prefixes_saved == 0
    assert contents(steps.assembler.plan) == before  # of the same epoch
    same_steps(steps, apart, range(len(apart)))
    assembler = steps.assembler
    steps.stop_sharing()
    assert steps.assembler is assembler
    steps.begin_epoch(4)
    apart.begin_epoch(4)
    same_steps(steps, apart, range(len(apart)))


def test_an_idle_rank_runs_one_sequence_without_paths() -> None:
    stores = (with_prefix(1, TEMPLATE), with_prefix(1, TEMPLATE, seed=1))
    plan = quiet_plan(
        stores, share=True, last_tokens=False, pairs_per_step=4, token_budget=60, world_size=3, seed=0, epoch=0
    )
    (idle,) = Assembler(plan, stores, rank=2, share=True, last_tokens=False)[0].batches
    assert idle.roles.tolist() == [Role.IDLE]
    assert (idle.forget_sequences, idle.shared, idle.tokens) == (0, False, idle.lengths[0] - 1)
    same(idle.retain_part(), idle)


def test_warnings_are_those_of_the_plan_that_is_used() -> None:
    long, short = list(range(3, 63)), list(range(70, 100))
    stores = (with_prefix(20, long), with_prefix(20, short, seed=1))
    options: dict[str, Any] = {"pairs_per_step": 8, "seed": 0, "last_tokens": False}
    longest = max(int(store.lengths.max()) for store in stores)
    with warnings.catch_warnings():  # both prefixes together exceed the budget, but no sequence does
        warnings.simplefilter("error")
        planner = EpochPlanner(stores, share=True, token_budget=longest, **options)
        assert planner.added.shared == 0
        assert planner.plan(0).batch_tokens.max() <= longest
    with pytest.warns(UserWarning, match=f"sequences are longer than the token budget of {longest - 2}"):
        EpochPlanner(stores, share=True, token_budget=longest - 2, **options).plan(0)
    odd = TokenStore.from_sequences([*(stores[0][i].tolist() for i in range(20)), list(range(200, 280))], [1] * 21)
    with pytest.warns(UserWarning, match="1 sequences and the 60 tokens that sequences share are together longer"):
        assert EpochPlanner((odd, TokenStore.empty()), share=True, token_budget=100, **options).shares


def test_a_long_prefix_does_not_raise_the_memory_of_a_micro_batch() -> None:
    """Each path of a micro-batch has copies of the prefix's keys and values, an eighth of a stored token's memory."""
    stores = (with_prefix(300, list(range(10**6, 10**6 + 2000))), TokenStore.empty())
    planner = EpochPlanner(stores, share=True, last_tokens=False, pairs_per_step=256, token_budget=4096, seed=0)
    assert planner.shares
    plan = planner.plan(0)
    for b, tokens in enumerate(plan.batch_tokens.tolist()):
        items = slice(plan.batch_offsets[b], plan.batch_offsets[b + 1])
        batch = pack_items(stores, plan.roles[items], plan.sequences[items], **planner.packing)
        copies = sum(batch.path_lengths) - batch.tokens
        assert batch.tokens + copies // 8 <= tokens + 2000 // 8 <= 4096 + 2000 // 8
    assert len(plan.batch_tokens) < 300 / 6  # without sharing, a micro-batch has two sequences


def test_a_part_without_sequences_is_unshared() -> None:
    stores = (TokenStore.empty(), with_prefix(3, TEMPLATE))
    batch = pack_items(stores, np.full(3, Role.RETAIN, np.int8), np.arange(3), share=True, last_tokens=False)
    part = batch.forget_part().unshared()
    assert (part.lengths, part.tokens, part.last_tokens, part.shared) == ((), 0, True, False)
