"""The flags of ``efface evaluate`` for metrics beside TOFU's, and for FAME: what they mean is run here."""

import argparse
import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from efface.evaluate import evaluate_metrics, fame, get_metric, known_metrics
from efface.evaluate.logs import read_json
from efface.evaluate.metrics import Metric, MetricResult, Perplexity, Reading
from efface.evaluate.metrics.fame import GROUPS, split_rows
from efface.evaluate.runner import Progress
from efface.hf.loading import load_model
from efface.hf.rows import Rows, load_rows, matching, parse_conditions, texts

Results = dict[str, MetricResult]


def add_metrics_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that ``run_metrics`` and ``run_fame`` read, beside the command's own of model and template."""
    group = parser.add_argument_group("metrics of any rows")
    group.add_argument("--metrics", help=f"comma-separated, of {', '.join(known_metrics())}")
    group.add_argument("--forget", help="rows to judge: a file, or a Hub data set (name[:config[:split]])")
    conditions: dict[str, Any] = {"nargs": "+", "action": "extend", "metavar": "CONDITION"}
    syntax = "column=value[,value] or column!=value[,value]"
    group.add_argument("--forget-filter", **conditions, help=f"some of them: {syntax}; FAME's rows to forget")
    group.add_argument("--holdout", help="for mia_* and privleak: rows of the same kind that no model was trained on")
    group.add_argument("--holdout-filter", **conditions, help="some of them, likewise")
    group.add_argument("--reference-model", help="for mia_reference: a checkpoint with the same tokenizer")
    group.add_argument(
        "--retain-metrics", help="for privleak: results of a model trained on the retain set alone, as written here"
    )
    group.add_argument("--retain-filter", **conditions, help="FAME's rows to keep (default: all but the forgotten)")
    group.add_argument("--group-columns", nargs="+", default=GROUPS, help="FAME's groups (default: %(default)s)")
    group.add_argument("--question-column", default="question", help='"" for texts (default: %(default)s)')
    group.add_argument("--answer-column", default="answer", help="(default: %(default)s)")
    group.add_argument("--max-length", type=int, help="cut texts to so many tokens (default: never)")
    group.add_argument("--window", type=int, help="of perplexity: tokens at a time (default: 1024), in steps of a half")
    group.add_argument("--max-new-tokens", type=int, default=200, help="of an answer (default: %(default)s)")


def chosen_metrics(options: argparse.Namespace) -> list[Metric]:
    """Return what ``--metrics`` names, with the settings that were given; nothing is computed yet.

    Raises:
        ValueError: an unknown name, settings that a metric refuses, or flags that are missing beside it.
    """
    settings = {} if options.window is None else {"window": options.window, "stride": max(1, options.window // 2)}
    names = [name.strip() for name in (options.metrics or "").split(",") if name.strip()]
    chosen = [get_metric(name, **(settings if name.lower() == Perplexity.name else {})) for name in names]
    if chosen and not options.forget:
        raise ValueError("--metrics: expected --forget FILE, the rows to judge, got none")
    for metric in chosen:
        if metric.needs_holdout and not options.holdout:
            raise ValueError(f"{metric.name}: expected --holdout FILE, rows that no model was trained on, got none")
        if metric.needs_reference and not options.reference_model:
            raise ValueError(f"{metric.name}: expected --reference-model MODEL, got none")
    return chosen


def check_metrics_rows(options: argparse.Namespace, benchmark: str | None) -> dict[str, str]:
    """Read the rows of ``--metrics`` and FAME, so that what is wrong is said before anything is computed.

    Returns:
        How many of which rows the filters take, by role, where there are filters.

    Raises:
        ValueError: a row without text, by its number in the file; a filter of rows that are not given, or that takes
            none of them.
    """
    reading = _reading(options)
    names = [name for name in (reading.answer_column, reading.question_column) if name is not None]
    filters = {name: getattr(options, f"{name}_filter") for name in ("forget", "holdout", "retain")}
    sources = {name: getattr(options, name) for name in ("forget", "holdout") if options.metrics}
    for name, conditions in filters.items():
        if conditions and not sources.get(name) and (benchmark != "fame" or name == "holdout"):
            raise ValueError(f"--{name}-filter: expected rows that it takes some of, got none; drop it")
    taken: dict[str, str] = {}
    if benchmark == "fame" and options.data and filters["forget"]:
        rows = load_rows(options.data)
        for name, some in split_rows(rows, filters["forget"], filters["retain"]).items():
            taken[f"FAME {name}"] = f"{len(some):,} of {len(rows):,} rows, {options.data}"
    for name, source in sources.items():
        if source:
            rows = load_rows(source)
            numbers = matching(rows, parse_conditions(filters[name]), source)
            for column in names:
                texts(rows, column, source, numbers)
            if numbers is not None:
                taken[name] = f"{len(numbers):,} of {len(rows):,} rows, {source}"
    return taken


def run_metrics(
    model: Any,
    tokenizer: Any,
    options: argparse.Namespace,
    *,
    store: str | Path | None = None,
    progress: Progress | None = None,
) -> Results:
    """Return ``--metrics`` of the rows of ``--forget``, to be written as they are or beside TOFU's.

    Raises:
        ValueError: flags that do not fit one another, and as ``evaluate_metrics``.
    """
    metrics = chosen_metrics(options)
    reference = None
    if options.reference_model is not None:
        reference = load_model(options.reference_model, dtype=options.dtype).to(model.device)
    try:
        return evaluate_metrics(
            model,
            tokenizer,
            _rows(options.forget, options.forget_filter),
            metrics,
            holdout=_rows(options.holdout, options.holdout_filter) if options.holdout else None,
            reference_model=reference,
            retain_values=read_values(options.retain_metrics) if options.retain_metrics else None,
            reading=_reading(options),
            store=store,
            progress=progress,
        )
    finally:
        del reference
        gc.collect()


def run_fame(
    model: Any,
    tokenizer: Any,
    options: argparse.Namespace,
    *,
    store: str | Path | None = None,
    progress: Progress | None = None,
) -> Results:
    """Return FAME's metrics of the rows of ``--data``.

    Raises:
        ValueError: flags that do not fit one another, and as ``fame``.
    """
    if not options.data:
        raise ValueError("FAME: expected --data FILE, its questions and answers, got none")
    return fame(
        model,
        tokenizer,
        load_rows(options.data),
        forget_filter=options.forget_filter,
        retain_filter=options.retain_filter,
        groups=options.group_columns,
        reading=_reading(options),
        store=store,
        progress=progress,
    )


def read_values(path: str | Path) -> dict[str, float]:
    """Return the values in a file of results or of their summary, by name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of something else.
    """
    content = read_json(path, "results file")
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r}: expected metrics by name, got a {type(content).__name__}")  # noqa: TRY004 - a file's content is a value
    values = {name: value.get("agg_value") if isinstance(value, Mapping) else value for name, value in content.items()}
    return {name: float(value) for name, value in values.items() if isinstance(value, (int, float))}


def _rows(source: str, conditions: list[str] | None) -> Rows:
    rows = load_rows(source)
    numbers = matching(rows, parse_conditions(conditions), source)
    return rows if numbers is None else [rows[i] for i in numbers.tolist()]


def _reading(options: argparse.Namespace) -> Reading:
    return Reading(
        question_column=options.question_column or None,
        answer_column=options.answer_column,
        max_length=options.max_length,
        template=options.template,
        max_new_tokens=options.max_new_tokens,
        token_budget=options.token_budget,
    )
