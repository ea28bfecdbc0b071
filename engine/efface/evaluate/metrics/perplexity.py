"""Perplexity of texts of any length (Jelinek et al. 1977), each token predicted once."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from efface.evaluate.metrics.base import Found, Metric, MetricResult, refuse_infinite, register_metric, summed_up
from efface.evaluate.metrics.part import Part, by_text, check_window
from efface.evaluate.runner import RowResult, Task


@register_metric
@dataclass(frozen=True)
class Perplexity(Metric):
    """exp(−Σ log p / tokens) of the texts in the answer column, on their own: no question, no template.

    A row's score is that of its text; the whole is over all tokens of all texts, so that long ones weigh more.

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
        for number, logprobs in enumerate(by_text(windows, [row["logprobs"] for row in found.rows(windows.task)])):
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
