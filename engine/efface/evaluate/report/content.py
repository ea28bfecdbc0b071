"""The content of a report as sentences, tables and pictures, from which both the HTML and the Markdown are written."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from efface.evaluate.logs import EvalLog, FloatArray, read_log
from efface.evaluate.report import plots
from efface.evaluate.report.figures import FORGET, KNOWN, UTILITY, read_evaluation
from efface.evaluate.report.find import RunFiles, find_log, find_retain_log, find_runs
from efface.evaluate.report.runs import (
    AuditedModel,
    Leak,
    ReportedRun,
    meets,
    ranked,
    read_audit,
    read_rows,
    read_run,
    worst,
)

_MISSING = "-"

_TITLES = {
    "forget_quality": "Forget Quality",
    "model_utility": "Model Utility",
    "forget_Q_A_Prob": "forget probability",
    "forget_Q_A_ROUGE": "forget ROUGE",
    "forget_truth_ratio": "forget truth ratio",
}
_LEAKS = 20  # rows of a run whose texts are shown
_PANELS = 9
# Figures whose curves are drawn first, in this order. The other figures of the training logs follow.
_CURVES = (
    *("forget_quality", "model_utility", "forget_Q_A_Prob", "forget_Q_A_ROUGE", "forget_truth_ratio"),
    *("forget_probability", "retain_probability", "forget_loss", "retain_loss", "loss"),
)
_PARTS = re.compile("^(retain|ra|wf)_|_(PARA|PERT)_")  # figures that are components of other figures
_RETAIN_LOG = (
    "Forget Quality compares a model with one that never saw the forget set. No log of such a model was given, so "
    "Forget Quality is {instead}. To get a log, train a model on the retain set alone, or take a published one. "
    "Evaluate it with `efface evaluate --model RETAIN_MODEL --split SPLIT --output retain`, and pass `--retain-log "
    "retain/TOFU_EVAL.json` to `efface report`."
)


@dataclass(frozen=True)
class Column:
    """A column of a table. An ``on_demand`` column is hidden until the reader asks for all figures."""

    title: str
    on_demand: bool = False
    numeric: bool = True


@dataclass(frozen=True)
class Cell:
    """A cell of a table. ``value`` is the number at full precision, by which the column is sorted."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class TableLine:
    """A row of a table. ``kind`` is "baseline", "below" (below the utility floor), "broken" (unreadable), or empty."""

    cells: tuple[Cell, ...]
    kind: str = ""


@dataclass(frozen=True)
class Table:
    columns: tuple[Column, ...]
    lines: tuple[TableLine, ...]

    @property
    def has_more(self) -> bool:
        """Whether the table has columns that are shown on demand."""
        return any(column.on_demand for column in self.columns)


@dataclass(frozen=True)
class Detail:
    """The details of one run: settings, plot of the truth ratios, and worst leaks.

    ``compared`` is whether the leaks have the recall of the retain model.
    """

    name: str
    settings: str
    distribution: str | None
    leaks: tuple[Leak, ...]
    compared: bool


@dataclass(frozen=True)
class Content:
    """The content of a report.

    Attributes:
        sentences: the introduction, which explains the table.
        runs: the table of ranked runs.
        scatter: plot of Forget Quality against Model Utility, as SVG; None if no run has both.
        curves: plots of figures over steps, as SVG; None if no run has curves.
        details: details of the best runs.
        audit: the table of leak audits; None if there are no audits.
        remarks: pairs of a remark about missing or unreadable data, and the names of the runs that it applies to.
        ranking: the runs, best first.
        least_utility: runs with a smaller Model Utility are ranked last; None if there is no such limit.
    """

    sentences: tuple[str, ...]
    runs: Table
    scatter: str | None
    curves: str | None
    details: tuple[Detail, ...]
    audit: Table | None
    remarks: tuple[tuple[str, str], ...]
    ranking: tuple[ReportedRun, ...]
    least_utility: float | None

    def to_json(self) -> dict[str, Any]:
        """Return the ranked runs and the least Model Utility as JSON values."""
        runs = [
            {
                "name": run.name,
                "folder": str(run.folder),
                "checkpoint": run.step,
                "figures": dict(run.figures),
                "settings": dict(run.settings),
                "below_floor": not meets(run, self.least_utility),
                "notes": [*run.notes, *run.errors],
            }
            for run in self.ranking
        ]
        return {"runs": runs, "least_model_utility": self.least_utility}


