"""Greedy answers to TOFU's questions: efface's decode loop against ``model.generate`` at every batch size."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, median
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from benchmarks.evaluate.data import splits, tokenizer_of
from benchmarks.evaluate.shapes import Shape, model_of
from benchmarks.report import Report
from benchmarks.timing import interleaved, median_ratio
from efface.evaluate import GenerationTask
from efface.hf.text.templates import prompt_ids

BATCH_SIZES = (1, 4, 8, 16, 32, 64)
QUESTIONS = 64  # at most
NEW_TOKENS = 200
ONE_IN = 40
"""Of so many tokens one ends an answer, so that answers end at different lengths as a trained model's do: TOFU's are 34
tokens on average under an 8k BPE."""


@dataclass
class Row:
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


def run(shapes: Mapping[str, Shape], rounds: int, report: Report) -> None:
    """Measure and print; the last line of a shape is what must not be below 1.

    In fp32 alone: in bf16 a greedy answer changes with the batch that it is made in, whoever makes it.
    """
    rows: list[Row] = []
    for name, shape in shapes.items():
        if shape.dtype != torch.float32:
            continue
        own = measure(name, shape, rounds)
        rows += own
        report.table(
            f"greedy answers, {name}: {own[0].questions} questions, {own[0].mean_tokens:.0f} tokens on average, "
            f"{own[0].longest} at most, {rounds} rounds",
            ("provider", "median ms", "low", "high", "x efface"),
            [_cells(row) for row in own],
        )
        best = min(row.against_efface for row in own[1:])
        report.note(f"{name}: model.generate at its best batch size takes {best:.2f} x efface's time")
        report.save(generation=[asdict(row) for row in rows])


def _cells(row: Row) -> tuple[str, ...]:
    times = (f"{value:.4g}" for value in (row.median_ms, row.low_ms, row.high_ms))
    return (row.provider, *times, f"{row.against_efface:.2f}")


def measure(name: str, shape: Shape, rounds: int) -> list[Row]:
    """Time all, interleaved, once their answers are the same; efface comes first.

    Raises:
        ArithmeticError: answers differ. Providers that compute different things are not compared.
    """
    data, _ = splits(shape.rows)
    questions = [question for split in data for question in split.questions]
    questions = questions[:: -(-len(questions) // QUESTIONS)]
    tokenizer = tokenizer_of(data, shape.config["vocab_size"])
    model = _model(shape, tokenizer)
    task = GenerationTask(tokenizer, questions, template="question-answer", max_new_tokens=NEW_TOKENS)
    # A favour to generate: sorted, its batches hold little padding.
    prompts = sorted(prompt_ids(tokenizer, questions, template="question-answer"), key=len)

    def ours(_round: int) -> list[int]:
        return [result["tokens"] for batch in task.batches for result in task.run(model, batch)]

    calls: dict[str, Callable[[int], Sequence[int]]] = {"efface": ours}
    calls |= {f"model.generate, batch {size}": _generate_of(model, prompts, size) for size in BATCH_SIZES}
    counts = {provider: sorted(call(0)) for provider, call in calls.items()}
    same = counts["efface"]
    for provider, lengths in counts.items():
        if lengths != same:
            raise ArithmeticError(f"{provider!r} is not timed: expected answers as long as efface's, got {lengths}")
    times = interleaved(calls, rounds)
    ratios = {provider: median_ratio(own, times["efface"]) for provider, own in times.items()}
    return [
        Row(name, provider, median(own), min(own), max(own), ratios[provider], len(same), mean(same), same[-1])
        for provider, own in times.items()
    ]


def _model(shape: Shape, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return the shape's model with weights so large that it does not say one token for ever, and with many ends."""
    model = model_of(shape)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(5)
    ends = [int(tokenizer.eos_token_id or 0), *range(7, model.config.vocab_size, ONE_IN)]
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=0, max_new_tokens=NEW_TOKENS)
    return model


def _generate_of(model: Any, prompts: Sequence[Sequence[int]], size: int) -> Callable[[int], list[int]]:
    """Return a call that gives the lengths of the answers by ``model.generate``."""
    ends = torch.tensor(model.generation_config.eos_token_id)

    def call(_round: int) -> list[int]:
        counts: list[int] = []
        for first in range(0, len(prompts), size):
            batch = prompts[first : first + size]
            longest = max(map(len, batch))
            ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in batch])
            mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch])
            new = model.generate(ids, attention_mask=mask, do_sample=False)[:, longest:]
            ended = torch.isin(new, ends)
            counts += torch.where(ended.any(1), ended.int().argmax(1), new.shape[1]).tolist()
        return counts

    return call
