"""Evaluation on FAME (arXiv 2512.15235): metrics of forgotten and kept rows, in total and by language and topic."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from efface.evaluate.generation import rouge_recall
from efface.evaluate.likelihood import AnswerTask, mean_logprobs
from efface.evaluate.logs import FloatArray, MetricResult
from efface.evaluate.metrics.base import refuse_infinite
from efface.evaluate.metrics.part import Part, Reading
from efface.evaluate.protocol import get_protocol
from efface.evaluate.runner import Progress, RowResult, run_tasks
from efface.hf.text.rows import Conditions, Rows, check_columns, matching, optional_texts, parse_conditions, text_lists

GROUPS = ("language", "topic_id")
_PROTOCOL = get_protocol("open-unlearning")
_Mean = Callable[[FloatArray], float]


def fame(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    *,
    forget_filter: Conditions,
    retain_filter: Conditions = None,
    groups: Sequence[str] = GROUPS,
    perturbed_column: str = "perturbed_answer",
    paraphrased_column: str = "paraphrased_answer",
    reading: Reading | None = None,
    store: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, MetricResult]:
    """Return probability, ROUGE-L recall and truth ratio of forget and retain rows, in total and by group.

    The definitions are TOFU's, under open-unlearning's protocol. The truth ratio covers only rows with false answers.
    FAME itself has no false answers; if no row has any, the metric is omitted.

    Args:
        model: a causal language model; see ``run_tasks``.
        tokenizer: its tokenizer.
        rows: rows of questions and answers.
        forget_filter: selects the forgotten rows, such as "topic_id=3"; see ``parse_conditions``.
        retain_filter: selects the kept rows; None selects all rows that are not forgotten.
        groups: columns to group rows by. Rows without a value form the group "".
        perturbed_column: optional column with a list of false answers.
        paraphrased_column: optional column with a paraphrase of the true answer, used by the truth ratio. A row
            without a paraphrase uses its answer.
        reading: columns of questions and answers, and limits.
        store: a file that keeps finished rows; see ``run_tasks``.
        progress: see ``run_tasks``.

    Returns:
        ``{forget,retain}_Q_A_Prob``, ``…_Q_A_ROUGE``, ``forget_truth_ratio`` and ``retain_Truth_Ratio``, in
        open-unlearning's schema. Rows are numbered as in ``rows``. Each metric also has ``by_<group>`` for each group
        column: ``{value: {"agg_value": …, "rows": …}}``.

    Raises:
        ValueError: a column is missing, a value is not text, a filter matches no row, or a row matches both filters.
        FloatingPointError: a log-probability is not finite. The message names the row.
    """
    reading = reading or Reading()
    check_columns(rows, groups, "rows")
    labels = {name: optional_texts(rows, name, "rows") for name in groups}
    false = text_lists(rows, perturbed_column, "rows", optional=True)
    paraphrases = optional_texts(rows, paraphrased_column, "rows")
    sides = []
    for name, numbers in split_rows(rows, forget_filter, retain_filter).items():
        chosen = numbers.tolist()
        part = Part(name, rows, tokenizer, reading, numbers=numbers)
        sides.append(_Side(part, numbers, [false[row] for row in chosen], [paraphrases[row] for row in chosen]))
    tasks = [task for side in sides for task in (side.answers, side.part.generations)]
    results = iter(run_tasks(model, tasks, store=store, progress=progress))
    content: dict[str, MetricResult] = {}
    for side in sides:
        for metric, (by_row, mean) in side.metrics(next(results), next(results)).items():
            if by_row:
                content[metric] = _grouped(by_row, mean, labels)
    return content


@dataclass(frozen=True, eq=False)
class _Side:
    """The forget or the retain rows. ``numbers`` are their row numbers in the data; all lists have the same length."""

    part: Part
    numbers: NDArray[np.int64]
    false: Sequence[list[str]]
    paraphrases: Sequence[str | None]

    @cached_property
    def answers(self) -> AnswerTask:
        """The task for each row's answer and, if it has false answers, for its paraphrase and the false answers."""
        texts = zip(self.part.answers, self.paraphrases, self.false, strict=True)
        return AnswerTask(
            self.part.tokenizer,
            self.part.questions,
            [[answer, paraphrase or answer, *false] if false else [answer] for answer, paraphrase, false in texts],
            template=self.part.reading.template,
            max_length=self.part.reading.max_length,
            token_budget=self.part.reading.token_budget,
            name=f"{self.part.source}, answers",
        )

    def metrics(
        self, answers: Sequence[RowResult], generations: Sequence[RowResult]
    ) -> dict[str, tuple[dict[int, RowResult], _Mean]]:
        """Return, for each metric, its results by row number in the data, and the function that aggregates scores."""
        probabilities: dict[int, RowResult] = {}
        ratios: dict[int, RowResult] = {}
        rouge: dict[int, RowResult] = {}
        for place, values in enumerate(mean_logprobs(answers)):
            row = int(self.numbers[place])
            refuse_infinite(self.part, place, np.array(values))
            probabilities[row] = {"score": float(np.exp(values[0])), "avg_loss": -values[0]}
            if len(values) > 1:
                ratio = _PROTOCOL.truth_ratios(np.array(values[1:2]), np.array([values[2:]]))
                ratios[row] = {"score": float(ratio[0])}
            text = generations[place]["text"]
            scores = rouge_recall(text, self.part.answers[place])
            rouge[row] = {"score": scores["rougeL_recall"], **scores, "generation": text}
        name = self.part.source
        forgotten = name == "forget"
        return {
            f"{name}_Q_A_Prob": (probabilities, _mean),
            f"{name}_Q_A_ROUGE": (rouge, _mean),
            "forget_truth_ratio" if forgotten else f"{name}_Truth_Ratio": (
                ratios,
                _PROTOCOL.forgotten if forgotten else _PROTOCOL.kept,
            ),
        }


