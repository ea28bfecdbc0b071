"""Tests of token stores, packed batches, the plan of an epoch and its assembly; tests/native tests the draws."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from efface.batching import Assembler, PackedBatch, Role, Step, TokenStore, pack, pack_items, plan_epoch
from efface.hf.text.data import token_store
from support.helpers import random_store, tiny_tokenizer

TENSORS = ("input_ids", "position_ids", "cu_seqlens", "label_rows", "targets", "roles", "sequences")


def test_forget_sequences_come_first_and_their_part_is_a_batch() -> None:
    forget, retain = random_store(5, seed=1), random_store(6, seed=2)
    batch = pack(forget, retain, [4, 0], [3, 3, 1])
    assert batch.roles.tolist() == [Role.FORGET] * 2 + [Role.RETAIN] * 3
    assert batch.lengths == (*forget.lengths[[4, 0]], *retain.lengths[[3, 3, 1]])
    part, alone = batch.forget_part(), pack(forget, retain, [4, 0], [])
    same(part, alone)
    same(batch.to("cpu"), batch)
    assert batch.sequences.tolist() == [4, 0, 3, 3, 1]
    assert batch.tokens == sum(batch.lengths)


def test_a_store_of_several_chunks() -> None:
    whole = random_store(7, seed=3)
    parts = [TokenStore.from_sequences([whole[i].tolist()], [int(whole.label_starts[i])]) for i in range(7)]
    chunked = TokenStore([part.chunks[0] for part in parts])
    assert len(chunked) == 7
    for name in ("lengths", "label_starts", "label_counts"):
        assert np.array_equal(getattr(chunked, name), getattr(whole, name)), name
    assert all(np.array_equal(chunked[i], whole[i]) for i in range(7))
    assert chunked[3].base is not None  # a view
    same(pack(whole, chunked, [1, 6], [0, 5]), pack(chunked, whole, [1, 6], [0, 5]))
    with pytest.raises(IndexError, match=r"sequence index: expected 0 .. 6, got 7"):
        chunked[7]
    with pytest.raises(IndexError, match="got -1"):
        chunked[-1]


def same(left: PackedBatch, right: PackedBatch) -> None:
    for name in TENSORS:
        assert torch.equal(getattr(left, name), getattr(right, name)), name
    assert (left.row_offsets, left.lengths, left.forget_sequences) == (
        right.row_offsets,
        right.lengths,
        right.forget_sequences,
    )


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


STORES = (random_store(23, seed=1), random_store(40, seed=2))


def planned(**changes):  # type: ignore[no-untyped-def]
    forget, retain = STORES
    settings = {"pairs_per_step": 8, "token_budget": 60, "seed": 0, "epoch": 0, **changes}
    return plan_epoch(forget.lengths, retain.lengths, **settings)


def contents(steps: list[Step]) -> list[tuple[int, int]]:
    """Return (role, sequence) of every sequence with a nonzero weight."""
    return sorted(
        (role, sequence)
        for step in steps
        for batch in step.batches
        for role, sequence in zip(batch.roles.tolist(), batch.sequences.tolist(), strict=True)
        if role != Role.IDLE
    )


@pytest.mark.parametrize("world_size", [1, 2, 4, 8, 32])
def test_any_number_of_ranks_holds_the_same_pairs_and_totals(world_size: int) -> None:
    alone = Assembler(planned(), STORES)
    plan = planned(world_size=world_size)
    ranks = [Assembler(plan, STORES, rank=rank) for rank in range(world_size)]
    assert len(alone) == 3
    for k in range(len(alone)):
        steps = [rank[k] for rank in ranks]
        assert contents(steps) == contents([alone[k]])
        assert {step.totals for step in steps} == {alone[k].totals}
        assert len({len(step.batches) for step in steps}) == 1
        assert all(len(step.batches) >= 1 for step in steps)
        for step in steps:
            for batch in step.batches:
                assert batch.tokens <= 60
                assert batch.forget_sequences == batch.roles.tolist().count(Role.FORGET)


def test_the_totals_are_those_of_the_pairs() -> None:
    plan = planned(world_size=2)
    forget, retain = plan.pairs(1)
    totals = Assembler(plan, STORES).totals(1)
    assert (totals.forget_sequences, totals.retain_sequences) == (8, 8)
    assert totals.forget_tokens == sum(int(STORES[0].label_counts[i]) for i in forget)
    assert totals.retain_tokens == sum(int(STORES[1].label_counts[i]) for i in retain)


@pytest.mark.parametrize(("workers", "ahead"), [(1, 0), (1, 1), (1, 5), (4, 2), (4, 100)])
def test_threads_do_not_change_a_batch(workers: int, ahead: int) -> None:
    plan = planned(pairs_per_step=2)
    expected = [Assembler(plan, STORES, ahead=0)[k] for k in range(len(plan))]
    assembler = Assembler(plan, STORES, workers=workers, ahead=ahead)
    for k, step in enumerate(expected):
        for left, right in zip(assembler[k].batches, step.batches, strict=True):
            same(left, right)
    # the same batches if steps are read in any order
    for k in (7, 3, 3, 11, 0):
        for left, right in zip(assembler[k].batches, expected[k].batches, strict=True):
            same(left, right)
    with pytest.raises(IndexError, match="`step`: expected 0 .. 11, got 12"):
        assembler[12]
    assembler.close()


def test_the_next_steps_are_assembled_in_the_background(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[int, str]] = []
    assemble = Assembler.assemble

    def recorded(self: Assembler, step: int) -> Step:
        made = assemble(self, step)
        done.append((step, threading.current_thread().name))
        return made

    monkeypatch.setattr(Assembler, "assemble", recorded)
    assembler = Assembler(planned(pairs_per_step=2), STORES, ahead=2)
    assembler[0]
    deadline = time.monotonic() + 10
    while len(done) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert [step for step, _ in done] == [0, 1, 2]
    assert all(name.startswith("efface-assembler") for _, name in done)
    assembler.close()


def test_errors_in_the_background_reach_the_caller() -> None:
    longer = random_store(50, seed=2)
    plan = plan_epoch(STORES[0].lengths, longer.lengths, pairs_per_step=8, token_budget=60, seed=0, epoch=0)
    assembler = Assembler(plan, (STORES[0], TokenStore.empty()))
    with pytest.raises(ValueError, match="`retain` sequence: expected an index"):
        assembler[0]
    with pytest.raises(ValueError, match="`workers`, `ahead`: expected at least 1 and at least 0, got 0 and 2"):
        Assembler(plan, STORES, workers=0)


def test_a_rank_without_a_share_idles_over_the_shortest_sequence() -> None:
    plan = plan_epoch([5], [9], pairs_per_step=4, token_budget=60, world_size=3, seed=0, epoch=0)
    stores = (random_store(1, low=5, high=6), random_store(1, low=9, high=10))
    batches = [Assembler(plan, stores, rank=rank)[0].batches for rank in range(3)]
    assert [[batch.roles.tolist() for batch in own] for own in batches] == [
        [[Role.RETAIN]],
        [[Role.FORGET]],
        [[Role.IDLE]],
    ]
    assert batches[2][0].tokens == 5
    assert batches[2][0].forget_sequences == 0


def test_a_long_sequence_has_a_batch_of_its_own_and_a_warning() -> None:
    with pytest.warns(
        UserWarning, match="1 sequences are longer than the token budget of 60; each gets its own micro-batch"
    ):
        plan = plan_epoch([5, 70, 6], [9, 9], pairs_per_step=3, token_budget=60, seed=0, epoch=0)
    assert sorted(plan.batch_tokens.tolist()) == [38, 70]


def test_bad_requests() -> None:
    plan = planned()
    with pytest.raises(ValueError, match="`rank`: expected 0 .. 0, got 1"):
        plan.micro_batches(0, 1)
    with pytest.raises(ValueError, match=r"`seed`: expected 0 .. 2\^64 - 1, got -1"):
        planned(seed=-1)
    with pytest.raises(ValueError, match="`epoch`: expected"):
        planned(epoch=2**64)


def test_efficiency_of_nothing_is_nan() -> None:
    plan = plan_epoch([5], [5], pairs_per_step=1, token_budget=20, seed=0, epoch=0)
    assert np.isnan(plan.efficiency())
    assert plan.efficiency(last=True) == 0.5


def test_tofu_lengths_fill_their_micro_batches(tofu: Path) -> None:
    """Budget 4096, several micro-batches per step, 1 to 8 ranks: each at least 99 % full, except the last of a rank."""
    tokenizer = tiny_tokenizer(300)
    forget, retain = (token_store(tofu / f"{name}.json", tokenizer, name=name) for name in ("forget10", "retain90"))
    for pairs, world_size in ((32, 1), (128, 1), (128, 2), (400, 8)):
        plan = plan_epoch(
            forget.lengths,
            retain.lengths,
            pairs_per_step=pairs,
            token_budget=4096,
            world_size=world_size,
            seed=0,
            epoch=0,
        )
        assert plan.efficiency() >= 0.99, (pairs, world_size)


def test_packing_by_items_is_packing() -> None:
    roles = np.array([Role.FORGET, Role.RETAIN, Role.RETAIN], np.int8)
    same(pack_items(STORES, roles, np.array([4, 3, 1])), pack(*STORES, [4], [3, 1]))


def test_an_alternate_follows_its_own_forget_sequence_and_retain_comes_last() -> None:
    stores = (*STORES, random_store(23, seed=3))
    lengths = [store.lengths for store in stores]
    settings = {"pairs_per_step": 8, "token_budget": 80, "world_size": 2, "seed": 0, "epoch": 0}
    plan = plan_epoch(*lengths[:2], alternates=lengths[2], **settings)
    alone = plan_epoch(*lengths[:2], **settings)
    assert np.array_equal(plan.forget, alone.forget)  # alternates do not change the pairs
    for rank in range(2):
        for batch in Assembler(plan, stores, rank=rank)[0].batches:
            roles, sequences = batch.roles.tolist(), batch.sequences.tolist()
            count = roles.count(Role.FORGET)
            assert roles == [Role.FORGET, Role.ALTERNATE] * count + [Role.RETAIN] * (len(roles) - 2 * count)
            assert sequences[: 2 * count : 2] == sequences[1 : 2 * count : 2]
            part = batch.forget_part()
            assert part.roles.tolist() == roles[: 2 * count]
            same(part, pack_items(stores, part.roles.numpy(), part.sequences.numpy()))
