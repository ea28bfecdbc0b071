"""The step suite: a whole NPO training step of a Llama with random weights on TOFU's pairs, padded against packed."""

import argparse
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.report import Report
from benchmarks.step.data import Step, make_steps, stores
from benchmarks.step.providers import PROVIDERS, Eager, EagerCached, Provider
from benchmarks.timing import interleaved, median_ratio


@dataclass(frozen=True)
class Shape:
    """A model, and the pairs of a step. Rounds cycle through ``steps`` different steps."""

    dtype: torch.dtype
    config: Mapping[str, Any]
    pairs: int = 8
    steps: int = 8


_COMMON = {"max_position_embeddings": 512, "tie_word_embeddings": False, "use_cache": False}

SHAPES = {
    "smoke": Shape(
        torch.float32,
        {
            "vocab_size": 512,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
        pairs=2,
        steps=2,
    ),
    "Llama 8 layers, d 512, V 32000, bf16": Shape(
        torch.bfloat16,
        {
            "vocab_size": 32000,
            "hidden_size": 512,
            "intermediate_size": 1376,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
        },
    ),
}
ROUNDS = 16  # every step twice


@dataclass(frozen=True)
class Tolerance:
    """How far a provider may be from the eager step in the next wider dtype, relative, before it is not timed."""

    wider: torch.dtype
    loss: float
    gradient: float  # of the worst parameter's gradient, rms


TOLERANCES = {
    torch.float32: Tolerance(torch.float64, 1e-5, 1e-4),
    torch.bfloat16: Tolerance(torch.float32, torch.finfo(torch.bfloat16).eps, 4 * torch.finfo(torch.bfloat16).eps),
}


@dataclass
class Row:
    """One provider on one shape. Times in milliseconds: forward + backward, then with clipping and AdamW ("whole").

    Speed-ups are medians of the ratio within a round: to the eager step with its live second model, and to the eager
    step with the same kind of reference.
    """

    shape: str
    provider: str
    computes: str
    data: str
    real_tokens: float  # of a step, mean over the steps
    padded_tokens: float
    median_ms: float
    low_ms: float
    high_ms: float
    faster_than_live: float
    faster_than_same: float
    whole_median_ms: float
    whole_low_ms: float
    whole_high_ms: float
    whole_faster_than_live: float
    whole_faster_than_same: float
    tokens_per_second: float  # real tokens, whole step
    error_loss: float  # relative to the eager step in the next wider dtype
    error_gradient: float
    rounds_ms: list[float] = field(repr=False)
    rounds_whole_ms: list[float] = field(repr=False)


def _model(shape: Shape, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings: dict[str, Any] = {**_COMMON, **shape.config, "attn_implementation": "sdpa"}
    return _cast(LlamaForCausalLM(LlamaConfig(**settings)), shape.dtype)


def _cast(model: LlamaForCausalLM, dtype: torch.dtype) -> LlamaForCausalLM:
    torch.nn.Module.to(model, dtype)
    return model


def check(providers: list[Provider], steps: list[Step], gold: Eager, tolerance: Tolerance) -> dict[str, Tensor]:
    """Compare every step's loss and the first step's gradients with ``gold``; return each provider's two errors.

    Raises:
        ArithmeticError: an error beyond the tolerance. Providers that compute different things are not compared.
    """
    errors = {}
    exact = [gold.loss(step).item() for step in steps]
    gold.gradients(steps[0])
    for provider in providers:
        losses = [provider.gradients(step).item() for step in reversed(steps)][::-1]  # ends with the first's gradients
        error_loss = max(abs(got - want) / abs(want) for got, want in zip(losses, exact, strict=True))
        error_gradient = max(
            _relative(own.grad, wanted.grad)
            for own, wanted in zip(provider.policy.parameters(), gold.policy.parameters(), strict=True)
        )
        if not (error_loss <= tolerance.loss and error_gradient <= tolerance.gradient):
            raise ArithmeticError(
                f"{provider.name!r} is not timed: expected the eager step's loss within {tolerance.loss:.1e} and "
                f"gradients within {tolerance.gradient:.1e}, got {error_loss:.1e} and {error_gradient:.1e}"
            )
        errors[provider.name] = torch.tensor([error_loss, error_gradient])
    return errors


def _relative(got: Tensor | None, exact: Tensor | None) -> float:
    if got is None or exact is None:
        return float("inf")
    return float((got.to(exact.dtype) - exact).norm() / exact.norm())


def measure(name: str, rounds: int) -> tuple[list[Row], list[Step]]:
    """Check every provider on a shape, then time all of them, one step of each a round."""
    shape = SHAPES[name]
    # Two seeds: the log-ratio of policy and reference is not zero, so that the check sees it.
    policy, reference = _model(shape, 0), _model(shape, 1)
    forget, retain, data = stores(policy.config.vocab_size)
    steps = make_steps(forget, retain, reference, pairs=shape.pairs, count=shape.steps)
    tolerance = TOLERANCES[shape.dtype]
    providers = [kind(policy, reference) for kind in PROVIDERS]
    gold = Eager(_cast(policy, tolerance.wider), _cast(reference, tolerance.wider))
    errors = check(providers, steps, gold, tolerance)
    del gold

    calls: dict[tuple[str, str], Callable[[int], object]] = {}
    for provider in providers:
        calls[provider.name, "gradients"] = _gradients_of(provider, steps)
        calls[provider.name, "update"] = _update_of(provider)
    times = interleaved(calls, rounds, warm_up=1)
    part = {p.name: times[p.name, "gradients"] for p in providers}
    whole = {p.name: [a + b for a, b in zip(part[p.name], times[p.name, "update"], strict=True)] for p in providers}
    tokens = [steps[i % len(steps)].batch.tokens for i in range(rounds)]

    rows = []
    for provider in providers:
        mine, all_mine = part[provider.name], whole[provider.name]
        same = EagerCached.name if "cached" in provider.name else Eager.name
        error_loss, error_gradient = errors[provider.name].tolist()
        rows.append(
            Row(
                shape=name,
                provider=provider.name,
                computes=(type(provider).__doc__ or "").splitlines()[0],
                data=data,
                real_tokens=statistics.mean(step.batch.tokens for step in steps),
                padded_tokens=statistics.mean(step.padded_tokens for step in steps),
                median_ms=statistics.median(mine),
                low_ms=min(mine),
                high_ms=max(mine),
                faster_than_live=median_ratio(part[Eager.name], mine),
                faster_than_same=median_ratio(part[same], mine),
                whole_median_ms=statistics.median(all_mine),
                whole_low_ms=min(all_mine),
                whole_high_ms=max(all_mine),
                whole_faster_than_live=median_ratio(whole[Eager.name], all_mine),
                whole_faster_than_same=median_ratio(whole[same], all_mine),
                tokens_per_second=statistics.median(n / ms * 1e3 for n, ms in zip(tokens, all_mine, strict=True)),
                error_loss=error_loss,
                error_gradient=error_gradient,
                rounds_ms=mine,
                rounds_whole_ms=all_mine,
            )
        )
    return rows, steps


def _gradients_of(provider: Provider, steps: list[Step]) -> Callable[[int], object]:
    return lambda round_: provider.gradients(steps[round_ % len(steps)])


def _update_of(provider: Provider) -> Callable[[int], object]:
    return lambda _round: provider.update()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: this suite has the common arguments only."""


def run(options: argparse.Namespace, report: Report) -> None:
    """Measure the chosen shapes."""
    rows = []
    for name in options.shape:
        measured, steps = measure(name, options.rounds)
        rows += measured
        first, shape = measured[0], SHAPES[name]
        report.note(
            f"{name}: NPO, {shape.pairs} forget/retain pairs a step, {len(steps)} steps of {first.data}, "
            f"{options.rounds} rounds. Mean tokens a step: {first.real_tokens:.0f} real, {first.padded_tokens:.0f} "
            f"padded ({first.padded_tokens / first.real_tokens:.2f} x)."
        )
        headings = ("median ms", "low", "high", "x live", "x same")
        report.table(
            "forward + backward ('x live': times faster than the padded step with its live second model; "
            "'x same': than the padded step with the same reference)",
            ("provider", *headings, "error loss", "error gradient"),
            [_part(row) for row in measured],
        )
        report.table(
            "with gradient clipping and AdamW", ("provider", *headings, "tokens/s"), [_whole(row) for row in measured]
        )
        report.save(step=[asdict(row) for row in rows])


def _part(row: Row) -> list[str]:
    times = [f"{value:.1f}" for value in (row.median_ms, row.low_ms, row.high_ms)]
    ratios = [f"{value:.2f}" for value in (row.faster_than_live, row.faster_than_same)]
    return [row.provider, *times, *ratios, f"{row.error_loss:.1e}", f"{row.error_gradient:.1e}"]


def _whole(row: Row) -> list[str]:
    times = [f"{value:.1f}" for value in (row.whole_median_ms, row.whole_low_ms, row.whole_high_ms)]
    ratios = [f"{value:.2f}" for value in (row.whole_faster_than_live, row.whole_faster_than_same)]
    return [row.provider, *times, *ratios, f"{row.tokens_per_second:.0f}"]
