"""The figures of one evaluation under open-unlearning's names, computed from the rows of its log if it has rows."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import hmean

from efface.evaluate.logs import SUMMARY, EvalLog, FloatArray, log_of
from efface.evaluate.quality import forget_quality, mean_of

# open-unlearning's name -> split and metric of an EvalLog
FORGET = {
    "forget_Q_A_Prob": ("forget", "probability"),
    "forget_Q_A_ROUGE": ("forget", "rouge"),
    "forget_truth_ratio": ("forget", "truth_ratio"),
}
UTILITY = {
    "retain_Q_A_Prob": ("retain", "probability"),
    "retain_Q_A_ROUGE": ("retain", "rouge"),
    "retain_Truth_Ratio": ("retain", "truth_ratio"),
    "ra_Q_A_Prob_normalised": ("real_authors", "probability"),
    "ra_Q_A_ROUGE": ("real_authors", "rouge"),
    "ra_Truth_Ratio": ("real_authors", "truth_ratio"),
    "wf_Q_A_Prob_normalised": ("world_facts", "probability"),
    "wf_Q_A_ROUGE": ("world_facts", "rouge"),
    "wf_Truth_Ratio": ("world_facts", "truth_ratio"),
}
KNOWN = ("forget_quality", "model_utility", *FORGET, *UTILITY)
_AS_STORED = "forget quality is the stored value, which may refer to another retain log"
_NAMES = {name.lower(): name for name in KNOWN}  # the case of the names differs between versions


@dataclass(frozen=True)
class Evaluation:
    """The figures and truth ratios of one evaluation.

    Attributes:
        path: path of the log.
        figures: known, finite figures by open-unlearning's names.
        ratios: (rows,) truth ratios R on the forget split; None if the log does not contain them.
        notes: reasons why figures are missing or doubtful.
    """

    path: Path
    figures: Mapping[str, float]
    ratios: FloatArray | None = None
    notes: tuple[str, ...] = ()


def read_evaluation(path: Path, retain_log: EvalLog | None = None) -> Evaluation:
    """Read a log with rows, or a summary that contains only means.

    Forget Quality is computed with ``retain_log``. Without a retain log, it is the value that the evaluation stored.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is neither a log nor a summary.
    """
    content = _metrics(path)
    figures, notes = _stored(content)
    stored = figures.get("forget_quality")
    if path.name == SUMMARY:
        if not figures:
            raise ValueError(f"{str(path)!r}: expected metrics with finite numbers, got none; evaluate again")
        notes.append("a summary without rows, so that distributions and leaks are missing")
    ratios = None
    if path.name != SUMMARY:
        log = log_of(content, str(path))
        _from_rows(figures, log, notes)
        if _rows_of(log, "forget", "truth_ratio") is not None and "forget_truth_ratio" in figures:
            ratios = log.rows("forget", "truth_ratio")
            if retain_log is not None:
                _compare(figures, log, retain_log, notes)
    if retain_log is not None and ratios is None and stored is not None:
        notes.append(_AS_STORED)
    return Evaluation(path, figures, ratios, tuple(notes))


def _stored(content: Mapping[str, Any]) -> tuple[dict[str, float], list[str]]:
    """Return the means that an evaluation stored, and a note on each mean that is not finite."""
    figures, notes = {}, []
    for name, metric in content.items():
        value = metric.get("agg_value") if isinstance(metric, dict) else metric
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if math.isfinite(value):
            figures[_NAMES.get(name.lower(), name)] = float(value)
        else:
            notes.append(f"{name} is stored as {value}, which is not finite and therefore left out")
    return figures, notes


def _from_rows(figures: dict[str, float], log: EvalLog, notes: list[str]) -> None:
    """Replace stored means by the means of the log's rows. Missing rows and values that are not finite become notes."""
    missing = []
    for name, (split, metric) in (FORGET | UTILITY).items():
        if _rows_of(log, split, metric) is None:
            missing.append(name)
            continue
        try:
            figures[name] = mean_of(log, split, metric)
        except ValueError as error:
            notes.append(str(error).removeprefix(f"{log.source}: "))
            # drop the stored mean of such rows too, and the figure that was computed from it
            of_it = "model_utility" if name in UTILITY else "forget_quality" if metric == "truth_ratio" else name
            for key in (name, of_it):
                figures.pop(key, None)
    if missing:
        notes.append(f"the log has no rows of {', '.join(missing)}")
    parts = [figures[name] for name in UTILITY if name in figures]
    if len(parts) == len(UTILITY):
        figures["model_utility"] = float(hmean(parts))


def _compare(figures: dict[str, float], log: EvalLog, retain_log: EvalLog, notes: list[str]) -> None:
    stored = figures.get("forget_quality")
    try:
        figures["forget_quality"] = forget_quality(log, retain_log)
    except ValueError as error:
        notes.append(str(error))
        if stored is not None:
            notes.append(_AS_STORED)
        return
    if stored is not None and not math.isclose(stored, figures["forget_quality"], rel_tol=1e-6):
        notes.append(f"the evaluation stored a forget quality of {stored:.3g}, computed with another retain log")


def _rows_of(log: EvalLog, split: str, metric: str) -> FloatArray | None:
    values: FloatArray | None = getattr(log.splits.get(split), metric, None)
    return values


def _metrics(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(
            f"{str(path)!r}: expected a JSON file, got something else ({error}); evaluate again"
        ) from error
    if isinstance(content, dict):
        return content
    raise ValueError(f"{str(path)!r}: expected a JSON object of metrics, got {type(content).__name__}; evaluate again")