def fame_table(content: Mapping[str, MetricResult]) -> str:
    """Return the result of ``fame`` as a Markdown table.

    It has a line for all rows and for each group, and a column for each metric.
    """
    lines = [["", *content], ["all", *(f"{metric['agg_value']:.4f}" for metric in content.values())]]
    groupings = dict.fromkeys(key for metric in content.values() for key in metric if key.startswith("by_"))
    for grouping in groupings:
        values = {value for metric in content.values() for value in metric.get(grouping, {})}
        for value in sorted(values, key=_in_order):
            found = [metric.get(grouping, {}).get(value) for metric in content.values()]
            cells = ["-" if one is None else f"{one['agg_value']:.4f}" for one in found]
            lines.append([f"{grouping.removeprefix('by_')} {value}", *cells])
    rule = ["---", *["---:"] * len(content)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def split_rows(rows: Rows, forget: Conditions, retain: Conditions) -> dict[str, NDArray[np.int64]]:
    """Return the row numbers of the forget rows and of the retain rows.

    Without a ``retain`` filter, the retain rows are all rows that are not forget rows.

    Raises:
        ValueError: there is no forget filter, a filter matches no row, or a row matches both filters.
    """
    forgotten = matching(rows, parse_conditions(forget), "forget rows")
    if forgotten is None:
        raise ValueError("`forget_filter`: expected a filter of the forgotten rows, such as topic_id=3, got none")
    kept = matching(rows, parse_conditions(retain), "retain rows")
    if kept is None:
        kept = np.setdiff1d(np.arange(len(rows)), forgotten)
    if (both := np.intersect1d(forgotten, kept)).size:
        raise ValueError(
            f"`forget_filter`, `retain_filter`: expected filters that share no row, got row {both[0]} in both "
            f"({both.size} rows in total); change one of them"
        )
    return {"forget": forgotten, "retain": kept}


def _grouped(by_row: Mapping[int, RowResult], mean: _Mean, labels: Mapping[str, Sequence[str | None]]) -> MetricResult:
    result: MetricResult = {
        "agg_value": mean(_scores(by_row, list(by_row))),
        "value_by_index": {str(row): value for row, value in by_row.items()},
    }
    for name, column_values in labels.items():
        members: dict[str, list[int]] = {}
        for row in by_row:
            members.setdefault(column_values[row] or "", []).append(row)
        result[f"by_{name}"] = {
            value: {"agg_value": mean(_scores(by_row, members[value])), "rows": len(members[value])}
            for value in sorted(members, key=_in_order)
        }
    return result


def _scores(by_row: Mapping[int, RowResult], rows: Sequence[int]) -> FloatArray:
    return np.array([by_row[row]["score"] for row in rows], np.float64)


def _mean(scores: FloatArray) -> float:
    return float(scores.mean())


def _in_order(value: str) -> tuple[float, str]:
    """Return a sort key that puts numbers before text and orders numbers by value."""
    return (float(value) if value.isdecimal() else np.inf, value)
