"""The tables of a report, as words and numbers that a page and a Markdown file show alike."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from efface.evaluate.report.audits import AuditedModel
from efface.evaluate.report.figures import FORGET, KNOWN, UTILITY
from efface.evaluate.report.runs import Run, meets

MISSING = "-"

_TITLES = {
    "forget_quality": "Forget Quality",
    "model_utility": "Model Utility",
    "forget_Q_A_Prob": "forget probability",
    "forget_Q_A_ROUGE": "forget ROUGE",
    "forget_truth_ratio": "forget truth ratio",
}


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
class Line:
    """A row; ``kind`` is "baseline", "below" (the utility floor), "broken", or empty."""

    cells: tuple[Cell, ...]
    kind: str = ""


@dataclass(frozen=True)
class Table:
    """A table."""

    columns: tuple[Column, ...]
    lines: tuple[Line, ...]

    @property
    def has_more(self) -> bool:
        """Whether there are columns on demand."""
        return any(column.on_demand for column in self.columns)


def number(value: float | None, form: str = ".4f") -> Cell:
    """Return a cell of a number, or of its absence."""
    return Cell(MISSING) if value is None else Cell(format(value, form), value)


def runs_table(
    runs: Sequence[Run], baselines: Mapping[str, Mapping[str, float]], least_utility: float | None
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

    def line(place: Cell, name: str, figures: Mapping[str, float], settings: str, kind: str) -> Line:
        cells = [place, Cell(name)]
        cells += [number(figures.get(key), ".3g" if key == "forget_quality" else ".4f") for key in shown]
        cells += [Cell(settings)] if varying else []
        return Line((*cells, *(number(figures.get(key), ".4g") for key in hidden)), kind)

    lines = [line(Cell(""), name, figures, "", "baseline") for name, figures in baselines.items()]
    for place, run in enumerate(runs, start=1):
        settings = in_words({name: run.settings[name] for name in varying if name in run.settings})
        kind = "broken" if run.errors and not run.figures else "" if meets(run, least_utility) else "below"
        lines.append(line(Cell(str(place), place), shown_name(run), run.figures, settings, kind))
    return Table(tuple(columns), tuple(lines)), shared


def shown_name(run: Run) -> str:
    """The run, and the checkpoint where it was not the final model that was evaluated."""
    return run.name if run.step is None else f"{run.name} (checkpoint-{run.step})"


def in_words(settings: Mapping[str, str]) -> str:
    """Return settings as ``npo, beta 0.1, lr 1e-05``."""
    return ", ".join(value if name == "objective" else f"{name} {value}" for name, value in settings.items())


def audit_table(models: Sequence[AuditedModel]) -> Table:
    """Return the mean novel recall of every audited model under every view, and further figures on demand."""
    names = list(dict.fromkeys(name for model in models for name in model.figures))
    columns = [Column("audit", numeric=False), Column("model", numeric=False)]
    columns += [Column(view if what == "mean" else f"{view}: {what}", what != "mean") for view, what in names]
    lines = [
        Line((Cell(model.audit), Cell(model.name), *(number(model.figures.get(name), ".3f") for name in names)))
        for model in models
    ]
    return Table(tuple(columns), tuple(lines))


def remarks(runs: Iterable[Run], limit: int = 8) -> list[tuple[str, str]]:
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


def _settings(runs: Sequence[Run]) -> tuple[dict[str, str], list[str]]:
    """Return the settings that all runs have alike, and the names of the others."""
    counts = Counter(item for run in runs for item in run.settings.items())
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    shared = {name: value for (name, value), count in counts.items() if count == len(runs) > 1}
    return shared, [name for name in names if name not in shared]
