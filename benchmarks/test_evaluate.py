"""``pytest benchmarks --benchmark-only``: all log-likelihoods of the evaluate suite's smallest shape, a scorer each."""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.evaluate.data import splits, tokenizer_of
from benchmarks.evaluate.scorers import SCORERS, Scorer
from benchmarks.evaluate.shapes import SHAPES, model_of

_SHAPE = SHAPES["smoke"]


@pytest.mark.parametrize("kind", SCORERS, ids=lambda kind: kind.name)
def test_likelihood(kind: type[Scorer], benchmark: BenchmarkFixture) -> None:
    """One scorer."""
    benchmark.group = "log-likelihoods of TOFU's evaluation"
    data, _ = splits(_SHAPE.rows)
    scorer = kind(tokenizer_of(data, _SHAPE.config["vocab_size"]), data)
    benchmark.pedantic(scorer.scores, (model_of(_SHAPE),), rounds=5, warmup_rounds=1)
