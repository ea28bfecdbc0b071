"""``pytest benchmarks --benchmark-only``: the loss suite's smallest shape of each objective, a table a mode."""

from dataclasses import replace

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.loss.inputs import make_inputs
from benchmarks.loss.objectives import OBJECTIVES
from benchmarks.loss.providers import Provider, providers
from benchmarks.loss.suite import CHECKS

_SHAPES = {objective: next(shape for shape in CHECKS if shape.objective == objective) for objective in OBJECTIVES}
_CALLS = [
    pytest.param(name, provider, id=f"{name}: {provider.name}")
    for name, shape in _SHAPES.items()
    for provider in providers(replace(shape, bias=False))[0]
]


@pytest.mark.parametrize(("objective", "provider"), _CALLS)
def test_loss(objective: str, provider: Provider, benchmark: BenchmarkFixture) -> None:
    """One provider."""
    benchmark.group = f"{objective}, {provider.mode}"
    inputs = make_inputs(replace(_SHAPES[objective], bias=False)).of(provider.mode)
    benchmark.pedantic(provider.run, (inputs,), rounds=5, warmup_rounds=1)
