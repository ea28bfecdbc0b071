"""TOFU's evaluation of a Llama with random weights: log-likelihoods of all answers, greedy answers."""

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
"""How far a mean log-probability may be from the padded loop's in fp32, relative, before its scorer is not timed."""
BATCH_SIZES = (1, 4, 8, 16, 32, 64)
QUESTIONS = 64  # at most
NEW_TOKENS = 200
ONE_IN = 40
"""Of so many tokens one ends an answer, so that answers end at different lengths as a trained model's do: TOFU's are 34
tokens on average under an 8k BPE."""


@dataclass
class LikelihoodRow:
    """One scorer on one shape: milliseconds for all answers; speed-ups are medians of the ratio within a round."""

    shape: str
    provider: str
    computes: str
    data: str
    answers: int
    tokens: int  # that the model reads
    median_ms: float
    low_ms: float
    high_ms: float
    faster_than_padded: float
    faster_than_flat: float
    error: float  # the largest of a mean log-probability, relative to the padded loop in fp32
    rounds_ms: list[float] = field(repr=False)


def run_likelihood(shapes: Mapping[str, EvaluateShape], rounds: int, report: Report) -> None:
    """Measure the shapes."""
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
    """Check every scorer on a shape, then time all of them, all answers a round.

    Raises:
        ArithmeticError: a score beyond the tolerance. Scorers that compute different things are not compared.
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
    """Return the scores, and how many tokens the model read for them."""
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
    """One provider on one shape: milliseconds, and the median over rounds of its time by efface's."""

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
    """Measure and print; the last line of a shape is what must not be below 1.

    In fp32 alone: in bf16 a greedy answer changes with the batch that it is made in, whoever makes it.
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
        report.note(f"{name}: model.generate at its best batch size takes {best:.2f} x efface's time")
        report.save(generation=rows)


def _generation_cells(row: GenerationRow) -> list[str]:
    return [row.provider, *cells(".4g", row.median_ms, row.low_ms, row.high_ms), f"{row.against_efface:.2f}"]


def measure_generation(name: str, shape: EvaluateShape, rounds: int) -> list[GenerationRow]:
    """Time all, interleaved, once their answers are the same; efface comes first.

    Raises:
        ArithmeticError: answers differ. Providers that compute different things are not compared.
    """
    data, _ = splits(shape.rows)
    questions = [question for split in data for question in split.questions]
    questions = questions[:: -(-len(questions) // QUESTIONS)]
    tokenizer = tokenizer_of(data, shape.config["vocab_size"])
    model = _talkative(shape, tokenizer)
    task = GenerationTask(tokenizer, questions, template="question-answer", max_new_tokens=NEW_TOKENS)
    # A favour to generate: sorted, its batches hold little padding.
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
    """Return the shape's model with weights so large that it does not say one token for ever, and with many ends."""
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
    """Choose parts; be quick."""
    parser.add_argument("--part", action="append", choices=list(PARTS), help="default: all")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds")


def run(options: argparse.Namespace, report: Report) -> None:
    """Measure the chosen parts on the chosen shapes."""
    shapes = {name: SHAPES[name] for name in options.shape}
    rounds = QUICK_ROUNDS if options.quick else options.rounds
    for part in options.part or PARTS:
        PARTS[part](shapes, rounds, report)
