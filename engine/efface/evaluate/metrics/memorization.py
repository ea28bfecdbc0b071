"""How well a model knows each text: probability, exact memorisation, extraction strength, ROUGE, perplexity."""

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
    """exp(−mean token NLL), over the answer and its end of sequence (TOFU, arXiv 2401.06121, section 2.2.1)."""

    name: ClassVar[str] = "probability"

    def scores(self, part: Part, found: Found) -> list[RowResult]:
        """Return the probability of each row, and its mean loss."""
        rows = labels_of(part, found.rows(part.tokens))
        return [{"score": float(np.exp(-row.loss)), "avg_loss": row.loss} for row in rows]


@register_metric
@dataclass(frozen=True)
class ExactMemorization(Metric):
    """Σ_i [argmax p(· | x, y_<i) = y_i] / n over a text's n tokens (Tirumala et al. 2022, arXiv 2205.10770).

    It is the share of the tokens that the model would write. The end of sequence is not counted.
    """

    name: ClassVar[str] = "exact_memorization"

    def scores(self, part: Part, found: Found) -> list[RowResult]:
        """Return the share of each row."""
        rows = labels_of(part, found.rows(part.tokens))
        return [{"score": float(row.first[row.words].mean())} for row in rows]


@register_metric
@dataclass(frozen=True)
class ExtractionStrength(Metric):
    """1 − k/n, k the least number of a text's n tokens after which greedy decoding writes all others.

    How little of a text has to be shown for the rest to come out (Carlini et al. 2021, arXiv 2012.07805; as a share in
    arXiv 2506.12618). One forward pass tells: the rest comes out exactly if each of its tokens is the model's first
    choice after those before it. 1: the question is enough. The end of sequence is not counted.

    Attributes:
        floor: as open-unlearning (``memorization.py``), whose search ends at the last token, so that no row of n tokens
            scores below 1/n; False scores 0 where the last token is wrong, as the definition does (k = n).
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
    """ROUGE of what the model answers greedily, against the answer (TOFU, section 2.2.1); see ``rouge_recall``.

    Attributes:
        rouge_type: which is the score: "rougeL_recall", "rouge1_recall" or "rougeL_f1".
    """

    rouge_type: str = "rougeL_recall"
    name: ClassVar[str] = "rouge"

    def __post_init__(self) -> None:
        """Refuse a type that is not known."""
        known = list(rouge_recall("", ""))
        if self.rouge_type not in known:
            raise ValueError(f"`rouge_type`: expected one of {', '.join(known)}, got {self.rouge_type!r}")

    def task(self, part: Part) -> Task:
        """Return the greedy answers."""
        return part.generations

    def scores(self, part: Part, found: Found) -> list[RowResult]:
        """Return all scores of each row, with the answer that was generated."""
        rows = []
        for made, answer in zip(found.rows(part.generations), part.answers, strict=True):
            values = rouge_recall(made["text"], answer)
            rows.append({"score": values[self.rouge_type], **values, "generation": made["text"]})
        return rows


@register_metric
@dataclass(frozen=True)
class Perplexity(Metric):
    """exp(−Σ log p / tokens) of the texts in the answer column, alone: no question, no template (Jelinek et al. 1977).

    Texts are of any length, each token predicted once. A row's score is that of its text; the whole is over all tokens
    of all texts, so that long ones weigh more.

    Attributes:
        window: tokens that the model reads at a time.
        stride: tokens from one window's beginning to the next; see ``text_windows``. Smaller is slower, and closer to
            every token having ``window`` tokens before it.
    """

    window: int = 1024
    stride: int = 512
    name: ClassVar[str] = "perplexity"

    def __post_init__(self) -> None:
        """Refuse windows that leave tokens out."""
        check_window(self.window, self.stride)

    def task(self, part: Part) -> Task:
        """Return the windows."""
        return part.windows(self.window, self.stride).task

    def scores(self, part: Part, found: Found) -> list[RowResult]:
        """Return the perplexity of each text, its mean loss and its number of predicted tokens."""
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
        """Return the texts' perplexities and that of all their tokens."""
        del holdout, retain_values
        rows = self.scores(part, found)
        tokens = sum(row["tokens"] for row in rows)
        loss = sum(row["avg_loss"] * row["tokens"] for row in rows) / tokens
        return {**summed_up(rows), "agg_value": _exp(part, loss), "tokens": tokens}


def _exp(part: Part, loss: float) -> float:
    with np.errstate(over="ignore"):
        value = float(np.exp(loss))
    if not np.isfinite(value):
        raise FloatingPointError(f"{part.source}: a mean loss of {loss:.4g} nats is a perplexity beyond all numbers")
    return value
