"""What a metric is, metrics by name, and ``evaluate_metrics``, which runs every task of theirs once.

A metric asks tasks about rows, scores each row, and says in one number what the scores amount to.
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
    return metric_of(float(np.mean([row["score"] for row in rows])), rows)


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
    labels = []
    for number, row in enumerate(rows):
        logprobs, mean, std = (np.array(row[name], np.float64) for name in ("logprobs", "mean", "std"))
        refuse_infinite(part, number, logprobs, mean, std)
        labels.append(Labels(logprobs, np.array(row["first"], bool), mean, std, slice(part.words[number])))
    return labels


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
_T = TypeVar("_T", bound=type[Metric])


def register_metric(cls: _T) -> _T:
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
    """Return metrics of rows, by name, in open-unlearning's schema.

    Args:
        model: a causal language model; see ``run_tasks``.
        tokenizer: its tokenizer.
        rows: what is judged, as a rule the forget set; any rows of questions and answers, or of texts.
        metrics: names, see ``known_metrics``, or metrics with parameters of their own.
        holdout: of membership attacks: rows of the same kind and columns that no model was trained on.
        reference_model: of ``mia_reference``: a model with the same tokenizer.
        retain_values: of ``privleak``: values that the metrics have of a model trained on the retain set alone.
        reading: columns and limits; None takes the columns ``question`` and ``answer``.
        source: what messages call the rows.
        store: a file that keeps finished rows; see ``run_tasks``.
        progress: see ``run_tasks``.

    Raises:
        ValueError: an unknown metric, one that comes twice, or one that lacks what it compares with; no rows.
        FloatingPointError: a log-probability that is not finite, with its row.
    """
    chosen = [get_metric(metric) if isinstance(metric, str) else metric for metric in metrics]
    names = [metric.name for metric in chosen]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"`metrics`: expected one or more, each once, got {', '.join(names) or 'none'}")
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
    """Return ROUGE of greedy answers to any questions; ``options`` are those of ``evaluate_metrics``."""
    return evaluate_metrics(model, tokenizer, rows, ["rouge"], **options)["rouge"]


def _tasks(metric: Metric, part: Part, holdout: Part | None) -> Iterator[Task]:
    yield metric.task(part)
    if metric.needs_holdout and holdout is not None:
        yield metric.task(holdout)


def _run(
    model: Any, tasks: Sequence[Task], store: str | Path | None, progress: Progress | None
) -> dict[int, list[RowResult]]:
    """Run each task once and return its results by its id."""
    distinct = {id(task): task for task in tasks}
    if not distinct:
        return {}
    results = run_tasks(model, list(distinct.values()), store=store, progress=progress)
    return dict(zip(distinct, results, strict=True))
