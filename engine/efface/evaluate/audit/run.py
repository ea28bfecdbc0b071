"""The audit: every view on one model."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from efface.evaluate.audit.result import AuditResult, ViewResult
from efface.evaluate.audit.rows import TOFU_GROUP, audit_rows
from efface.evaluate.audit.view import Exam, View
from efface.evaluate.audit.views import VIEWS, get_view
from efface.evaluate.runner import Progress
from efface.hf.text.rows import Rows
from efface.hf.text.templates import AUTO, Template


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
