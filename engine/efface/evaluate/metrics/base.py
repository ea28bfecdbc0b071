"""The base class and the registry of metrics, and ``evaluate_metrics``, which runs each task of the metrics once.

A metric names the task that it needs, computes a score for each row from the task's results, and aggregates the scores
into one number.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from efface.evaluate.logs import FloatArray, MetricResult, metric_of
from efface.evaluate.metrics.part import Part, Reading
from efface.evaluate.runner import Progress, RowResult, Task, run_tasks
from efface.hf.text.rows import Rows
from efface.registry import Registry


@dataclass(frozen=True)
class Found:
    """Results of tasks on the model and on the reference model, by the id of the task."""

    of_model: Mapping[int, Sequence[RowResult]]
    of_reference: Mapping[int, Sequence[RowResult]]

    def rows(self, task: Task) -> Sequence[RowResult]:
        """Return the model's results for the rows of a task."""
        return self.of_model[id(task)]

    def reference_rows(self, task: Task) -> Sequence[RowResult]:
        """Return the reference model's results for the rows of a task."""
        return self.of_reference[id(task)]


class Metric(ABC):
    """Base class of metrics. A metric is a frozen dataclass; its fields are its parameters.

    Attributes:
        name: the name for ``get_metric``, and the key of its results.
        needs_holdout: whether it needs rows that the model was not trained on.
        needs_reference: whether it needs the results of a reference model.
    """

    name: ClassVar[str]
    needs_holdout: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False

    def task(self, part: Part) -> Task:
        """Return the task that computes the metric's input; by default, statistics of the rows' labels."""
        return part.tokens

    def check(self, holdout: Part | None, *, reference: bool, retain_values: Mapping[str, float]) -> None:
        """Raise ValueError if the holdout, reference model or retain value that the metric needs is missing.

        ``evaluate_metrics`` calls this method before it computes anything.
        """
        del retain_values
        if self.needs_holdout:
            needed(self, holdout)
        if self.needs_reference and not reference:
            raise ValueError(f"{self.name}: expected a reference model to compare losses with, got none; give one")

    @abstractmethod
    def scores(self, part: Part, found: Found) -> list[RowResult]:
        """Return a result for each row of ``part``. Its key "score" is the metric's value for the row."""

    def result(
        self, part: Part, holdout: Part | None, retain_values: Mapping[str, float], found: Found
    ) -> MetricResult:
        """Return the scores of the rows and their mean."""
        del holdout, retain_values
        return summed_up(self.scores(part, found))


def needed(metric: Metric, holdout: Part | None) -> Part:
    """Return the holdout, or raise ValueError if it is None."""
    if holdout is None:
        raise ValueError(
            f"{metric.name}: expected a holdout, got none; give rows like the forget set that no model was trained on"
        )
    return holdout


def summed_up(rows: Sequence[RowResult]) -> MetricResult:
    """Return rows in open-unlearning's schema, with the mean of their scores."""
    return metric_of(float(np.mean([row["score"] for row in rows])), rows)


@dataclass(frozen=True)
class Labels:
    """Statistics of the labels of one row, each of shape (labels,); see ``TokenStatistics``.

    ``words`` selects the labels without the end of sequence. open-unlearning excludes the end of sequence from its
    tokenwise metrics (``actual_indices[:-1]``) but not from its losses. For a text that was cut it also excludes the
    last label. Here, only an end-of-sequence token is excluded, and never the only label.
    """

    logprobs: FloatArray
    first: np.ndarray[Any, np.dtype[np.bool_]]
    mean: FloatArray
    std: FloatArray
    words: slice

    @property
    def loss(self) -> float:
        """The mean token NLL, including the end of sequence."""
        return -float(self.logprobs.mean())


def labels_of(part: Part, rows: Sequence[RowResult]) -> list[Labels]:
    """Return the label statistics of every row, from the results of ``part.tokens``.

    Raises:
        FloatingPointError: a log-probability is not finite.
    """
    labels = []
    for number, row in enumerate(rows):
        logprobs, mean, std = (np.array(row[name], np.float64) for name in ("logprobs", "mean", "std"))
        refuse_infinite(part, number, logprobs, mean, std)
        labels.append(Labels(logprobs, np.array(row["first"], bool), mean, std, slice(part.words[number])))
    return labels


