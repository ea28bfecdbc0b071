"""The plan of an epoch: its guarantees as properties, its draws against NumPy's Philox. Imports no torch."""

import itertools
from typing import Any

import efface_native
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

FORGET, RETAIN, ALTERNATE = 0, 1, 2
SAMPLINGS = ("random", "cycle", "paired")
NONE = np.empty(0, np.int64)


def plan(forget: Any, retain: Any, alternates: Any = NONE, **changes: Any) -> dict[str, Any]:
    settings = {
        "pairs_per_step": 4,
        "token_budget": 64,
        "world_size": 1,
        "seed": 0,
        "epoch": 0,
        "retain_sampling": "random",
        "drop_last": False,
        **changes,
    }
    arrays = (np.asarray(lengths, np.int64) for lengths in (forget, retain, alternates))
    return efface_native.plan_epoch(*arrays, **settings)


# ---- the draws, written down a second time on NumPy's own Philox4x64-10 ----


def word(seed: int, stream: int, round_: int, index: int) -> int:
    """Word index % 4 of block (index // 4, round, 0, 0); NumPy counts up before it generates."""
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
    epoch %= 2**20  # where epoch * pairs does not wrap
    made = plan([3] * forget, [3] * retain, seed=seed, epoch=epoch, retain_sampling="cycle")
    numbers = [epoch * forget + i for i in range(forget)]
    rounds = {number // retain: shuffled(seed, 3, number // retain, retain) for number in numbers}
    assert made["retain"].tolist() == [rounds[number // retain][number % retain] for number in numbers]


def test_the_published_test_vector() -> None:
    """Random123's known answer for philox4x64-10 with all counters and keys zero; the word decides the one draw."""
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
    tokens = [forget, retain, alternates]

    # every forget sequence exactly once; only a dropped last step may miss some
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
        # the step's pairs, and nothing else, are in its micro-batches
        expected = [(FORGET, i) for i in made["forget"][own].tolist()]
        expected += [(RETAIN, i) for i in made["retain"][own].tolist()]
        expected += [(ALTERNATE, i) for i in made["forget"][own].tolist()] if alternates else []
        assert sorted(item for items in micro_batches for item in items) == sorted(expected)
        # equally many micro-batches a rank, tokens balanced to within the longest sequence
        assert len(micro_batches) % world == 0
        sums = [sum(tokens[role][i] for items in micro_batches[r::world] for role, i in items) for r in range(world)]
        longest = max([units[i] for i in made["forget"][own]] + [retain[i] for i in made["retain"][own]])
        assert max(sums) - min(sums) <= longest
        for batch, items in zip(range(first, last), micro_batches, strict=True):
            total = sum(tokens[role][i] for role, i in items)
            assert made["batch_tokens"][batch] == total
            # within the budget, or a single sequence (with its alternate)
            assert total <= budget or len({i for _, i in items}) == 1
            # forget, each followed by its alternate, then retain
            forgotten = [i for role, i in items if role == FORGET]
            pair = [FORGET, ALTERNATE] if alternates else [FORGET]
            ahead = [(role, i) for i in forgotten for role in pair]
            assert items[: len(ahead)] == ahead
            assert all(role == RETAIN for role, _ in items[len(ahead) :])
    over = [units[i] for i in made["forget"]] + [retain[i] for i in made["retain"]]
    assert made["over_budget"] == sum(n > budget for n in over)


@given(cases)
def test_the_pairs_of_a_step_depend_on_neither_ranks_nor_budget(case: dict[str, Any]) -> None:
    forget, retain = case.pop("forget"), case.pop("retain")
    case.pop("with_alternates")
    case.update(drop_last=False, retain_sampling="random")
    first = plan(forget, retain, **case)
    for world, budget in itertools.product((1, 2, 4, 8), (1, 37, 10_000)):
        made = plan(forget, retain, **{**case, "world_size": world, "token_budget": budget})
        assert made["forget"].tolist() == first["forget"].tolist()
        assert made["retain"].tolist() == first["retain"].tolist()


def lower_bound(tokens: int, budget: int) -> int:
    return -(-tokens // budget)


def test_few_micro_batches() -> None:
    """Best-fit decreasing on 256 sequences of TOFU-like lengths: not one micro-batch more than their sum needs."""
    rng = np.random.default_rng(0)
    forget, retain = rng.integers(20, 140, 128), rng.integers(20, 140, 128)
    made = plan(forget, retain, pairs_per_step=128, token_budget=1024, retain_sampling="paired")
    assert len(made["batch_tokens"]) == lower_bound(int(forget.sum() + retain.sum()), 1024)
    full = made["batch_tokens"][:-1]
    assert full.mean() / 1024 > 0.99
    assert (np.diff(made["batch_tokens"]) <= 0).all()  # what is left over stands at the end


def test_cycling_takes_every_retain_sequence_before_any_comes_again() -> None:
    """14 epochs of 5 pairs are 70 draws: ten rounds over 7 sequences, across the borders of the epochs."""
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


INT64 = np.iinfo(np.int64)


@pytest.mark.parametrize(
    ("forget", "retain", "alternates", "changes", "message"),
    [
        ([], [], [], {}, "both are empty; there is nothing to plan"),
        ([3, 0], [3], [], {}, r"`forget_lengths`: expected lengths in 1 .. 2\^31 - 1, got 0 at position 1"),
        ([3], [3, -1], [], {}, "`retain_lengths`: .*got -1 at position 1"),
        ([3], [INT64.max], [], {}, "`retain_lengths`: .*got 9223372036854775807"),
        ([3], [3], [INT64.min], {}, "`alternates`: expected lengths"),
        ([3, 3], [3], [3], {}, "`alternates`: expected 2 lengths, one for each forget sequence, got 1"),
        ([], [3], [3], {}, "`alternates`: expected 0 lengths"),
        ([3], [3], [], {"pairs_per_step": 0}, "`pairs_per_step`: expected 1 .. 2147483647, got 0"),
        ([3], [3], [], {"token_budget": -1}, "`token_budget`: expected 1 .. 2147483647, got -1"),
        ([3], [3], [], {"world_size": 0}, "`world_size`: expected 1 .. 65536, got 0"),
        ([3], [3], [], {"world_size": INT64.max}, "`world_size`"),
        ([3], [3, 3], [], {"retain_sampling": "paired"}, "expected as many retain as forget sequences, got 2 and 1"),
        ([3], [3], [], {"retain_sampling": "some"}, "expected 'random', 'cycle' or 'paired', got 'some'"),
        ([3], [3], [], {"drop_last": True}, "an epoch of 1 pairs has no whole step of 4"),
    ],
)
def test_what_makes_no_plan_is_refused(
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
