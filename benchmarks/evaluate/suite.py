"""The evaluate suite: log-likelihoods of all answers of TOFU's evaluation, and greedy answers, with random weights."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from benchmarks.evaluate.inputs import SHAPES, EvaluateShape, model_of, splits, tokenizer_of
from benchmarks.evaluate.providers import SCORERS, Padded, PaddedRows, Scorer, Scores, generate_of
from benchmarks.harness.report import Report, cells
from benchmarks.harness.timing import interleaved, median_ratio, spread
from efface.evaluate import GenerationTask
from efface.hf.text.templates import prompt_ids

ROUNDS = 5
QUICK_ROUNDS = 2
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: torch.finfo(torch.bfloat16).eps}
"""Largest relative error of a mean log-probability against the padded loop in fp32; scorers beyond it are not timed."""
BATCH_SIZES = (1, 4, 8, 16, 32, 64)
QUESTIONS = 64  # at most
NEW_TOKENS = 200
ONE_IN = 40
"""One token in 40 ends an answer, so that answer lengths differ, as with a trained model. TOFU's answers are 34
tokens on average under an 8k BPE."""


@dataclass
class LikelihoodRow:
    """One scorer on one shape: milliseconds for all answers. Speed-ups are medians of the ratio within a round."""

    shape: str
    provider: str
    computes: str
    data: str
    answers: int
    tokens: int  # tokens that the model reads
    median_ms: float
    low_ms: float
    high_ms: float
    faster_than_padded: float
    faster_than_flat: float
    error: float  # largest relative error of a mean log-probability, against the padded loop in fp32
    rounds_ms: list[float] = field(repr=False)


def run_likelihood(shapes: Mapping[str, EvaluateShape], rounds: int, report: Report) -> None:
    rows: list[LikelihoodRow] = []
    for name, shape in shapes.items():
        measured = measure_likelihood(name, shape, rounds)
        rows += measured
        first = measured[0]
        report.note(f"{name}: {shape.rows} rows each of {first.data}, {first.answers} answers; {rounds} rounds.")
        headings = ("provider", "tokens", "median ms", "low", "high", "x padded", "x flat", "error")
        report.table("log-likelihoods ('x': times faster)", headings, [_likelihood_cells(row) for row in measured])
        report.save(likelihood=rows)


def _likelihood_cells(row: LikelihoodRow) -> list[str]:
    times = cells(".0f", row.median_ms, row.low_ms, row.high_ms)
    ratios = cells(".2f", row.faster_than_padded, row.faster_than_flat)
    return [row.provider, str(row.tokens), *times, *ratios, f"{row.error:.1e}"]


def measure_likelihood(name: str, shape: EvaluateShape, rounds: int) -> list[LikelihoodRow]:
    """Check every scorer on a shape, then time all of them. Each round scores all answers once.

    Raises:
        ArithmeticError: a score is outside the tolerance; scorers that compute different things are not compared.
    """
    data, source = splits(shape.rows)
    tokenizer = tokenizer_of(data, shape.config["vocab_size"])
    model = model_of(shape)
    scorers: dict[str, Scorer] = {kind.name: kind(tokenizer, data) for kind in SCORERS}
    exact = _flat(scorers[PaddedRows.name].scores(model_of(shape, torch.float32)))
    errors, tokens = {}, {}
    for scorer in scorers.values():
        scores, tokens[scorer.name] = _counted(scorer, model)
        errors[scorer.name] = _error(scorer, scores, exact, TOLERANCES[shape.dtype])
    times = interleaved({name: _call(scorer, model) for name, scorer in scorers.items()}, rounds)
    return [
        LikelihoodRow(
            shape=name,
            provider=scorer,
            computes=(type(scorers[scorer]).__doc__ or "").splitlines()[0],
            data=source,
            answers=len(exact),
            tokens=tokens[scorer],
            **spread(own),
            faster_than_padded=median_ratio(times[Padded.name], own),
            faster_than_flat=median_ratio(times[PaddedRows.name], own),
            error=errors[scorer],
            rounds_ms=own,
        )
        for scorer, own in times.items()
    ]


def _call(scorer: Scorer, model: LlamaForCausalLM) -> Callable[[int], object]:
    return lambda _round: scorer.scores(model)


def _counted(scorer: Scorer, model: LlamaForCausalLM) -> tuple[Scores, int]:
    """Return the scores, and the number of tokens that the model read to compute them."""
    seen: list[int] = []
    hook = model.model.embed_tokens.register_forward_hook(lambda _module, inputs, _out: seen.append(inputs[0].numel()))
    try:
        return scorer.scores(model), sum(seen)
    finally:
        hook.remove()


def _error(scorer: Scorer, scores: Scores, exact: NDArray[np.float64], tolerance: float) -> float:
    error = float(np.abs(_flat(scores) / exact - 1).max())
    if not error <= tolerance:
        raise ArithmeticError(
            f"{scorer.name!r} is not timed: expected mean log-probabilities within {tolerance:.1e}, got {error:.1e}"
        )
    return error


def _flat(scores: Scores) -> NDArray[np.float64]:
    return np.array([mean for split in scores for row in split for mean in row])


@dataclass
class GenerationRow:
    """One provider on one shape: milliseconds, and the median over rounds of its time relative to efface's."""

    shape: str
    provider: str
    median_ms: float
    low_ms: float
    high_ms: float
    against_efface: float
    questions: int
    mean_tokens: float
    longest: int


