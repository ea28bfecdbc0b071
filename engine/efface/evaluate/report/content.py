"""What a report says, as words, tables and pictures that a page and a Markdown file show alike."""

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
class Column:
    """A column; one ``on_demand`` is hidden at first."""

    title: str
    on_demand: bool = False
    numeric: bool = True


@dataclass(frozen=True)
class Cell:
    """A cell; ``value`` is what it is sorted by, at full precision."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class TableLine:
    """A row; ``kind`` is "baseline", "below" (the utility floor), "broken", or empty."""

    cells: tuple[Cell, ...]
    kind: str = ""


@dataclass(frozen=True)
class Table:
    """A table."""

    columns: tuple[Column, ...]
    lines: tuple[TableLine, ...]

    @property
    def has_more(self) -> bool:
        """Whether there are columns on demand."""
        return any(column.on_demand for column in self.columns)


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
        ranking: the runs, best first.
        least_utility: Model Utility with less of which a run is ranked after the others; None where all rank alike.
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
        """Return the ranked runs as JSON values."""
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
    """Read the runs and say what there is to say. For arguments and errors see ``efface.evaluate.report``."""
    beside = find_retain_log(folders) if retain_log is None else None
    given = {"full": full, "retain": retain_log or beside}
    baselines = {name: find_log(path) for name, path in given.items() if path is not None}
    found = find_runs(folders, without=baselines.values())
    if not found:
        raise ValueError("expected runs beside the full and the retain model, got none; name their folders")
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
        raise ValueError(f"expected a run whose files can be read, got none: {errors[0]}")
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
        sentences=tuple(_sentences(runs, shared, retain, beside, "full" in baselines, known_utility, floor)),
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
    """Read it.

    Raises:
        OSError: a file that cannot be read.
        ValueError: a file that is no log, or lacks truth ratios of the forget rows.
    """
    log = read_log(path)
    figures = {name: value for name, value in read_evaluation(path).figures.items() if name != "forget_quality"}
    return _Retain(log, log.rows("forget", "truth_ratio"), figures, read_rows(path))


def _sentences(
    runs: Sequence[ReportedRun],
    shared: Mapping[str, str],
    retain: _Retain | None,
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
        said.append(f"All runs: {_in_words(shared)}.")
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


def _number(value: float | None, form: str = ".4f") -> Cell:
    """Return a cell of a number, or of its absence."""
    return Cell(_MISSING) if value is None else Cell(format(value, form), value)


def _runs_table(
    runs: Sequence[ReportedRun], baselines: Mapping[str, Mapping[str, float]], least_utility: float | None
) -> tuple[Table, dict[str, str]]:
    """Return the table of ranked runs, and the settings that all of them share, which it leaves out."""
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
    """The run, and the checkpoint where it was not the final model that was evaluated."""
    return run.name if run.step is None else f"{run.name} (checkpoint-{run.step})"


def _in_words(settings: Mapping[str, str]) -> str:
    """Return settings as ``npo, beta 0.1, lr 1e-05``."""
    return ", ".join(value if name == "objective" else f"{name} {value}" for name, value in settings.items())


def _audit_table(models: Sequence[AuditedModel]) -> Table:
    """Return the mean novel recall of every audited model under every view, and further figures on demand."""
    names = list(dict.fromkeys(name for model in models for name in model.figures))
    columns = [Column("audit", numeric=False), Column("model", numeric=False)]
    columns += [Column(view if what == "mean" else f"{view}: {what}", what != "mean") for view, what in names]
    lines = [
        TableLine((Cell(model.audit), Cell(model.name), *(_number(model.figures.get(name), ".3f") for name in names)))
        for model in models
    ]
    return Table(tuple(columns), tuple(lines))


def _remarks(runs: Iterable[ReportedRun], limit: int = 8) -> list[tuple[str, str]]:
    """Return what is to be said about runs, and about which: errors first, the same words once."""
    said: dict[str, list[str]] = {}
    runs = list(runs)
    for run in runs:
        for error in run.errors:
            said.setdefault(f"could not be read: {error}", []).append(run.name)
    for run in runs:
        for note in run.notes:
            said.setdefault(note, []).append(run.name)
    return [
        (text, ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else ""))
        for text, names in said.items()
    ]


def _settings(runs: Sequence[ReportedRun]) -> tuple[dict[str, str], list[str]]:
    """Return the settings that all runs have alike, and the names of the others."""
    counts = Counter(item for run in runs for item in run.settings.items())
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    shared = {name: value for (name, value), count in counts.items() if count == len(runs) > 1}
    return shared, [name for name in names if name not in shared]
