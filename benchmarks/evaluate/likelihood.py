"""The likelihood part of TOFU's evaluation: every answer, paraphrase and false answer scored, padded against shared."""

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LlamaForCausalLM

from benchmarks.evaluate.data import splits, tokenizer_of
from benchmarks.evaluate.scorers import SCORERS, Padded, PaddedRows, Scorer, Scores
from benchmarks.evaluate.shapes import Shape, model_of
from benchmarks.report import Report
from benchmarks.timing import interleaved, median_ratio

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: torch.finfo(torch.bfloat16).eps}
"""How far a mean log-probability may be from the padded loop's in fp32, relative, before its scorer is not timed."""


@dataclass
class Row:
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


def run(shapes: dict[str, Shape], rounds: int, report: Report) -> None:
    """Measure the shapes."""
    rows: list[Row] = []
    for name, shape in shapes.items():
        measured = measure(name, shape, rounds)
        rows += measured
        first = measured[0]
        report.note(f"{name}: {shape.rows} rows each of {first.data}, {first.answers} answers; {rounds} rounds.")
        headings = ("provider", "tokens", "median ms", "low", "high", "x padded", "x flat", "error")
        report.table("log-likelihoods ('x': times faster)", headings, [_cells(row) for row in measured])
        report.save(likelihood=[asdict(row) for row in rows])


def _cells(row: Row) -> list[str]:
    times = [f"{value:.0f}" for value in (row.median_ms, row.low_ms, row.high_ms)]
    ratios = [f"{value:.2f}" for value in (row.faster_than_padded, row.faster_than_flat)]
    return [row.provider, str(row.tokens), *times, *ratios, f"{row.error:.1e}"]


def measure(name: str, shape: Shape, rounds: int) -> list[Row]:
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
        Row(
            shape=name,
            provider=scorer,
            computes=(type(scorers[scorer]).__doc__ or "").splitlines()[0],
            data=source,
            answers=len(exact),
            tokens=tokens[scorer],
            median_ms=statistics.median(own),
            low_ms=min(own),
            high_ms=max(own),
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
