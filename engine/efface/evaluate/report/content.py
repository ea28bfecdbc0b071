"""What a report says, before it is a page or a Markdown file."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from efface.evaluate.logs import EvalLog, FloatArray, read_log
from efface.evaluate.report import plots
from efface.evaluate.report.audits import AuditedModel, read_audit
from efface.evaluate.report.figures import read_evaluation
from efface.evaluate.report.find import Found, find_log, find_retain_log, find_runs
from efface.evaluate.report.leaks import Leak, read_rows, worst
from efface.evaluate.report.runs import Run, ranked, read_run
from efface.evaluate.report.tables import Table, audit_table, in_words, remarks, runs_table, shown_name

LEAKS = 20  # rows of a run whose texts are shown
PANELS = 9
# What curves are drawn of, where runs have it; then what else their logs hold.
_CURVES = (
    *("forget_quality", "model_utility", "forget_Q_A_Prob", "forget_Q_A_ROUGE", "forget_truth_ratio"),
    *("forget_probability", "retain_probability", "forget_loss", "retain_loss", "loss"),
)
_PARTS = re.compile("^(retain|ra|wf)_|_(PARA|PERT)_")  # what others of the figures are made of
_RETAIN_LOG = (
    "Forget Quality compares a model with one that never saw the forget set. No log of such a model was given, so it "
    "is {instead}. To make one: train on the retain set alone, or take a published model of that kind, then "
    "`efface evaluate --model RETAIN_MODEL --split SPLIT --output retain`, and give `--retain-log "
    "retain/TOFU_EVAL.json` here."
)


@dataclass(frozen=True)
class Detail:
    """A run on its own: settings, truth ratios, worst leaks."""

    name: str
    settings: str
    distribution: str | None
    leaks: tuple[Leak, ...]
    compared: bool


@dataclass(frozen=True)
class Content:
    """A report.

    Attributes:
        sentences: what a reader has to know about the table.
        runs: the ranked table.
        scatter: Forget Quality against Model Utility, as SVG.
        curves: figures over steps, as SVG.
        details: of the best runs.
        audit: of leak audits.
        remarks: what is missing or wrong, and in which runs.
    """

    sentences: tuple[str, ...]
    runs: Table
    scatter: str | None
    curves: str | None
    details: tuple[Detail, ...]
    audit: Table | None
    remarks: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Retain:
    """The log of a model trained on the retain set alone."""

    log: EvalLog
    ratios: FloatArray
    figures: Mapping[str, float]
    rows: Mapping[str, Leak]


def read_retain(path: Path) -> Retain:
    """Read it.

    Raises:
        OSError: a file that cannot be read.
        ValueError: a file that is no log, or lacks truth ratios of the forget rows.
    """
    log = read_log(path)
    figures = {name: value for name, value in read_evaluation(path).figures.items() if name != "forget_quality"}
    return Retain(log, log.rows("forget", "truth_ratio"), figures, read_rows(path))


def gather(
    folders: Sequence[str | Path],
    *,
    full: str | Path | None,
    retain_log: str | Path | None,
    floor: float,
    details: int,
) -> Content:
    """Read the runs and say what there is to say. For arguments and errors see ``efface.evaluate.report``."""
    beside = find_retain_log(folders) if retain_log is None else None
    given = {"full": full, "retain": retain_log or beside}
    baselines = {name: find_log(path) for name, path in given.items() if path is not None}
    found = find_runs(folders, without=baselines.values())
    if not found:
        raise ValueError("expected runs beside the full and the retain model, got none; name their folders")
    retain = read_retain(baselines["retain"]) if "retain" in baselines else None
    against = None if retain is None else retain.log
    full_evaluation = read_evaluation(baselines["full"], against) if "full" in baselines else None
    full_figures = {} if full_evaluation is None else full_evaluation.figures
    known_utility = full_figures.get("model_utility")
    least = None if known_utility is None or not floor else floor * known_utility
    runs = ranked([read_run(each, against) for each in found if each.is_run], least)
    retain_figures = {} if retain is None else retain.figures
    audited, failures = _audits(found)
    shown = {}
    if "full" in baselines:
        shown["full model"] = full_figures
    if retain is not None:
        shown["retain model"] = retain_figures
    table, shared = runs_table(runs, shown, least)
    has_curves = {name for run in runs for name in run.curves}
    names = [name for name in _CURVES if name in has_curves]
    names += sorted(name for name in has_curves.difference(_CURVES) if not _PARTS.search(name))
    return Content(
        sentences=tuple(_sentences(runs, shared, retain, beside, "full" in baselines, known_utility, floor)),
        runs=table,
        scatter=plots.quality_against_utility(runs, full_figures, retain_figures, least),
        curves=plots.curves(runs, names[:PANELS], full_figures, retain_figures),
        details=tuple(_detail(run, retain) for run in runs[:details] if run.evaluation is not None),
        audit=audit_table(audited) if audited else None,
        remarks=(
            *failures,
            *((note, "full model") for note in (full_evaluation.notes if full_evaluation else ())),
            *remarks(runs),
        ),
    )


def _sentences(
    runs: Sequence[Run],
    shared: Mapping[str, str],
    retain: Retain | None,
    beside: Path | None,
    has_full: bool,
    full_utility: float | None,
    floor: float,
) -> list[str]:
    if not runs:
        return ["Leak audits; no evaluated runs."]
    judged = sum("forget_quality" in run.figures for run in runs)
    count = f"{len(runs)} run{'' if len(runs) == 1 else 's'}"
    said = [f"{count}, {judged} with Forget Quality, best first; among equals by Model Utility."]
    if shared:
        said.append(f"All runs: {in_words(shared)}.")
    if retain is None:
        said.append(_RETAIN_LOG.format(instead="what the evaluations stored" if judged else "missing"))
    elif beside is not None:
        said.append(f"Forget Quality compares with `{beside}`, which was evaluated with the runs.")
    if floor and full_utility is not None:
        said.append(
            f"Runs with less Model Utility than {floor:g} times that of the full model ({full_utility:.4f}) come after "
            "the others, greyed."
        )
    elif floor and has_full:
        said.append("The full model's evaluation has no Model Utility, so the utility floor is not applied.")
    elif floor:
        said.append(
            "Without the full model's evaluation (`--full`) the utility floor is not applied: a run at the top may "
            "have forgotten everything else too."
        )
    return said


def _detail(run: Run, retain: Retain | None) -> Detail:
    leaks: tuple[Leak, ...] = ()
    distribution = None
    if run.evaluation is not None:
        if run.evaluation.ratios is not None:
            distribution = plots.distribution(
                run.evaluation.ratios, None if retain is None else retain.ratios, run.name
            )
        leaks = tuple(worst(read_rows(run.evaluation.path), {} if retain is None else retain.rows, LEAKS))
    compared = any(leak.retain_recall is not None for leak in leaks)
    return Detail(shown_name(run), in_words(run.settings), distribution, leaks, compared)


def _audits(found: Sequence[Found]) -> tuple[list[AuditedModel], list[tuple[str, str]]]:
    """Return audited models, the full and the retain model of several audits once; and what could not be read."""
    audited: list[AuditedModel] = []
    failures = []
    for run in found:
        if run.audit is None:
            continue
        try:
            models = read_audit(run.audit, run.name)
        except (OSError, ValueError) as error:
            failures.append((f"could not be read: {error}", run.name))
            continue
        known = [(model.name, model.figures) for model in audited if model.name in ("full", "retain")]
        audited += [model for model in models if (model.name, model.figures) not in known]
    return audited, failures
