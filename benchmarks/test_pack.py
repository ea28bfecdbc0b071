"""``pytest benchmarks --benchmark-only``: the pack suite's smallest shape, planning and assembling."""

from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.packing.rivals import numpy_pack, numpy_plan
from benchmarks.packing.suite import BATCH_TOKENS, SHAPES, lengths, store
from efface.batching import pack_items, plan_epoch

_FORGET, _RETAIN, _PAIRS, _BUDGET = SHAPES["smoke"]


@pytest.mark.parametrize("provider", ["efface plan_epoch", "NumPy and Python"])
def test_plan(provider: str, benchmark: BenchmarkFixture) -> None:
    """One provider."""
    benchmark.group = "plan an epoch"
    forget, retain = lengths(_FORGET, 1), lengths(_RETAIN, 2)
    calls: dict[str, Callable[[], object]] = {
        "efface plan_epoch": lambda: plan_epoch(
            forget, retain, pairs_per_step=_PAIRS, token_budget=_BUDGET, seed=0, epoch=0
        ),
        "NumPy and Python": lambda: numpy_plan(forget, retain, _PAIRS, _BUDGET, seed=0),
    }
    benchmark.pedantic(calls[provider], rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("provider", ["efface pack_items", "NumPy and Python"])
def test_assemble(provider: str, benchmark: BenchmarkFixture) -> None:
    """One provider."""
    benchmark.group = f"assemble a batch of {BATCH_TOKENS} tokens"
    stores = (store(400, 1), store(400, 2))
    plan = plan_epoch(*(s.lengths for s in stores), pairs_per_step=400, token_budget=BATCH_TOKENS, seed=0, epoch=0)
    batch = plan.micro_batches(0)[0]
    calls: dict[str, Callable[[], object]] = {
        "efface pack_items": lambda: pack_items(stores, batch.roles, batch.sequences),
        "NumPy and Python": lambda: numpy_pack(stores, batch),
    }
    benchmark.pedantic(calls[provider], rounds=20, warmup_rounds=1)
