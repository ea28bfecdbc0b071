"""Format shift: multiple choice, by likelihood."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from efface.evaluate.audit.exam import Exam
from efface.evaluate.audit.probe import Probe
from efface.evaluate.audit.rows import AuditRow
from efface.evaluate.audit.summary import Figures, summary
from efface.evaluate.audit.view import View
from efface.evaluate.audit.words import content_words, recalled
from efface.evaluate.task import NotFiniteError, RowResult


def options(row: AuditRow) -> list[str]:
    """Return the true answer, and behind it the false ones.

    The true one is the paraphrase where there is one: the perturbed answers are worded like it, so style tells nothing.
    """
    return [row.paraphrase, *dict.fromkeys(text for text in row.perturbed if text != row.paraphrase)]


@dataclass(frozen=True)
class Choice(View):
    """Let the model choose among the true and the perturbed answers: the one of the highest mean token log-probability.

    The options are not in the prompt, or the answer would be. What all of them say counts as prompt, because any choice
    says it. A tie is no leak: it goes to a false answer.
    """

    name: ClassVar[str] = "choice"

    def probes(self, rows: Sequence[AuditRow]) -> list[Probe]:
        """Return a probe for each row."""
        without = [i for i, row in enumerate(rows) if len(options(row)) < 2]
        if without:
            raise ValueError(
                f"view 'choice': expected column 'perturbed_answer' to hold false answers, got none in {len(without)} "
                f"of {len(rows)} rows (row {without[0]} first); use TOFU's *_perturbed file, or leave the view out"
            )
        return [
            Probe(i, (row.question,), row.paraphrase, row.language, given=" ".join(_common(row)))
            for i, row in enumerate(rows)
        ]

    def run(self, exam: Exam, rows: Sequence[AuditRow]) -> list[RowResult]:
        """Score the options of every row, and return what was chosen."""
        probes = self.probes(rows)
        offered = [options(row) for row in rows]
        scores = exam.mean_logprobs([row.question for row in rows], offered)
        if broken := [i for i, each in enumerate(scores) if not np.isfinite(each).all()]:
            raise NotFiniteError(
                f"view 'choice': expected finite log-probabilities, got {scores[broken[0]]} at row {broken[0]} "
                f"({len(broken)} of {len(rows)} rows); the model is broken, or its dtype too small for it"
            )
        return [_record(*each) for each in zip(probes, offered, scores, strict=True)]

    def figures(self, records: Sequence[RowResult]) -> Figures:
        """Return the summary, with the accuracy, and both figures of a choice by chance."""
        chance = [record["chance_recall"] for record in records if record["chance_recall"] is not None]
        return {
            **summary(records),
            "accuracy": float(np.mean([record["correct"] for record in records])),
            "chance_accuracy": float(np.mean([1 / len(record["options"]) for record in records])),
            "chance_mean": float(np.mean(chance)) if chance else None,
        }

    def shown(self, figures: Figures) -> dict[str, float | None]:
        """Return novel recall and accuracy, each beside what chance would give."""
        return {
            "": figures["mean"],
            "by chance": figures["chance_mean"],
            "accuracy": figures["accuracy"],
            "accuracy by chance": figures["chance_accuracy"],
        }


def _common(row: AuditRow) -> list[str]:
    return sorted(frozenset.intersection(*(content_words(text, row.language) for text in options(row))))


def _record(probe: Probe, offered: list[str], scores: list[float]) -> RowResult:
    best_false = 1 + int(np.argmax(scores[1:]))
    chosen = 0 if scores[0] > scores[best_false] else best_false
    every = [recalled(probe.novel, text, probe.language) for text in offered] if probe.novel else []
    return probe.record(
        [offered[chosen]],
        options=offered,
        mean_logprobs=scores,
        correct=chosen == 0,
        chance_recall=float(np.mean(every)) if every else None,
    )
