"""``pytest benchmarks --benchmark-only``: imports and ``efface --help``, a fresh process each."""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.start.suite import SHAPES, TASKS, process


@pytest.mark.parametrize("task", SHAPES["smoke"])
def test_start(task: str, benchmark: BenchmarkFixture) -> None:
    """One task."""
    benchmark.group = "start-up"
    benchmark.pedantic(process(TASKS[task][0]), (0,), rounds=3, warmup_rounds=1)
