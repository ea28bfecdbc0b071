"""Metrics of memorisation: probability, exact memorisation, extraction strength, ROUGE and perplexity."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from efface.evaluate.generation import rouge_recall
from efface.evaluate.logs import MetricResult
from efface.evaluate.metrics.base import (
    Found,
    Labels,
    Metric,
    labels_of,
    refuse_infinite,
    register_metric,
    summed_up,
)
from efface.evaluate.metrics.part import Part, check_window
from efface.evaluate.runner import RowResult, Task


@register_metric
@dataclass(frozen=True)
class Probability(Metric):
    """exp(−mean token NLL) of the answer, including its end of sequence (TOFU, arXiv 2401.06121, section 2.2.1)."""

    name: ClassVar[str] = "probability"

    def scores(self, part: Part, found: Found) -> list[RowResult]:
        """Return the probability and the mean loss of each row."""
        rows = labels_of(part, found.rows(part.tokens))
        return [{"score": float(np.exp(-row.loss)), "avg_loss": row.loss} for row in rows]


@register_metric
@dataclass(frozen=True)
class ExactMemorization(Metric):
    """Σ_i [argmax p(· | x, y_<i) = y_i] / n over a text's n tokens (Tirumala et al. 2022, arXiv 2205.10770).

    It is the share of tokens that are the model's greedy choice. The end of sequence is excluded.
    """

    name: ClassVar[str] = "exact_memorization"

    def scores(self, part: Part, found: Found) -> list[RowResult]:
        """Return the share of greedy tokens in each row."""
        rows = labels_of(part, found.rows(part.tokens))
        return [{"score": float(row.first[row.words].mean())} for row in rows]


@register_metric
@dataclass(frozen=True)
class ExtractionStrength(Metric):
    """1 − k/n, where k is the length of the shortest prefix from which greedy decoding writes the rest of n tokens.

    The metric measures how little of a text must be shown to extract the rest (Carlini et al. 2021, arXiv 2012.07805;
    as a share in arXiv 2506.12618). One forward pass is enough: the rest is extracted exactly if each of its tokens is
    the model's greedy choice after the tokens before it. A value of 1 means that the question alone is enough. The end
    of sequence is excluded.

    Attributes:
        floor: whether to search as open-unlearning does (``memorization.py``). Its search ends at the last token, so a
            row of n tokens scores at least 1/n. False follows the definition: a row whose last token is wrong has k = n
            and scores 0.
    """

    floor: bool = True
    name: ClassVar[str] = "extraction_strength"

    def scores(self, part: Part, found: Found) -> list[RowResult]:
        """Return the strength of each row."""
        return [{"score": self._strength(row)} for row in labels_of(part, found.rows(part.tokens))]

    def _strength(self, row: Labels) -> float:
        first = row.first[row.words]
        wrong = np.flatnonzero(~first)
        k = int(wrong[-1]) + 1 if wrong.size else 0
        return 1 - (min(k, len(first) - 1) if self.floor else k) / len(first)


@register_metric
@dataclass(frozen=True)
class Rouge(Metric):
    """ROUGE of the model's greedy answer against the true answer (TOFU, section 2.2.1); see ``rouge_recall``.

    Attributes:
        rouge_type: the score to use: "rougeL_recall", "rouge1_recall" or "rougeL_f1".
    """

    rouge_type: str = "rougeL_recall"
    name: ClassVar[str] = "rouge"

    def __post_init__(self) -> None:
        """Raise ValueError if ``rouge_type`` is unknown."""
        known = list(rouge_recall("", ""))
        if self.rouge_type not in known:
            raise ValueError(f"`rouge_type`: expected one of {', '.join(known)}, got {self.rouge_type!r}")

    def task(self, part: Part) -> Task:
        """Return the task that generates the greedy answers."""
        return part.generations

    def scores(self, part: Part, found: Found) -> list[RowResult]:
        """Return all ROUGE scores of each row and the generated answer."""
        rows = []
        for made, answer in zip(found.rows(part.generations), part.answers, strict=True):
            values = rouge_recall(made["text"], answer)
            rows.append({"score": values[self.rouge_type], **values, "generation": made["text"]})
        return rows


@register_metric
@dataclass(frozen=True)
class Perplexity(Metric):
    """exp(−Σ log p / tokens) of the texts in the answer column, without question or template (Jelinek et al. 1977).

    Texts can have any length; each token except the first is predicted once. A row's score is the perplexity of its
    text. The aggregate is the perplexity over all tokens of all texts, so that long texts weigh more.

    Attributes:
        window: number of tokens that the model reads at a time.
        stride: number of tokens between the starts of two windows; see ``text_windows``. A smaller stride is slower
            and gives each token more context, up to ``window`` tokens.
    """

    window: int = 1024
    stride: int = 512
    name: ClassVar[str] = "perplexity"

    def __post_init__(self) -> None:
        """Raise ValueError if the windows would skip tokens."""
        check_window(self.window, self.stride)

    def task(self, part: Part) -> Task:
        """Return the task that scores the windows."""
        return part.windows(self.window, self.stride).task

    def scores(self, part: Part, found: Found) -> list[RowResult]:
        """Return each text's perplexity, mean loss and number of predicted tokens."""
        windows = part.windows(self.window, self.stride)
        rows = []
        for number, logprobs in enumerate(windows.by_text([row["logprobs"] for row in found.rows(windows.task)])):
            refuse_infinite(part, number, logprobs)
            loss = -float(logprobs.mean())
            rows.append({"score": _exp(part, loss), "avg_loss": loss, "tokens": len(logprobs)})
        return rows

    def result(
        self, part: Part, holdout: Part | None, retain_values: Mapping[str, float], found: Found
    ) -> MetricResult:
        """Return the perplexity of each text and the perplexity over all tokens."""
        del holdout, retain_values
        rows = self.scores(part, found)
        tokens = sum(row["tokens"] for row in rows)
        loss = sum(row["avg_loss"] * row["tokens"] for row in rows) / tokens
        return {**summed_up(rows), "agg_value": _exp(part, loss), "tokens": tokens}


def _exp(part: Part, loss: float) -> float:
    with np.errstate(over="ignore"):
        value = float(np.exp(loss))
    if not np.isfinite(value):
        raise FloatingPointError(
            f"{part.source}: expected a finite perplexity, got a mean loss of {loss:.4g} nats, whose exponential "
            "overflows; check the model"
        )
    return value