def refuse_infinite(part: Part, number: int, *values: FloatArray) -> None:
    """Raise FloatingPointError if a value that was computed for a row is not finite."""
    for column in values:
        if (bad := column[~np.isfinite(column)]).size:
            raise FloatingPointError(
                f"{part.source}, row {part.numbers[number]}: expected finite log-probabilities of the tokens of "
                f"{part.answers[number][:60]!r}, got {bad[0]}; if the weights are not finite, check the training run; "
                "if activations overflow, evaluate in bfloat16 or float32"
            )


_METRICS: Registry[Metric] = Registry("metric")
_T = TypeVar("_T", bound=type[Metric])


def register_metric(cls: _T) -> _T:
    """Register a ``Metric`` subclass under its ``name``. Use it as a class decorator.

    Raises:
        ValueError: another class has the same name.
    """
    return _METRICS.register(cls)


def known_metrics() -> dict[str, type[Metric]]:
    """Return the registered metric classes by name."""
    return _METRICS.known()


def get_metric(name: str, **parameters: Any) -> Metric:
    """Return the metric ``name`` with the given parameters. The name's case and underscores are ignored.

    Raises:
        ValueError: the name is unknown, or the metric does not have a parameter. The message lists the known ones.
    """
    return _METRICS.make(name, **parameters)


def evaluate_metrics(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    metrics: Sequence[str | Metric],
    *,
    holdout: Rows | None = None,
    reference_model: Any = None,
    retain_values: Mapping[str, float] | None = None,
    reading: Reading | None = None,
    source: str = "forget",
    store: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, MetricResult]:
    """Evaluate metrics on rows and return them by name, in open-unlearning's schema.

    Args:
        model: a causal language model; see ``run_tasks``.
        tokenizer: its tokenizer.
        rows: the rows to evaluate, usually the forget set. They are questions with answers, or texts.
        metrics: names (see ``known_metrics``), or ``Metric`` objects, which can have other parameters.
        holdout: for membership attacks: rows with the same columns that are like ``rows`` but that no model was
            trained on.
        reference_model: for ``mia_reference``: a model with the same tokenizer.
        retain_values: for ``privleak``: the values of metrics, by name, on a model trained only on the retain set.
        reading: columns and limits; None uses the columns ``question`` and ``answer``.
        source: name of the rows in messages.
        store: a file that keeps finished rows; see ``run_tasks``.
        progress: see ``run_tasks``.

    Raises:
        ValueError: a metric is unknown, given twice, or lacks a holdout, reference model or retain value; or there are
            no rows.
        FloatingPointError: a log-probability is not finite. The message names the row.
    """
    chosen = [get_metric(metric) if isinstance(metric, str) else metric for metric in metrics]
    names = [metric.name for metric in chosen]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"`metrics`: expected at least one, each only once, got {', '.join(names) or 'none'}")
    reading = reading or Reading()
    part = Part(source, rows, tokenizer, reading)
    others = None if holdout is None else Part("holdout", holdout, tokenizer, reading)
    for metric in chosen:
        metric.check(others, reference=reference_model is not None, retain_values=retain_values or {})
    asked = [(metric, task) for metric in chosen for task in _tasks(metric, part, others)]
    found = Found(
        _run(model, [task for _, task in asked], store, progress),
        _run(reference_model, [task for metric, task in asked if metric.needs_reference], store, progress),
    )
    return {metric.name: metric.result(part, others, retain_values or {}, found) for metric in chosen}


def qa_rouge(model: Any, tokenizer: PreTrainedTokenizerBase, rows: Rows, **options: Any) -> MetricResult:
    """Return the metric ``rouge`` of greedy answers to questions. ``options`` are those of ``evaluate_metrics``."""
    return evaluate_metrics(model, tokenizer, rows, ["rouge"], **options)["rouge"]


def _tasks(metric: Metric, part: Part, holdout: Part | None) -> Iterator[Task]:
    yield metric.task(part)
    if metric.needs_holdout and holdout is not None:
        yield metric.task(holdout)


def _run(
    model: Any, tasks: Sequence[Task], store: str | Path | None, progress: Progress | None
) -> dict[int, list[RowResult]]:
    """Run each distinct task once and return the results by the id of the task."""
    distinct = {id(task): task for task in tasks}
    if not distinct:
        return {}
    results = run_tasks(model, list(distinct.values()), store=store, progress=progress)
    return dict(zip(distinct, results, strict=True))
