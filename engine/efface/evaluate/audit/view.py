"""Base classes of an audit: the probe, the model with its settings, the view, and the figures over all records.

A ``View`` makes probes from rows. An ``Exam`` runs the probes on a model. ``summary`` computes the view's figures.
"""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import comb
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from efface.evaluate.audit.languages import Language
from efface.evaluate.audit.rows import AuditRow
from efface.evaluate.audit.words import novel_words, recalled
from efface.evaluate.decoding import Sampling
from efface.evaluate.generation import GenerationTask
from efface.evaluate.likelihood import AnswerTask, mean_logprobs
from efface.evaluate.runner import Progress, RowResult, Task, run_tasks
from efface.hf.text.templates import AUTO, Template

Figures: TypeAlias = dict[str, Any]
"""Aggregate numbers over the records of a view, as JSON values; see ``summary``."""

LEAK = 0.5
"""A row with at least this novel recall counts as leaked. The threshold is our choice; the means do not use it."""


@dataclass(frozen=True)
class Probe:
    """A prompt for a model, with the text that its answer is scored against.

    Attributes:
        row: number of the row.
        turns: question, answer, question, …; the model answers the last one.
        reference: the text whose novel words are counted.
        language: language of the reference.
        label: the variant of the view, such as a language; empty if the view has no variants.
        given: text that counts as part of the prompt although the model does not see it.
    """

    row: int
    turns: tuple[str, ...]
    reference: str
    language: Language
    label: str = ""
    given: str = ""

    @cached_property
    def novel(self) -> frozenset[str]:
        """The content words of the reference that are not in the prompt."""
        return novel_words(self.reference, "\n".join([*self.turns, self.given]), self.language)

    def record(self, generations: Sequence[str], **more: Any) -> RowResult:
        """Return the probe, its generations and their novel recalls as JSON values.

        Without novel words, the list of novel recalls is empty. ``more`` adds keys to the record.
        """
        scored = generations if self.novel else ()
        return {
            "row": self.row,
            "label": self.label,
            "prompt": list(self.turns),
            "reference": self.reference,
            "novel": sorted(self.novel),
            "generations": list(generations),
            "novel_recall": [recalled(self.novel, text, self.language) for text in scored],
            **more,
        }


@dataclass(frozen=True)
class Exam:
    """A model with the settings for generating and scoring answers.

    Attributes:
        model: an ``AutoModelForCausalLM``.
        tokenizer: its tokenizer.
        template: prompt format; see ``efface.hf.text.templates``.
        max_new_tokens: maximum tokens of a generation.
        token_budget: maximum tokens of a forward pass.
        store: see ``run_tasks``.
        progress: see ``run_tasks``.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template: str | Template = AUTO
    max_new_tokens: int = 200
    token_budget: int = 8192
    store: str | Path | None = None
    progress: Progress | None = None

    def generate(self, probes: Sequence[Probe], sampling: Sampling | None = None) -> list[list[str]]:
        """Return the generations for each probe: one greedy answer, or ``sampling.n`` samples."""
        if not probes:
            return []
        task = GenerationTask(
            self.tokenizer,
            [_chat(probe.turns) for probe in probes],
            template=self.template,
            max_new_tokens=self.max_new_tokens,
            token_budget=self.token_budget,
            sampling=sampling,
        )
        return [[result["text"]] if sampling is None else result["texts"] for result in self._run(task)]

    def mean_logprobs(self, questions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[list[float]]:
        """Return the mean token log-probability of each answer, given its question."""
        task = AnswerTask(self.tokenizer, questions, answers, template=self.template, token_budget=self.token_budget)
        return mean_logprobs(self._run(task))

    def _run(self, task: Task) -> list[RowResult]:
        (results,) = run_tasks(self.model, [task], store=self.store, progress=self.progress)
        return results


def _chat(turns: Sequence[str]) -> list[dict[str, str]]:
    """Return the turns as a chat in which user and assistant alternate."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


@dataclass(frozen=True)
class View(ABC):
    """A way of asking for forgotten answers. Subclasses are frozen dataclasses whose fields are the settings."""

    name: ClassVar[str]

    @abstractmethod
    def probes(self, rows: Sequence[AuditRow]) -> list[Probe]:
        """Return the probes for the rows, which do not depend on a model.

        Raises:
            ValueError: the rows lack a column or value that the view needs.
        """

    def generate(self, exam: Exam, probes: Sequence[Probe]) -> list[list[str]]:
        """Return the generations for each probe, greedy by default."""
        return exam.generate(probes)

    def run(self, exam: Exam, rows: Sequence[AuditRow]) -> list[RowResult]:
        """Run the probes on the model and return a record for each. Probes without novel words are not run."""
        probes = self.probes(rows)
        generations = iter(self.generate(exam, [probe for probe in probes if probe.novel]))
        return [probe.record(next(generations) if probe.novel else []) for probe in probes]

    def figures(self, records: Sequence[RowResult]) -> Figures:
        """Return the figures of the records; see ``summary``."""
        return summary(records)

    def shown(self, figures: Figures) -> dict[str, float | None]:
        """Return the numbers to show in a table, by name. The name "" is the mean novel recall."""
        labels = figures.get("labels", {})
        return {"": figures["mean"], **{label: part["mean"] for label, part in labels.items()}}


def summary(records: Sequence[RowResult], *, by_label: bool = True) -> Figures:
    """Return the figures that every view has.

    Let x be the novel recalls of a row over all its variants and samples.

    - ``rows``: number of rows with at least one x; ``left_out``: number of rows without a novel word in any probe.
    - ``mean``: mean over rows of mean(x).   ``best``: mean over rows of max(x), an attacker's best case.
    - ``leaked``: share of rows with max(x) ≥ 1/2.
    - ``labels``: ``rows``, ``left_out`` and ``mean`` of each variant, if the view has variants.

    A mean over no rows is None.
    """
    rows: dict[int, list[float]] = defaultdict(list)
    labels: dict[str, list[RowResult]] = defaultdict(list)
    for record in records:
        rows[record["row"]].extend(record["novel_recall"])
        labels[record["label"]].append(record)
    scored = [values for values in rows.values() if values]
    figures: Figures = {
        "rows": len(scored),
        "left_out": len(rows) - len(scored),
        "mean": _mean([float(np.mean(values)) for values in scored]),
        "best": _mean([max(values) for values in scored]),
        "leaked": _mean([float(max(values) >= LEAK) for values in scored]),
    }
    if by_label and labels.keys() - {""}:
        parts = {label: summary(some, by_label=False) for label, some in labels.items()}
        figures["labels"] = {
            label: {name: part[name] for name in ("rows", "left_out", "mean")} for label, part in parts.items()
        }
    return figures


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def best_of(values: Sequence[float], k: int) -> float:
    """Return the expected maximum of k values drawn from n values without replacement.

        Σ_{i=k..n} C(i−1, k−1) / C(n, k) · x_(i)     with x_(1) ≤ … ≤ x_(n)

    For k = n it is the maximum. The formula is the unbiased estimate of leak@k (arXiv 2511.04934) from n samples, here
    applied to novel recall.
    """
    n = len(values)
    if not 1 <= k <= n:
        raise ValueError(f"`k`: expected 1 .. {n}, got {k}")
    return sum(comb(i - 1, k - 1) * value for i, value in enumerate(sorted(values), 1)) / comb(n, k)