def gather(
    folders: Sequence[str | Path],
    *,
    full: str | Path | None,
    retain_log: str | Path | None,
    floor: float,
    details: int,
) -> Content:
    """Read the runs and return the content of the report. For arguments and errors see ``efface.evaluate.report``."""
    found_retain = find_retain_log(folders) if retain_log is None else None
    given = {"full": full, "retain": retain_log or found_retain}
    baselines = {name: find_log(path) for name, path in given.items() if path is not None}
    found = find_runs(folders, without=baselines.values())
    if not found:
        raise ValueError(
            "expected at least one run in addition to the full and retain models, got none; pass the folders of runs"
        )
    retain = _read_retain(baselines["retain"]) if "retain" in baselines else None
    against = None if retain is None else retain.log
    full_evaluation = read_evaluation(baselines["full"], against) if "full" in baselines else None
    full_figures = {} if full_evaluation is None else full_evaluation.figures
    known_utility = full_figures.get("model_utility")
    least = None if known_utility is None or not floor else floor * known_utility
    runs = ranked([read_run(each, against) for each in found if each.is_run], least)
    retain_figures = {} if retain is None else retain.figures
    audited, failures = _audits(found)
    errors = [*(error for run in runs for error in run.errors), *(error for error, _ in failures)]
    if errors and not audited and all(run.errors and run.evaluation is None and not run.curves for run in runs):
        raise ValueError(f"expected at least one run with readable files, got none: {errors[0]}")
    shown = {}
    if "full" in baselines:
        shown["full model"] = full_figures
    if retain is not None:
        shown["retain model"] = retain_figures
    table, shared = _runs_table(runs, shown, least)
    has_curves = {name for run in runs for name in run.curves}
    names = [name for name in _CURVES if name in has_curves]
    names += sorted(name for name in has_curves.difference(_CURVES) if not _PARTS.search(name))
    return Content(
        sentences=tuple(_sentences(runs, shared, retain, found_retain, "full" in baselines, known_utility, floor)),
        runs=table,
        scatter=plots.quality_against_utility(runs, full_figures, retain_figures, least),
        curves=plots.curves(runs, names[:_PANELS], full_figures, retain_figures),
        details=tuple(_detail(run, retain) for run in runs[:details] if run.evaluation is not None),
        audit=_audit_table(audited) if audited else None,
        remarks=(
            *failures,
            *((note, "full model") for note in (full_evaluation.notes if full_evaluation else ())),
            *_remarks(runs),
        ),
        ranking=tuple(runs),
        least_utility=least,
    )


@dataclass(frozen=True)
class _Retain:
    """The log of a model trained on the retain set alone."""

    log: EvalLog
    ratios: FloatArray
    figures: Mapping[str, float]
    rows: Mapping[str, Leak]


def _read_retain(path: Path) -> _Retain:
    """Read the log of the retain model.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not a log, or has no truth ratios on the forget split.
    """
    log = read_log(path)
    figures = {name: value for name, value in read_evaluation(path).figures.items() if name != "forget_quality"}
    return _Retain(log, log.rows("forget", "truth_ratio"), figures, read_rows(path))


def _sentences(
    runs: Sequence[ReportedRun],
    shared: Mapping[str, str],
    retain: _Retain | None,
    found_retain: Path | None,
    has_full: bool,
    full_utility: float | None,
    floor: float,
) -> list[str]:
    if not runs:
        return ["Leak audits; no evaluated runs."]
    measured = sum("forget_quality" in run.figures for run in runs)
    count = f"{len(runs)} run{'' if len(runs) == 1 else 's'}"
    lines = [f"{count}, {measured} with Forget Quality, best first; runs with equal values by Model Utility."]
    if shared:
        lines.append(f"All runs: {_in_words(shared)}.")
    if retain is None:
        lines.append(_RETAIN_LOG.format(instead="the value that each evaluation stored" if measured else "missing"))
    elif found_retain is not None:
        lines.append(f"Forget Quality compares with `{found_retain}`, which was found in the folders of the runs.")
    if floor and full_utility is not None:
        lines.append(
            f"Runs without Model Utility, or with less than {floor:g} times that of the full model "
            f"({full_utility:.4f}), come last and are greyed out."
        )
    elif floor and has_full:
        lines.append("The full model's evaluation has no Model Utility, so the utility floor is not applied.")
    elif floor:
        lines.append(
            "Without the full model's evaluation (`--full`), the utility floor is not applied: a run at the top may "
            "have forgotten everything else too."
        )
    return lines


