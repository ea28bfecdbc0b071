"""``evaluate_metrics``: any metrics of any rows, every task of theirs run once."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from efface.evaluate.metrics.base import Found, Metric, MetricResult, get_metric
from efface.evaluate.metrics.part import Part, Reading
from efface.evaluate.runner import Progress, RowResult, Task, run_tasks
from efface.hf.text.rows import Rows


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
