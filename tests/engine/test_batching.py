"""Token stores, packed batches, and the plan of an epoch."""

import numpy as np
import pytest
import torch
from helpers import random_store
from hypothesis import given
from hypothesis import strategies as st

from efface.batching import Role, TokenStore, pack, plan_epoch


def test_forget_sequences_come_first_and_their_part_is_a_batch() -> None:
    forget, retain = random_store(5, seed=1), random_store(6, seed=2)
    batch = pack(forget, retain, [4, 0], [3, 3, 1])
    assert batch.roles.tolist() == [Role.FORGET] * 2 + [Role.RETAIN] * 3
    assert batch.lengths == (*forget.lengths[[4, 0]], *retain.lengths[[3, 3, 1]])
    part, alone = batch.forget_part(), pack(forget, retain, [4, 0], [])
    for name in ("input_ids", "position_ids", "cu_seqlens", "label_rows", "targets", "roles"):
        assert torch.equal(getattr(part, name), getattr(alone, name)), name
    assert (part.row_offsets, part.lengths) == (alone.row_offsets, alone.lengths)
    assert batch.to("cpu").row_offsets == batch.row_offsets
    assert batch.tokens == sum(batch.lengths)


def test_stores_refuse_sequences_without_labels() -> None:
    with pytest.raises(ValueError, match="sequence 1 has no label: 2 tokens, labels from position 2"):
        TokenStore.from_sequences([[1, 2], [1, 2]], [1, 2])
    with pytest.raises(ValueError, match="sequence 0 has no label: 1 tokens"):
        TokenStore.from_sequences([[1]], [0])
    with pytest.raises(ValueError, match="expected 1 entries, got 2"):
        TokenStore.from_sequences([[1, 2]], [1, 1])


def test_a_store_counts_its_labels() -> None:
    store = TokenStore.from_sequences([[1, 2, 3], [4, 5, 6, 7]], [0, 3])
    assert store.label_counts.tolist() == [2, 1]
    assert pack(TokenStore.empty(), store, [], [0, 1]).row_offsets == (0, 2, 3)
    with pytest.raises(ValueError, match=r"`retain`: expected token ids in 0 .. 6"):
        store.check_vocabulary(7, "retain")


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 5), st.integers(1, 4), st.integers(0, 5))
def test_the_plan_of_an_epoch(forget: int, retain: int, pairs: int, batches: int, epoch: int) -> None:
    stores = random_store(forget, seed=1), random_store(retain, seed=2)
    plan = plan_epoch(*stores, pairs_per_batch=pairs, batches_per_step=batches, seed=3, epoch=epoch)
    assert sorted(np.concatenate([batch.forget for batch in plan])) == list(range(forget))
    drawn = np.concatenate([batch.retain for batch in plan])
    assert len(drawn) == forget
    counts = np.bincount(drawn, minlength=retain)
    assert counts.max() - counts.min() <= 1  # no retain row twice before all came once
    for start in range(0, len(plan), batches):
        step = plan[start : start + batches]
        indices = np.concatenate([batch.forget for batch in step])
        for batch in step:
            assert batch.totals.forget_sequences == len(indices) <= pairs * batches
            assert batch.totals.forget_tokens == stores[0].label_counts[indices].sum()
    again = plan_epoch(*stores, pairs_per_batch=pairs, batches_per_step=batches, seed=3, epoch=epoch)
    for left, right in zip(plan, again, strict=True):
        assert np.array_equal(left.forget, right.forget)
        assert np.array_equal(left.retain, right.retain)


def test_the_pairs_of_a_step_do_not_depend_on_the_micro_batch() -> None:
    stores = random_store(23, seed=1), random_store(40, seed=2)
    steps = []
    for pairs, batches in ((8, 1), (4, 2), (2, 4), (1, 8)):
        plan = plan_epoch(*stores, pairs_per_batch=pairs, batches_per_step=batches, seed=0, epoch=0)
        steps.append(([*np.concatenate([b.forget for b in plan])], [*np.concatenate([b.retain for b in plan])]))
        assert {batch.totals for batch in plan[: batches * 2]} == {plan[0].totals, plan[batches].totals}
    assert all(step == steps[0] for step in steps)


def test_epochs_and_seeds_differ() -> None:
    stores = random_store(20, seed=1), random_store(40, seed=2)
    orders = {
        tuple(plan_epoch(*stores, pairs_per_batch=20, batches_per_step=1, seed=seed, epoch=epoch)[0].forget.tolist())
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 4


def test_one_store_alone() -> None:
    store, empty = random_store(5), TokenStore.empty()
    (batch,) = plan_epoch(empty, store, pairs_per_batch=8, batches_per_step=1, seed=0, epoch=0)
    assert sorted(batch.retain) == list(range(5))
    assert len(batch.forget) == 0
    (batch,) = plan_epoch(store, empty, pairs_per_batch=8, batches_per_step=1, seed=0, epoch=0)
    assert len(batch.retain) == 0
    with pytest.raises(ValueError, match="nothing to plan"):
        plan_epoch(empty, empty, pairs_per_batch=1, batches_per_step=1, seed=0, epoch=0)
    with pytest.raises(ValueError, match="expected at least 1"):
        plan_epoch(store, store, pairs_per_batch=0, batches_per_step=1, seed=0, epoch=0)
