"""The rows in which a model gives away most of what it should have forgotten, with their texts."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

_ORIGINAL = "eval_log_forget.json"


@dataclass(frozen=True)
class Leak:
    """A forget row.

    Attributes:
        index: of the row, as the log names it.
        question: with its template, as the log holds it.
        truth: the answer to be forgotten.
        generation: what the model says.
        recall: ROUGE-L recall of the generation.
        retain_recall: that of the model which never saw the row; None where it is not known.
    """

    index: str
    question: str
    truth: str
    generation: str
    recall: float
    retain_recall: float | None = None


def read_rows(path: Path) -> dict[str, Leak]:
    """Return the forget rows of a log that holds generations, by index; none of a log that does not.

    Raises:
        OSError: a file that cannot be read.
        ValueError: a file that is no JSON.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    try:
        return _original(content[_ORIGINAL]) if _ORIGINAL in content else _open_unlearning(content)
    except (KeyError, TypeError, AttributeError, ValueError):
        return {}  # rows without texts


def worst(rows: Mapping[str, Leak], retain: Mapping[str, Leak], count: int) -> list[Leak]:
    """Return the rows of the largest recall beyond that of the retain model; where that is unknown, beyond 0.

    Rows are compared by index, and only if their true answers agree: logs of other splits have other rows.
    """
    compared = []
    for index, row in rows.items():
        other = retain.get(index)
        known = other is not None and other.truth == row.truth
        compared.append(replace(row, retain_recall=other.recall if known and other is not None else None))
    leaking = [row for row in compared if row.recall > (row.retain_recall or 0.0)]  # False for NaN
    return sorted(leaking, key=lambda row: (-(row.recall - (row.retain_recall or 0.0)), -row.recall))[:count]


def _original(metrics: Mapping[str, Any]) -> dict[str, Leak]:
    recalls = metrics["rougeL_recall"]
    return {
        index: Leak(index, str(question), str(truth), str(generation), float(recalls[index]))
        for index, (question, generation, truth) in metrics["generated_text"].items()
    }


def _open_unlearning(content: Mapping[str, Any]) -> dict[str, Leak]:
    metric: Mapping[str, Any] = next(
        (value for name, value in content.items() if name.lower() == "forget_q_a_rouge"), {}
    )
    return {
        index: Leak(
            index, str(row["input"]), str(row["ground_truth"]), str(row["generation"]), float(row["rougeL_recall"])
        )
        for index, row in metric["value_by_index"].items()
        if row is not None and row.get("rougeL_recall") is not None
    }
