"""A run as a report shows it: its evaluation, its curves over steps, its settings, and what is wrong with its files."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from efface.evaluate.logs import EvalLog
from efface.evaluate.report.figures import KNOWN, Evaluation, read_evaluation
from efface.evaluate.report.find import Found
from efface.evaluate.report.settings import read_settings

Curve: TypeAlias = dict[int, float]
"""A figure by optimizer step."""

# Of a training log: how fast it went and on what, not what it did to the model.
_WATCHING = {"epoch", "step", "learning_rate", "grad_norm", "total_flos", "padding_saved", "peak_memory_gib"}
_WATCHING |= {"tokens_per_second", "num_input_tokens_seen", "train_loss"}
_WATCHING_PREFIXES = ("time_", "train_", "eval_runtime", "eval_samples", "eval_steps")


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        name: unique in a report.
        folder: of its files.
        figures: of the final model, or of the newest that was evaluated.
        evaluation: where the figures are from; None for those of the training log.
        step: of the checkpoint that was evaluated; None is the final model.
        curves: every figure that is known at more than one step.
        settings: ``objective`` and its parameters, as text.
        notes: what is missing or doubtful.
        errors: files that could not be read, and why.
    """

    name: str
    folder: Path
    figures: Mapping[str, float] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    step: int | None = None
    curves: Mapping[str, Curve] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()


def read_run(found: Found, retain_log: EvalLog | None = None) -> Run:
    """Read all that was found of a run; a file that cannot be read is one of ``errors``."""
    notes: list[str] = []
    errors: list[str] = []
    evaluations: dict[int | None, Evaluation] = {}
    for step, path in found.logs.items():
        evaluation = _evaluation(path, retain_log, errors)
        if evaluation is not None:
            evaluations[step] = evaluation
    curves, last_step = _history(found.history, errors)
    for step, evaluation in evaluations.items():
        place = last_step if step is None else step
        if place is not None:
            for name, value in evaluation.figures.items():
                curves.setdefault(name, {})[place] = value
    step = None if None in evaluations else max((step for step in evaluations if step is not None), default=None)
    final = evaluations.get(step)
    if final is not None:
        figures = dict(final.figures)
        notes.extend(final.notes)
    else:
        figures = {name: curve[max(curve)] for name, curve in curves.items() if name in KNOWN}
        if not errors:
            notes.append(
                "not evaluated; figures, if any, are the last of its training log. "
                "`efface evaluate --model RUN --output RUN` evaluates it"
            )
    return Run(
        name=found.name,
        folder=found.folder,
        figures=figures,
        evaluation=final,
        step=step,
        curves={name: dict(sorted(curve.items())) for name, curve in curves.items() if len(curve) > 1},
        settings=_settings_of(found, final),
        notes=tuple(notes),
        errors=tuple(errors),
    )


def _evaluation(path: Path, retain_log: EvalLog | None, errors: list[str]) -> Evaluation | None:
    try:
        return read_evaluation(path, retain_log)
    except (OSError, ValueError, ArithmeticError) as error:
        errors.append(str(error))
        return None


def _settings_of(found: Found, final: Evaluation | None) -> dict[str, str]:
    if not found.folder.is_dir():  # a log that was named itself; what lies beside it may be of another run
        return {}
    return read_settings(found.folder, None if final is None else final.path.parent)


def _history(path: Path | None, errors: list[str]) -> tuple[dict[str, Curve], int | None]:
    """Return the figures of a training log, finite ones only, and the step at which training ended."""
    if path is None:
        return {}, None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        entries: Sequence[Mapping[str, Any]] = content["log_history"]
        curves: dict[str, Curve] = {}
        for entry in entries:
            for name, value in entry.items():
                if name in _WATCHING or name.startswith(_WATCHING_PREFIXES):
                    continue
                if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                    curves.setdefault(name, {})[int(entry["step"])] = float(value)
        return curves, int(content["global_step"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        errors.append(
            f"{str(path)!r}: expected a trainer's state with log_history and global_step, got something else "
            f"({type(error).__name__}: {error}); it has no curves"
        )
        return {}, None


def ranked(runs: Sequence[Run], least_utility: float | None = None) -> list[Run]:
    """Return the runs by Forget Quality, best first; among equals by Model Utility.

    Runs under the least utility, or of unknown utility where there is one, follow; those without Forget Quality too.
    """

    def place(run: Run) -> tuple[bool, bool, float, float]:
        quality, utility = run.figures.get("forget_quality"), run.figures.get("model_utility")
        return (
            not meets(run, least_utility),
            quality is None,
            -(quality or 0.0),
            -(utility or 0.0),
        )

    return sorted(runs, key=place)


def meets(run: Run, least_utility: float | None) -> bool:
    """Whether a run's Model Utility is at least so much."""
    return least_utility is None or run.figures.get("model_utility", -math.inf) >= least_utility
