"""The audit of a model, and the comparison of several models' audits as a table, as AUDIT.json and as AUDIT.md."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from efface.evaluate.audit.rows import TOFU_GROUP, audit_rows
from efface.evaluate.audit.view import Exam, Figures, View
from efface.evaluate.audit.views import VIEWS, get_view
from efface.evaluate.runner import Progress, RowResult
from efface.hf.text.rows import Rows
from efface.hf.text.templates import AUTO, Template

FULL, RETAIN = "full", "retain"
AROUND = (FULL, RETAIN)
"""Names of the model that was trained on everything, and of the model that was trained only on the retain set."""


@dataclass(frozen=True)
class ViewResult:
    """The result of a view: a record for each probe, in order, and the figures over all records."""

    view: View
    figures: Figures
    records: Sequence[RowResult]


@dataclass(frozen=True)
class AuditResult:
    """The audit of one model.

    Attributes:
        rows: number of audited rows.
        views: results by name of the view, in the order in which the views ran.
    """

    rows: int
    views: Mapping[str, ViewResult]

    def to_json(self) -> dict[str, Any]:
        """Return the figures and records of each view as JSON values."""
        return {
            name: {"figures": dict(found.figures), "records": list(found.records)} for name, found in self.views.items()
        }


def audit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    *,
    views: Sequence[str | View] = tuple(VIEWS),
    group_column: str | None = None,
    group_size: int = TOFU_GROUP,
    template: str | Template = AUTO,
    max_new_tokens: int = 200,
    token_budget: int = 8192,
    store: str | Path | None = None,
    progress: Progress | None = None,
) -> AuditResult:
    """Measure how much a model reveals of rows that it should have forgotten, in several ways of asking (views).

    Every view is scored by novel recall; see the README in this folder for the definitions. The same rows, settings
    and seeds give the same result.

    Args:
        model: an ``AutoModelForCausalLM``. Its state is restored afterwards.
        tokenizer: its tokenizer.
        rows: rows with the columns ``question`` and ``answer``; "choice" also needs ``perturbed_answer``.
        views: names in ``VIEWS``, or ``View`` objects, which can have other settings, such as ``BestOf(samples=32)``.
        group_column: column that identifies the author of a row, for "clues". None takes each ``group_size``
            consecutive rows as one author.
        group_size: number of consecutive rows about one author; 20 in TOFU.
        template: prompt format; see ``efface.hf.text.templates``.
        max_new_tokens: maximum tokens of a generation.
        token_budget: maximum tokens of a forward pass.
        store: a file that keeps finished rows, so that a killed audit can resume; see ``run_tasks``.
        progress: called with the name of the current view, the number of its finished rows, and the number of all.

    Raises:
        ValueError: a view is unknown, or the rows lack a column or value that a view needs. Raised before the model
            runs.
    """
    chosen = [get_view(view) for view in views]
    names = [view.name for view in chosen]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"`views`: expected at least one, each only once, got {', '.join(names) or 'none'}")
    read = audit_rows(rows, group_column=group_column, group_size=group_size)
    for view in chosen:
        view.probes(read)
    exam = Exam(model, tokenizer, template, max_new_tokens, token_budget, store)
    found = {}
    for view in chosen:
        records = view.run(replace(exam, progress=_named(progress, view.name)), read)
        found[view.name] = ViewResult(view, view.figures(records), records)
    return AuditResult(len(read), found)


def _named(progress: Progress | None, view: str) -> Progress | None:
    return None if progress is None else lambda _, done, total: progress(view, done, total)


@dataclass(frozen=True)
class Line:
    """One line of the comparison: one number for each model.

    Attributes:
        view: name of the view.
        what: name of the number within the view; empty for the mean novel recall.
        values: the number of each model, by name of the model; None if no row could be scored.
    """

    view: str
    what: str
    values: Mapping[str, float | None]

    def kept(self, model: str, full: str, retain: str) -> float | None:
        """Return (model − retain) / (full − retain): 0 means as if never learnt, 1 as if never unlearned.

        None if the full model reveals no more than the retain model, because the share is then not defined.
        """
        x, high, low = (self.values[name] for name in (model, full, retain))
        if x is None or high is None or low is None or high <= low:
            return None
        return (x - low) / (high - low)


def side_by_side(audits: Mapping[str, AuditResult]) -> list[Line]:
    """Return the lines of a table that compares several models' audits.

    Raises:
        ValueError: the audits have different numbers of rows or different views.
    """
    names = list(audits)
    first = audits[names[0]]
    for name in names[1:]:
        if list(audits[name].views) != list(first.views) or audits[name].rows != first.rows:
            raise ValueError(
                f"audits: expected the same rows and views, got {names[0]!r} ({first.rows} rows; "
                f"{', '.join(first.views)}) and {name!r} ({audits[name].rows} rows; {', '.join(audits[name].views)}); "
                "audit both with the same data and settings"
            )
    lines = []
    for view, found in first.views.items():
        shown = {name: found.view.shown(audits[name].views[view].figures) for name in names}
        lines += [
            Line(view, what, {name: shown[name].get(what) for name in names})
            for what in dict.fromkeys(what for figures in shown.values() for what in figures)
        ]
    return lines


def cells(audits: Mapping[str, AuditResult]) -> tuple[list[str], list[list[str]]]:
    """Return the headings and the rows of a table: one line for each figure of each view, one column for each model.

    If there are a full and a retain model, each other model also has a column "kept"; see ``Line.kept``.
    """
    between = [name for name in audits if name not in AROUND] if set(AROUND) <= set(audits) else []
    headings = ["view", *audits, *(f"{name} kept" if len(between) > 1 else "kept" for name in between)]
    rows = []
    for line in side_by_side(audits):
        name = f"{line.view}, {line.what}" if line.what else line.view
        kept = [line.kept(other, FULL, RETAIN) for other in between]
        rows.append([name, *(_percent(line.values[model], 1) for model in audits), *(_percent(x, 0) for x in kept)])
    return headings, rows


def _percent(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f} %"


@dataclass(frozen=True)
class Document:
    """The audits of several models, with everything that AUDIT.json and AUDIT.md contain.

    Attributes:
        source: where the rows come from.
        models: path or name of each model, by its name in ``audits``.
        audits: audits of the same rows with the same views, by name of the model.
        settings: settings other than those of the views.
    """

    source: str
    models: Mapping[str, str]
    audits: Mapping[str, AuditResult]
    settings: Mapping[str, Any]

    @property
    def _first(self) -> AuditResult:
        return next(iter(self.audits.values()))

    def json_text(self) -> str:
        """Return the content of AUDIT.json; see the README in this folder for its format."""
        views = {name: asdict(found.view) for name, found in self._first.views.items()}
        content = {
            "data": self.source,
            "rows": self._first.rows,
            "settings": {**self.settings, "views": views},
            "models": {
                name: {"path": self.models[name], "views": found.to_json()} for name, found in self.audits.items()
            },
        }
        return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def markdown_text(self) -> str:
        """Return the content of AUDIT.md: notes that explain the numbers, and the table."""
        what = "Mean novel recall over rows: of the answer's content words that are not in the prompt, the share that"
        notes = [f"# Leak audit\n\n{self.source}: {self._first.rows} rows. {what} the model generates."]
        if set(AROUND) <= set(self.audits):
            notes.append(
                "kept = (model - retain) / (full - retain): 0 % means as if never learnt, 100 % as if never unlearned."
            )
        left_out = {name: found.figures["left_out"] for name, found in self._first.views.items()}
        if listed := ", ".join(f"{count} of {name}" for name, count in left_out.items() if count):
            notes.append(
                f"Rows left out because their answers have no content word that is not in the prompt: {listed}."
            )
        return "\n".join(notes) + "\n\n" + markdown(*cells(self.audits))


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, with all columns except the first aligned to the right."""
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)
