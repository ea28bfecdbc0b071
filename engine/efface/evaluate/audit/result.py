"""The audit of a model, and several models' audits side by side: as a table, and as files."""

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
"""What the models are called that learnt everything, and that never learnt what was to be forgotten."""


@dataclass(frozen=True)
class ViewResult:
    """What a view found: a record for each probe, in its order, and what they come to."""

    view: View
    figures: Figures
    records: Sequence[RowResult]


@dataclass(frozen=True)
class AuditResult:
    """What the views found out about one model.

    Attributes:
        rows: how many rows were audited.
        views: by name, in the order in which they were run.
    """

    rows: int
    views: Mapping[str, ViewResult]

    def to_json(self) -> dict[str, Any]:
        """Return figures and records as JSON values."""
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
    """Return what the model gives away of rows that it should have forgotten, seen from several sides.

    Everything is scored by novel recall; see this folder's README for the definitions. The same rows, settings and
    seeds give the same result.

    Args:
        model: an ``AutoModelForCausalLM``; afterwards it is as it was.
        tokenizer: its tokenizer.
        rows: with ``question`` and ``answer``; for "choice" also ``perturbed_answer``.
        views: names in ``VIEWS``, or views with settings of their own, such as ``BestOf(samples=32)``.
        group_column: tells whom a row is about, for "clues"; None: ``group_size`` rows in a row are one author's.
        group_size: 20 in TOFU.
        template: prompt format; see ``efface.hf.text.templates``.
        max_new_tokens: of a generation.
        token_budget: tokens of a forward pass.
        store: a file that keeps finished rows, so that a killed audit goes on where it was; see ``run_tasks``.
        progress: called with the view at hand, how many of its probes are answered, and how many there are.

    Raises:
        ValueError: before the model is asked anything: unknown views, or rows without what a view needs.
    """
    chosen = [get_view(view) for view in views]
    names = [view.name for view in chosen]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"`views`: expected at least one, each once, got {', '.join(names) or 'none'}")
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
    """One number of several models.

    Attributes:
        view: whose number it is.
        what: which of them; empty for the view's mean novel recall.
        values: of every model, by name; None where nothing could be scored.
    """

    view: str
    what: str
    values: Mapping[str, float | None]

    def kept(self, model: str, full: str, retain: str) -> float | None:
        """Return (model − retain) / (full − retain): 0 as if never learnt, 1 as if never unlearned.

        None where the full model gives away no more than the retain model: there is nothing to compare with.
        """
        x, high, low = (self.values[name] for name in (model, full, retain))
        if x is None or high is None or low is None or high <= low:
            return None
        return (x - low) / (high - low)


def side_by_side(audits: Mapping[str, AuditResult]) -> list[Line]:
    """Return the lines of a table with a column for each model.

    Raises:
        ValueError: audits of other rows or other views.
    """
    names = list(audits)
    first = audits[names[0]]
    for name in names[1:]:
        if list(audits[name].views) != list(first.views) or audits[name].rows != first.rows:
            raise ValueError(
                f"audits of {names[0]!r} ({first.rows} rows; {', '.join(first.views)}) and {name!r} "
                f"({audits[name].rows} rows; {', '.join(audits[name].views)}) cannot be compared; audit both alike"
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
    """Return the headings and the rows of a table: a view's numbers for each model, by name.

    Where there is a full and a retain model, there is a column with what each of the others kept, too.
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
    """What was audited, how, and what came of it.

    Attributes:
        source: of the rows.
        models: where each model is from, by the names that they have in ``audits``.
        audits: of the same rows and views.
        settings: beside those of the views.
    """

    source: str
    models: Mapping[str, str]
    audits: Mapping[str, AuditResult]
    settings: Mapping[str, Any]

    @property
    def _first(self) -> AuditResult:
        return next(iter(self.audits.values()))

    def json_text(self) -> str:
        """Return the content of AUDIT.json; the folder's README says what it holds."""
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
        """Return the content of AUDIT.md: the table, and what to know about it."""
        what = "Means over rows of novel recall: the share of the answer's content words, beyond those of the prompt"
        notes = [f"# Leak audit\n\n{self.source}: {self._first.rows} rows. {what}, that the model says."]
        if set(AROUND) <= set(self.audits):
            notes.append(
                "kept = (model - retain) / (full - retain): 0 % as if never learnt, 100 % as if never unlearned."
            )
        left_out = {name: found.figures["left_out"] for name, found in self._first.views.items()}
        if listed := ", ".join(f"{count} of {name}" for name, count in left_out.items() if count):
            notes.append(f"Rows left out, because their answers say nothing that their prompts did not: {listed}.")
        return "\n".join(notes) + "\n\n" + markdown(*cells(self.audits))


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, its numbers to the right."""
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)
