"""ROUGE of greedy answers, on any file of questions and answers (TOFU, arXiv 2401.06121, section 2.2.1)."""

from dataclasses import dataclass
from typing import ClassVar

from efface.evaluate.metrics.base import Found, Metric
from efface.evaluate.metrics.part import Part
from efface.evaluate.metrics.registry import register_metric
from efface.evaluate.rouge import rouge_recall
from efface.evaluate.task import RowResult, Task


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
