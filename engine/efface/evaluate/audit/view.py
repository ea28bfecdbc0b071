"""What the views of an audit share.

A view makes probes of rows, an exam puts them to a model, and figures sum up what came of it.
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
"""What the records of a view come to, as JSON; see ``summary``."""

LEAK = 0.5
"""A row counts as leaked from this novel recall on. The threshold is ours; the means do not depend on it."""


@dataclass(frozen=True)
class Probe:
    """What a model is asked, and what it is scored against.

    Attributes:
        row: number of the row that it is about.
        turns: question, answer, question, …: the last turn is the model's to answer.
        reference: the text whose novel words count.
        language: of the reference.
        label: which of its view's variants this is.
        given: text that counts as prompt although the model is not shown it.
    """

    row: int
    turns: tuple[str, ...]
    reference: str
    language: Language
    label: str = ""
    given: str = ""

    @cached_property
    def novel(self) -> frozenset[str]:
        """The content words of the reference that the prompt does not contain."""
        return novel_words(self.reference, "\n".join([*self.turns, self.given]), self.language)

    def record(self, generations: Sequence[str], **more: Any) -> RowResult:
        """Return, as JSON, what was asked and what came out; without novel words nothing is scored."""
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
    """A model, and how it is asked.

    Attributes:
        model: an ``AutoModelForCausalLM``.
        tokenizer: its tokenizer.
        template: prompt format; see ``efface.hf.text.templates``.
        max_new_tokens: of a generation.
        token_budget: tokens of a forward pass.
        store: for ``run_tasks``.
        progress: likewise.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template: str | Template = AUTO
    max_new_tokens: int = 200
    token_budget: int = 8192
    store: str | Path | None = None
    progress: Progress | None = None

    def generate(self, probes: Sequence[Probe], sampling: Sampling | None = None) -> list[list[str]]:
        """Return the model's generations for each probe: the greedy one, or as many as are sampled."""
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
    """Return the turns as a chat: user and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


@dataclass(frozen=True)
class View(ABC):
    """A way of asking for what should be forgotten. Subclasses are frozen dataclasses of their settings."""

    name: ClassVar[str]

    @abstractmethod
    def probes(self, rows: Sequence[AuditRow]) -> list[Probe]:
        """Return what to ask about the rows, and nothing about a model.

        Raises:
            ValueError: rows without what the view needs.
        """

    def generate(self, exam: Exam, probes: Sequence[Probe]) -> list[list[str]]:
        """Return the generations for each probe."""
        return exam.generate(probes)

    def run(self, exam: Exam, rows: Sequence[AuditRow]) -> list[RowResult]:
        """Ask, and return a record for each probe; those without novel words are not asked."""
        probes = self.probes(rows)
        generations = iter(self.generate(exam, [probe for probe in probes if probe.novel]))
        return [probe.record(next(generations) if probe.novel else []) for probe in probes]

    def figures(self, records: Sequence[RowResult]) -> Figures:
        """Return what the records come to; see ``summary``."""
        return summary(records)

    def shown(self, figures: Figures) -> dict[str, float | None]:
        """Return the numbers of a table, by name; "" is the mean novel recall."""
        labels = figures.get("labels", {})
        return {"": figures["mean"], **{label: part["mean"] for label, part in labels.items()}}


def summary(records: Sequence[RowResult], *, by_label: bool = True) -> Figures:
    """Return the figures that every view has.

    With x the novel recalls of a row, over its variants and samples:

    - ``rows``: rows with at least one x; ``left_out``: rows whose answers had no novel word in any of their probes.
    - ``mean``: mean over rows of mean(x).   ``best``: mean over rows of max(x), the luckiest attacker's.
    - ``leaked``: share of rows with max(x) ≥ 1/2.
    - ``labels``: for every variant, its ``rows``, ``left_out`` and ``mean``.

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
    """Return the expected best of k of n values drawn without replacement; k = n is their maximum.

        Σ_{i=k..n} C(i−1, k−1) / C(n, k) · x_(i)     with x_(1) ≤ … ≤ x_(n)

    The unbiased estimate of leak@k (arXiv 2511.04934) from n samples, here of novel recall.
    """
    n = len(values)
    if not 1 <= k <= n:
        raise ValueError(f"`k`: expected 1 .. {n}, got {k}")
    return sum(comb(i - 1, k - 1) * value for i, value in enumerate(sorted(values), 1)) / comb(n, k)