def run_generation(shapes: Mapping[str, EvaluateShape], rounds: int, report: Report) -> None:
    """Measure and print. The last line of each shape, the best ``model.generate``, must not be below 1.

    Only fp32 shapes are measured: in bf16 a greedy answer depends on the batch that it is generated in, for every
    provider.
    """
    rows: list[GenerationRow] = []
    for name, shape in shapes.items():
        if shape.dtype != torch.float32:
            continue
        own = measure_generation(name, shape, rounds)
        rows += own
        report.table(
            f"greedy answers, {name}: {own[0].questions} questions, {own[0].mean_tokens:.0f} tokens on average, "
            f"{own[0].longest} at most, {rounds} rounds",
            ("provider", "median ms", "low", "high", "x efface"),
            [_generation_cells(row) for row in own],
        )
        best = min(row.against_efface for row in own[1:])
        report.note(f"{name}: model.generate with its best batch size takes {best:.2f} x efface's time")
        report.save(generation=rows)


def _generation_cells(row: GenerationRow) -> list[str]:
    return [row.provider, *cells(".4g", row.median_ms, row.low_ms, row.high_ms), f"{row.against_efface:.2f}"]


def measure_generation(name: str, shape: EvaluateShape, rounds: int) -> list[GenerationRow]:
    """Check that all providers generate the same answer lengths, then time them interleaved. efface comes first.

    Raises:
        ArithmeticError: the answer lengths differ; providers that compute different things are not compared.
    """
    data, _ = splits(shape.rows)
    questions = [question for split in data for question in split.questions]
    questions = questions[:: -(-len(questions) // QUESTIONS)]
    tokenizer = tokenizer_of(data, shape.config["vocab_size"])
    model = _talkative(shape, tokenizer)
    task = GenerationTask(tokenizer, questions, template="question-answer", max_new_tokens=NEW_TOKENS)
    # In favour of generate: sorted prompts need little padding.
    prompts = sorted(prompt_ids(tokenizer, questions, template="question-answer"), key=len)

    def ours(_round: int) -> list[int]:
        return [result["tokens"] for batch in task.batches for result in task.run(model, batch)]

    calls: dict[str, Callable[[int], Sequence[int]]] = {"efface": ours}
    calls |= {f"model.generate, batch {size}": generate_of(model, prompts, size) for size in BATCH_SIZES}
    counts = {provider: sorted(call(0)) for provider, call in calls.items()}
    same = counts["efface"]
    for provider, lengths in counts.items():
        if lengths != same:
            raise ArithmeticError(f"{provider!r} is not timed: expected answers as long as efface's, got {lengths}")
    times = interleaved(calls, rounds)
    return [
        GenerationRow(
            shape=name,
            provider=provider,
            **spread(own),
            against_efface=median_ratio(own, times["efface"]),
            questions=len(same),
            mean_tokens=mean(same),
            longest=same[-1],
        )
        for provider, own in times.items()
    ]


def _talkative(shape: EvaluateShape, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return the shape's model with many end tokens, and larger weights so that it does not repeat one token."""
    model = model_of(shape)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(5)
    ends = [int(tokenizer.eos_token_id or 0), *range(7, model.config.vocab_size, ONE_IN)]
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=0, max_new_tokens=NEW_TOKENS)
    return model


PARTS: dict[str, Callable[[Mapping[str, EvaluateShape], int, Report], None]] = {
    "likelihood": run_likelihood,
    "generation": run_generation,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--part", action="append", choices=list(PARTS), help="default: all")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds")


def run(options: argparse.Namespace, report: Report) -> None:
    shapes = {name: SHAPES[name] for name in options.shape}
    rounds = QUICK_ROUNDS if options.quick else options.rounds
    for part in options.part or PARTS:
        PARTS[part](shapes, rounds, report)
