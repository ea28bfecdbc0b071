"""``pytest benchmarks --benchmark-only``: times the smallest shapes of each suite, with a table per group."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from benchmarks.evaluate import inputs as evaluate
from benchmarks.evaluate.providers import SCORERS, Scorer
from benchmarks.loss.inputs import CHECKS, OBJECTIVES, make_inputs
from benchmarks.loss.providers import LossProvider, providers
from benchmarks.packing import suite as packing
from benchmarks.start import suite as start
from benchmarks.step.data import Stores, chat, random_rows, synthetic
from benchmarks.step.inputs import SHAPES, Step, make_model, make_steps
from benchmarks.step.providers import (
    Eager,
    EagerCached,
    EffaceCached,
    EffaceLive,
    EffaceSharedCached,
    EffaceSharedLive,
    StepProvider,
)
from efface.batching import pack_items, plan_epoch

_HEADS = {name: replace(next(s for s in CHECKS if s.objective == name), bias=False) for name in OBJECTIVES}
_LOSSES = [
    pytest.param(name, provider, id=f"{name}: {provider.name}")
    for name, shape in _HEADS.items()
    for provider in providers(shape)[0]
]
_LLAMA = SHAPES["smoke"]


def timed(benchmark: Any, group: str, call: Callable[..., object], *arguments: object, rounds: int = 5) -> None:
    """Time a call as part of a group's table."""
    benchmark.group = group
    benchmark.pedantic(call, arguments, rounds=rounds, warmup_rounds=1)


@pytest.mark.parametrize(("objective", "provider"), _LOSSES)
def test_loss(objective: str, provider: LossProvider, benchmark: Any) -> None:
    """Forward and backward at the head, for each objective and mode."""
    inputs = make_inputs(_HEADS[objective]).of(provider.mode)
    timed(benchmark, f"{objective}, {provider.mode}", provider.run, inputs)


@cache
def _step(*, templated: bool = False) -> Step:
    if templated:
        data = Stores(*(chat(random_rows(40, 400, seed=seed), 400) for seed in (1, 2)), "random")
    else:
        data = Stores(*(synthetic(40, _LLAMA.llama().vocab_size, seed=seed) for seed in (1, 2)), "random")
    return make_steps(data, make_model(_LLAMA, "cpu", 1).eval(), pairs=4, count=1)[0]


@pytest.mark.parametrize("kind", [Eager, EagerCached, EffaceLive, EffaceCached], ids=lambda kind: kind.name)
def test_step(kind: type[StepProvider], benchmark: Any) -> None:
    """A tiny Llama's NPO step, padded and packed."""
    provider = kind(*(make_model(_LLAMA, "cpu", seed) for seed in (0, 1)))
    timed(benchmark, "forward and backward of a step", provider.gradients, _step())


@pytest.mark.parametrize(
    "kind", [Eager, EffaceLive, EffaceCached, EffaceSharedLive, EffaceSharedCached], ids=lambda kind: kind.name
)
def test_step_in_a_template(kind: type[StepProvider], benchmark: Any) -> None:
    """The same with Llama-3's chat template: padded, every sequence whole, and shared beginnings once."""
    provider = kind(*(make_model(_LLAMA, "cpu", seed) for seed in (0, 1)))
    timed(benchmark, "a step with Llama-3's chat template", provider.gradients, _step(templated=True))


@pytest.mark.parametrize("kind", SCORERS, ids=lambda kind: kind.name)
def test_likelihood(kind: type[Scorer], benchmark: Any) -> None:
    """All log-likelihoods of the smallest shape."""
    shape = evaluate.SHAPES["smoke"]
    data, _ = evaluate.splits(shape.rows)
    scorer = kind(evaluate.tokenizer_of(data, shape.config["vocab_size"]), data)
    timed(benchmark, "log-likelihoods of TOFU's evaluation", scorer.scores, evaluate.model_of(shape))


@pytest.mark.parametrize("provider", ["efface plan_epoch", "NumPy and Python"])
def test_plan(provider: str, benchmark: Any) -> None:
    """Planning the smallest epoch."""
    shape = packing.SHAPES["smoke"]
    forget, retain = packing.lengths(shape.forget, 1), packing.lengths(shape.retain, 2)
    calls: dict[str, Callable[[], object]] = {
        "efface plan_epoch": lambda: plan_epoch(
            forget, retain, pairs_per_step=shape.pairs, token_budget=shape.budget, seed=0, epoch=0
        ),
        "NumPy and Python": lambda: packing.numpy_plan(forget, retain, shape.pairs, shape.budget, seed=0),
    }
    timed(benchmark, "plan an epoch", calls[provider])


@pytest.mark.parametrize("provider", ["efface pack_items", "NumPy and Python"])
def test_assemble(provider: str, benchmark: Any) -> None:
    """Assembling the first batch of a step of 400 pairs."""
    tokens = packing.BATCH_TOKENS
    stores = (packing.store(400, 1), packing.store(400, 2))
    plan = plan_epoch(*(s.lengths for s in stores), pairs_per_step=400, token_budget=tokens, seed=0, epoch=0)
    batch = plan.micro_batches(0)[0]
    calls: dict[str, Callable[[], object]] = {
        "efface pack_items": lambda: pack_items(stores, batch.roles, batch.sequences),
        "NumPy and Python": lambda: packing.numpy_pack(stores, batch),
    }
    timed(benchmark, f"assemble a batch of {tokens} tokens", calls[provider], rounds=20)


@pytest.mark.parametrize("provider", ["efface pack_items", "NumPy and Python"])
def test_assemble_with_shared_beginnings(provider: str, benchmark: Any) -> None:
    """Assembling the first batch of a step of 400 pairs whose sequences begin alike; their beginning is stored once."""
    stores = (packing.store(400, 1, packing.BEGINNING), packing.store(400, 2, packing.BEGINNING))
    batch = packing.batches_of(stores, share=True)[0]
    calls: dict[str, Callable[[], object]] = {
        "efface pack_items": lambda: pack_items(stores, batch.roles, batch.sequences, share=True, last_tokens=False),
        "NumPy and Python": lambda: packing.numpy_tree(stores, batch),
    }
    timed(benchmark, f"assemble a batch of {packing.BATCH_TOKENS} stored tokens", calls[provider], rounds=20)


@pytest.mark.parametrize("task", start.SHAPES["smoke"])
def test_start(task: str, benchmark: Any) -> None:
    """Imports and ``efface --help``, each in a new process."""
    timed(benchmark, "start-up", start.process(start.TASKS[task][0]), 0, rounds=3)
