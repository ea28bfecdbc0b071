"""Probability of the answer, normalised by its length (TOFU, arXiv 2401.06121, section 2.2.1)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from efface.evaluate.metrics.base import Found, Labels, Metric, labels_of, register_metric
from efface.evaluate.metrics.part import Part
from efface.evaluate.rouge import rouge_recall
from efface.evaluate.runner import RowResult, Task


@register_metric
@dataclass(frozen=True)
class Probability(Metric):
    """exp(−mean token NLL), over the answer and its end of sequence."""

    name: ClassVar[str] = "probability"

    def scores(self, part: Part, found: Found) -> list[RowResult]:
        """Return the probability of each row, and its mean loss."""
        rows = labels_of(part, found.rows(part.tokens))
        return [{"score": float(np.exp(-row.loss)), "avg_loss": row.loss} for row in rows]


@register_metric
@dataclass(frozen=True)
class ExactMemorization(Metric):
    """Σ_i [argmax p(· | x, y_<i) = y_i] / n over a text's n tokens; the end of sequence is not counted."""

    name: ClassVar[str] = "exact_memorization"

    def scores(self, part: Part, found: Found) -> list[RowResult]:
        """Return the share of each row."""
        rows = labels_of(part, found.rows(part.tokens))
        return [{"score": float(row.first[row.words].mean())} for row in rows]


@register_metric
@dataclass(frozen=True)
class ExtractionStrength(Metric):
    """1 − k/n, k the least number of a text's n tokens after which greedy decoding writes all others.

    One forward pass tells: the rest comes out exactly if each of its tokens is the model's first choice after those
    before it. 1: the question is enough. The end of sequence is not counted.

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
    """ROUGE of what the model answers greedily, against the answer; see ``rouge_recall``.

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
