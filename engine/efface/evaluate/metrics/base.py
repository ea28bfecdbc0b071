"""What a metric is: it asks tasks about rows, scores each row, and says in one number what the scores amount to."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias, TypeVar

import numpy as np

from efface.evaluate.logs import FloatArray
from efface.evaluate.metrics.part import Part
from efface.evaluate.runner import RowResult, Task
from efface.registry import Registry

MetricResult: TypeAlias = dict[str, Any]
"""Open-unlearning's schema: ``{"agg_value": …, "value_by_index": {"0": {"score": …}, …}}``."""


@dataclass(frozen=True)
class Found:
    """Results of tasks, by model."""

    of_model: Mapping[int, Sequence[RowResult]]
    of_reference: Mapping[int, Sequence[RowResult]]

    def rows(self, task: Task) -> Sequence[RowResult]:
        """Return what the model's results for the rows of a task are."""
        return self.of_model[id(task)]

    def reference_rows(self, task: Task) -> Sequence[RowResult]:
        """Return those of the reference model."""
        return self.of_reference[id(task)]


class Metric(ABC):
    """A frozen dataclass with a ``name``, whose fields are its parameters.

    Attributes:
        name: by which ``get_metric`` knows it, and of its results.
        needs_holdout: whether it compares with rows that the model was not trained on.
        needs_reference: whether it reads the results of a reference model.
    """

    name: ClassVar[str]
    needs_holdout: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False

    def task(self, part: Part) -> Task:
        """Return what has to be computed of the rows; most metrics read statistics of their labels."""
        return part.tokens

    def check(self, holdout: Part | None, *, reference: bool, retain_values: Mapping[str, float]) -> None:
        """Raise ValueError if the metric lacks what it compares with; asked before anything is computed."""
        del retain_values
        if self.needs_holdout:
            needed(self, holdout)
        if self.needs_reference and not reference:
            raise ValueError(f"{self.name}: expected a reference model, whose losses it compares with, got none")

    @abstractmethod
    def scores(self, part: Part, found: Found) -> list[RowResult]:
        """Return one row of results for each row of ``part``; "score" is the metric's value of it."""

    def result(
        self, part: Part, holdout: Part | None, retain_values: Mapping[str, float], found: Found
    ) -> MetricResult:
        """Return the rows' scores and their mean."""
        del holdout, retain_values
        return summed_up(self.scores(part, found))


def needed(metric: Metric, holdout: Part | None) -> Part:
    """Return the holdout; raise ValueError if there is none."""
    if holdout is None:
        raise ValueError(
            f"{metric.name}: expected a holdout, rows like the forget set that no model was trained on, got none"
        )
    return holdout


def summed_up(rows: Sequence[RowResult]) -> MetricResult:
    """Return rows in open-unlearning's schema, with the mean of their scores."""
    return {
        "agg_value": float(np.mean([row["score"] for row in rows])),
        "value_by_index": {str(number): row for number, row in enumerate(rows)},
    }


@dataclass(frozen=True)
class Labels:
    """Statistics of the labels of one row, (labels,) each: see ``TokenStatistics``.

    ``words`` are those of the text alone: open-unlearning leaves the end of sequence out of its tokenwise metrics
    (``actual_indices[:-1]``), though not out of its losses. It leaves out the last label of a text that was cut, too;
    here only an end of sequence is left out, and never the only label.
    """

    logprobs: FloatArray
    first: np.ndarray[Any, np.dtype[np.bool_]]
    mean: FloatArray
    std: FloatArray
    words: slice

    @property
    def loss(self) -> float:
        """Mean token NLL, the end of sequence included."""
        return -float(self.logprobs.mean())


def labels_of(part: Part, rows: Sequence[RowResult]) -> list[Labels]:
    """Return the statistics of every row of ``part.tokens``.

    Raises:
        FloatingPointError: a log-probability that is not finite.
    """
    return [_labels(part, number, row) for number, row in enumerate(rows)]


def _labels(part: Part, number: int, row: RowResult) -> Labels:
    logprobs, mean, std = (np.array(row[name], np.float64) for name in ("logprobs", "mean", "std"))
    refuse_infinite(part, number, logprobs, mean, std)
    return Labels(logprobs, np.array(row["first"], bool), mean, std, slice(part.words[number]))


def refuse_infinite(part: Part, number: int, *values: FloatArray) -> None:
    """Raise FloatingPointError if what was computed of a row is not finite."""
    for column in values:
        if (bad := column[~np.isfinite(column)]).size:
            raise FloatingPointError(
                f"{part.source}, row {part.numbers[number]}: the model gives a token of {part.answers[number][:60]!r} "
                f"a log-probability of {bad[0]}; its weights are not finite or its activations overflow: look at the "
                "run that made it, or evaluate in bfloat16 or float32"
            )


_METRICS: Registry[Metric] = Registry("metric")

T = TypeVar("T", bound=type[Metric])


def register_metric(cls: T) -> T:
    """Class decorator: make a ``Metric`` subclass known under its ``name``.

    Raises:
        ValueError: the name is taken by another class.
    """
    return _METRICS.register(cls)


def known_metrics() -> dict[str, type[Metric]]:
    """Return the registered classes by name."""
    return _METRICS.known()


def get_metric(name: str, **parameters: Any) -> Metric:
    """Return the metric called ``name`` with the given parameters; case and underscores do not matter.

    Raises:
        ValueError: an unknown name, or a parameter that this metric does not have; both list what is known.
    """
    return _METRICS.make(name, **parameters)
