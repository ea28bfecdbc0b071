"""Reading of a run for a report: its evaluation, curves over steps, settings, and the errors in its files.

The module also reads the forget rows with the largest leaks, and leak audits.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from efface.evaluate.logs import CONFIG, EvalLog
from efface.evaluate.report.figures import KNOWN, Evaluation, read_evaluation
from efface.evaluate.report.find import RunFiles

Curve: TypeAlias = dict[int, float]
"""A figure by optimizer step."""

# Entries of a training log that describe its speed and progress, not the model.
_WATCHING = {
    "epoch",
    "step",
    "learning_rate",
    "grad_norm",
    "total_flos",
    "padding_saved",
    "prefixes_saved",
    "peak_memory_gib",
}
_WATCHING |= {"tokens_per_second", "num_input_tokens_seen", "train_loss"}
_WATCHING_PREFIXES = ("time_", "train_", "eval_runtime", "eval_samples", "eval_steps")
# Training arguments that usually differ between the runs of a sweep, with their short names.
_ARGUMENTS = {"learning_rate": "lr", "num_train_epochs": "epochs", "max_steps": "steps", "seed": "seed"}
_ORIGINAL = "eval_log_forget.json"  # key of the forget split in TOFU's own logs
_COUNTS = ("rows", "left_out")  # figures of an audit that are not recalls


@dataclass(frozen=True)
class ReportedRun:
    """One run of a report.

    Attributes:
        name: name of the run, unique in a report.
        folder: folder of its files.
        figures: figures of the final model, or of the last evaluated checkpoint.
        evaluation: source of the figures; None if they are from the training log.
        step: step of the evaluated checkpoint; None is the final model.
        curves: every figure that is known at more than one step.
        settings: ``objective`` and its parameters, as text.
        notes: remarks about missing or doubtful data.
        errors: one message for each file that could not be read.
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