def _detail(run: ReportedRun, retain: _Retain | None) -> Detail:
    leaks: tuple[Leak, ...] = ()
    distribution = None
    if run.evaluation is not None:
        if run.evaluation.ratios is not None:
            distribution = plots.distribution(
                run.evaluation.ratios, None if retain is None else retain.ratios, run.name
            )
        leaks = tuple(worst(read_rows(run.evaluation.path), {} if retain is None else retain.rows, _LEAKS))
    compared = any(leak.retain_recall is not None for leak in leaks)
    return Detail(_shown_name(run), _in_words(run.settings), distribution, leaks, compared)


def _audits(found: Sequence[RunFiles]) -> tuple[list[AuditedModel], list[tuple[str, str]]]:
    """Return the audited models, and the errors of unreadable audits with the names of their runs.

    A full or retain model that occurs with equal figures in several audits is returned once.
    """
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


def _number(value: float | None, form: str = ".4f") -> Cell:
    """Return a cell with a formatted number, or with a dash if the number is None."""
    return Cell(_MISSING) if value is None else Cell(format(value, form), value)


def _runs_table(
    runs: Sequence[ReportedRun], baselines: Mapping[str, Mapping[str, float]], least_utility: float | None
) -> tuple[Table, dict[str, str]]:
    """Return the table of ranked runs, and the settings that all runs share. The table omits the shared settings."""
    shared, varying = _settings(runs)
    others = sorted({name for run in runs if run.evaluation for name in run.figures} - set(KNOWN))
    shown = ("forget_quality", "model_utility", *FORGET)
    columns = [Column("#"), Column("run", numeric=False), *(Column(_TITLES[name]) for name in shown)]
    if varying:
        columns.append(Column("settings", numeric=False))
    hidden = (*UTILITY, *others)
    columns += [Column(name, on_demand=True) for name in hidden]

    def line(place: Cell, name: str, figures: Mapping[str, float], settings: str, kind: str) -> TableLine:
        cells = [place, Cell(name)]
        cells += [_number(figures.get(key), ".3g" if key == "forget_quality" else ".4f") for key in shown]
        cells += [Cell(settings)] if varying else []
        return TableLine((*cells, *(_number(figures.get(key), ".4g") for key in hidden)), kind)

    lines = [line(Cell(""), name, figures, "", "baseline") for name, figures in baselines.items()]
    for place, run in enumerate(runs, start=1):
        settings = _in_words({name: run.settings[name] for name in varying if name in run.settings})
        kind = "broken" if run.errors and not run.figures else "" if meets(run, least_utility) else "below"
        lines.append(line(Cell(str(place), place), _shown_name(run), run.figures, settings, kind))
    return Table(tuple(columns), tuple(lines)), shared


def _shown_name(run: ReportedRun) -> str:
    """Return the name of the run, with the checkpoint if a checkpoint was evaluated instead of the final model."""
    return run.name if run.step is None else f"{run.name} (checkpoint-{run.step})"


def _in_words(settings: Mapping[str, str]) -> str:
    """Return settings as text, such as ``npo, beta 0.1, lr 1e-05``."""
    return ", ".join(value if name == "objective" else f"{name} {value}" for name, value in settings.items())


def _audit_table(models: Sequence[AuditedModel]) -> Table:
    """Return the table of the mean novel recall of each audited model in each view.

    Columns of other figures are hidden until the reader asks for them.
    """
    names = list(dict.fromkeys(name for model in models for name in model.figures))
    columns = [Column("audit", numeric=False), Column("model", numeric=False)]
    columns += [Column(view if what == "mean" else f"{view}: {what}", what != "mean") for view, what in names]
    lines = [
        TableLine((Cell(model.audit), Cell(model.name), *(_number(model.figures.get(name), ".3f") for name in names)))
        for model in models
    ]
    return Table(tuple(columns), tuple(lines))


def _remarks(runs: Iterable[ReportedRun], limit: int = 8) -> list[tuple[str, str]]:
    """Return each distinct error and note, errors first, with the names of its runs (at most ``limit``)."""
    found: dict[str, list[str]] = {}
    runs = list(runs)
    for run in runs:
        for error in run.errors:
            found.setdefault(f"could not be read: {error}", []).append(run.name)
    for run in runs:
        for note in run.notes:
            found.setdefault(note, []).append(run.name)
    return [
        (text, ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else ""))
        for text, names in found.items()
    ]


def _settings(runs: Sequence[ReportedRun]) -> tuple[dict[str, str], list[str]]:
    """Return the settings that all runs share, and the names of the other settings."""
    counts = Counter(item for run in runs for item in run.settings.items())
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    shared = {name: value for (name, value), count in counts.items() if count == len(runs) > 1}
    return shared, [name for name in names if name not in shared]
