"""``pytest benchmarks --benchmark-only``: forward and backward of a tiny Llama's NPO step, padded against packed."""

from functools import cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.step.data import Step, make_steps, synthetic
from benchmarks.step.providers import Eager, EagerCached, EffaceCached, EffaceLive

_VOCABULARY = 512


def _model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=_VOCABULARY, attn_implementation="sdpa", use_cache=False, **sizes)
    return LlamaForCausalLM(config)


@cache
def _step() -> Step:
    stores = (synthetic(40, _VOCABULARY, seed=seed) for seed in (1, 2))
    return make_steps(*stores, _model(1).eval(), pairs=4, count=1)[0]


@pytest.mark.parametrize("kind", [Eager, EagerCached, EffaceLive, EffaceCached], ids=lambda kind: kind.name)
def test_step(kind: type[Eager], benchmark: BenchmarkFixture) -> None:
    """One provider."""
    benchmark.group = "forward and backward of a step"
    provider = kind(_model(0), _model(1))
    benchmark.pedantic(provider.gradients, (_step(),), rounds=5, warmup_rounds=1)