def read_run(found: RunFiles, retain_log: EvalLog | None = None) -> ReportedRun:
    """Read all files of a run. A file that cannot be read adds a message to ``errors``."""
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
                "not evaluated; figures, if any, are the last ones in its training log. "
                "Evaluate it with `efface evaluate --model RUN --output RUN`"
            )
    return ReportedRun(
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


def _settings_of(found: RunFiles, final: Evaluation | None) -> dict[str, str]:
    if not found.folder.is_dir():  # the path of a log was given; the files next to it can belong to another run
        return {}
    return read_settings(found.folder, None if final is None else final.path.parent)


def _history(path: Path | None, errors: list[str]) -> tuple[dict[str, Curve], int | None]:
    """Return the finite figures of a training log, and the step at which training ended."""
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
                if _is_number(value):
                    curves.setdefault(name, {})[int(entry["step"])] = float(value)
        return curves, int(content["global_step"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        errors.append(
            f"{str(path)!r}: expected a trainer's state with log_history and global_step, got something else "
            f"({type(error).__name__}: {error}); its curves are left out"
        )
        return {}, None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def ranked(runs: Sequence[ReportedRun], least_utility: float | None = None) -> list[ReportedRun]:
    """Return the runs sorted by Forget Quality, best first, then by Model Utility.

    Runs without Forget Quality follow those with it. If ``least_utility`` is given, runs with a smaller or unknown
    Model Utility come last.
    """

    def place(run: ReportedRun) -> tuple[bool, bool, float, float]:
        quality, utility = run.figures.get("forget_quality"), run.figures.get("model_utility")
        return not meets(run, least_utility), quality is None, -(quality or 0.0), -(utility or 0.0)

    return sorted(runs, key=place)


def meets(run: ReportedRun, least_utility: float | None) -> bool:
    """Return whether a run's Model Utility is known and at least ``least_utility``; True if there is no limit."""
    return least_utility is None or run.figures.get("model_utility", -math.inf) >= least_utility


def read_settings(folder: Path, evaluated: Path | None = None) -> dict[str, str]:
    """Return the objective, its settings, and the split and protocol of the evaluation, as text.

    The result is empty if no file contains them.

    Args:
        folder: folder of the run, with efface's ``run.json`` or model card, or open-unlearning's configuration.
        evaluated: folder of the evaluation. If the run's folder has no settings, the model's path is taken from the
            ``EVAL_CONFIG.json`` in this folder.
    """
    facts = {} if evaluated is None else _facts(evaluated)
    settings = _made(folder)
    if not settings and facts.get("model"):
        settings = _made(Path(facts["model"]))
    return settings | {name: facts[name] for name in ("split", "protocol") if name in facts}


def _made(folder: Path) -> dict[str, str]:
    for read in (_run_record, _card, _hydra):
        try:
            objective, arguments = read(folder)
            settings = {"objective": str(objective["name"])}
            settings |= {str(name): _text(value) for name, value in objective.items() if name != "name"}
            unused = "max_steps" if arguments.get("max_steps", -1) == -1 else "num_train_epochs"
            for name, short in _ARGUMENTS.items():
                if name != unused and arguments.get(name) is not None:
                    settings[short] = _text(arguments[name])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
            continue  # the file is missing, or another tool wrote it
        return settings
    return {}


def _facts(folder: Path) -> dict[str, str]:
    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        facts = {"model": content.get("model"), "split": content["split"], "protocol": content["protocol"]["name"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return {name: value for name, value in facts.items() if isinstance(value, str)}


def _run_record(folder: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    identity = json.loads((folder / "run.json").read_text(encoding="utf-8"))["identity"]
    return identity["objective"], {**identity["arguments"], **identity["plan"]}


def _card(folder: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    _, header, _ = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    recipe = yaml.safe_load(header)["efface"]
    return recipe["objective"], {**recipe["arguments"], **recipe["plan"]}


def _hydra(folder: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    trainer = yaml.safe_load((folder / ".hydra" / "config.yaml").read_text(encoding="utf-8"))["trainer"]
    return {"name": trainer["handler"], **(trainer.get("method_args") or {})}, trainer["args"]


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Leak:
    """A forget row, with a measure of how much of its answer a model reveals.

    Attributes:
        index: index of the row in the log.
        question: the question as in the log, which can include the template.
        truth: the answer to be forgotten.
        generation: the model's answer.
        recall: ROUGE-L recall of the generation.
        retain_recall: ROUGE-L recall of the retain model on the same row; None if unknown.
    """

    index: str
    question: str
    truth: str
    generation: str
    recall: float
    retain_recall: float | None = None


def read_rows(path: Path) -> dict[str, Leak]:
    """Return the forget rows of a log by index. The result is empty if the log has no generations.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not JSON.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    try:
        return _original(content[_ORIGINAL]) if _ORIGINAL in content else _open_unlearning(content)
    except (KeyError, TypeError, AttributeError, ValueError):
        return {}  # rows without texts


def worst(rows: Mapping[str, Leak], retain: Mapping[str, Leak], count: int) -> list[Leak]:
    """Return the rows with the largest positive difference between their recall and the retain model's recall.

    If the retain model's recall is unknown, 0 is used. Rows are matched by index, and only if their true answers are
    equal, because logs of other splits have other rows.
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


@dataclass(frozen=True)
class AuditedModel:
    """A model of a leak audit, as ``efface audit`` writes it.

    Attributes:
        audit: name of the run that the audit belongs to.
        name: name of the model.
        figures: figures by view and name. "mean" is the mean novel recall; see the README of ``efface.evaluate.audit``
            for the others.
    """

    audit: str
    name: str
    figures: Mapping[tuple[str, str], float]


def read_audit(path: Path, run: str) -> list[AuditedModel]:
    """Return the models of an ``AUDIT.json``.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not an audit.
    """
    try:
        models = json.loads(path.read_text(encoding="utf-8"))["models"]
        return [AuditedModel(run, name, _figures(model["views"])) for name, model in models.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{str(path)!r}: expected an audit with models and their views, got something else "
            f"({type(error).__name__}: {error}); write it with `efface audit`"
        ) from error


def _figures(views: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    figures = {}
    for view, found in views.items():
        for name, value in found["figures"].items():
            if _is_number(value) and name not in _COUNTS:
                figures[view, name] = float(value)
        for label, values in (found["figures"].get("labels") or {}).items():
            if _is_number(values.get("mean")):
                figures[view, label] = float(values["mean"])
    return figures
