"""The views of an audit by name, and the probes that each makes from a row. ``relearn.py`` has the view "relearn"."""

import itertools
import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from efface.evaluate.audit.relearn import Relearn
from efface.evaluate.audit.rows import AuditRow
from efface.evaluate.audit.view import Exam, Figures, Probe, View, best_of, summary
from efface.evaluate.audit.words import content_words, recalled, words
from efface.evaluate.decoding import Sampling
from efface.evaluate.runner import NotFiniteError, RowResult

_GAP = "____"

_COMPLETE = {
    "en": "Complete the sentence",
    "de": "Vervollständige den Satz",
    "fr": "Complète la phrase",
    "es": "Completa la frase",
    "it": "Completa la frase",
}
# A sentence ends before white space with !, ? or a full stop (not after a title or an initial) and closing quotes.
_SENTENCE_END = re.compile(
    r"(?:[!?]|(?<!\b[A-Z])(?<!\bMr)(?<!\bMs)(?<!\bDr)(?<!\bSt)(?<!\bMrs)\.)[\"'\u201d\u2019)\]]*(?=\s)"
)
# Each one means: answer the following question in the language in which it is asked.
_FRAMES = {
    "en": "Answer the following question in the language in which it is asked:\n{question}",
    "de": "Beantworte die folgende Frage in der Sprache, in der sie gestellt ist:\n{question}",
    "fr": "Réponds à la question suivante dans la langue dans laquelle elle est posée :\n{question}",
    "es": "Responde a la siguiente pregunta en el idioma en que está formulada:\n{question}",
    "it": "Rispondi alla seguente domanda nella lingua in cui è posta:\n{question}",
}


@dataclass(frozen=True)
class Direct(View):
    """Ask the question itself, with greedy decoding."""

    name: ClassVar[str] = "direct"

    def probes(self, rows: Sequence[AuditRow]) -> list[Probe]:
        """Return one probe per row."""
        return [Probe(i, (row.question,), row.answer, row.language) for i, row in enumerate(rows)]


@dataclass(frozen=True)
class Gap:
    """A sentence of an answer with the range of characters to leave out, and the number of novel words in it."""

    sentence: str
    start: int
    end: int
    novel: int

    @property
    def cloze(self) -> str:
        """The sentence with the range replaced by the gap marker."""
        return self.sentence[: self.start] + _GAP + self.sentence[self.end :]


def sentences(text: str) -> list[str]:
    """Split a text into sentences, without surrounding white space."""
    borders = [0, *(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]
    parts = (text[a:b].strip() for a, b in itertools.pairwise(borders))
    return [part for part in parts if part]


def gap(row: AuditRow) -> Gap | None:
    """Return the stretch of the row's answer with the most novel words, or None if the answer has no novel word.

    A stretch is within one sentence, begins and ends with a novel word, and contains only novel words and stop words.
    Of several stretches with the same number of novel words, the last one is returned.
    """
    known = content_words(row.question, row.language)
    best: Gap | None = None
    for sentence in sentences(unicodedata.normalize("NFC", row.answer)):
        stretch: Gap | None = None
        for word in words(sentence, row.language):
            if word.content is None:
                continue
            if word.content in known:
                stretch = None
                continue
            stretch = Gap(
                sentence, stretch.start if stretch else word.start, word.end, stretch.novel + 1 if stretch else 1
            )
            if best is None or stretch.novel >= best.novel:
                best = stretch
    return best


@dataclass(frozen=True)
class Cloze(View):
    """Format shift: after the question, ask the model to complete a sentence of the answer. The gap is scored."""

    name: ClassVar[str] = "cloze"

    def probes(self, rows: Sequence[AuditRow]) -> list[Probe]:
        """Return one probe per row."""
        return [_completion(i, row, gap(row)) for i, row in enumerate(rows)]


def _completion(number: int, row: AuditRow, found: Gap | None) -> Probe:
    if found is None:  # no novel word, so the row is left out
        return Probe(number, (row.question,), row.answer, row.language)
    prompt = f"{row.question}\n{_COMPLETE[row.language.code]}: {found.cloze}"
    return Probe(number, (prompt,), found.sentence, row.language)


def _options(row: AuditRow) -> list[str]:
    """Return the true answer, followed by the false answers without duplicates.

    The true answer is the paraphrase if the row has one. The perturbed answers are worded like the paraphrase, so the
    style does not reveal the true one.
    """
    return [row.paraphrase, *dict.fromkeys(text for text in row.perturbed if text != row.paraphrase)]


@dataclass(frozen=True)
class Choice(View):
    """Format shift: choose the true or perturbed answer with the highest mean token log-probability.

    The prompt does not list the options, because it would then contain the answer. Content words that all options
    share count as prompt, because every choice contains them. A tie is not a leak: a false answer is then chosen.
    """

    name: ClassVar[str] = "choice"

    def probes(self, rows: Sequence[AuditRow]) -> list[Probe]:
        """Return one probe per row."""
        without = [i for i, row in enumerate(rows) if len(_options(row)) < 2]
        if without:
            raise ValueError(
                f"view 'choice': expected false answers in column 'perturbed_answer', got none in {len(without)} of "
                f"{len(rows)} rows (row {without[0]} first); use TOFU's *_perturbed file, or leave the view out"
            )
        return [
            Probe(i, (row.question,), row.paraphrase, row.language, given=" ".join(_common(row)))
            for i, row in enumerate(rows)
        ]

    def run(self, exam: Exam, rows: Sequence[AuditRow]) -> list[RowResult]:
        """Score the options of each row and return a record of the chosen one."""
        probes = self.probes(rows)
        offered = [_options(row) for row in rows]
        scores = exam.mean_logprobs([row.question for row in rows], offered)
        if broken := [i for i, each in enumerate(scores) if not np.isfinite(each).all()]:
            raise NotFiniteError(
                f"view 'choice': expected finite log-probabilities, got {scores[broken[0]]} at row {broken[0]} "
                f"({len(broken)} of {len(rows)} rows); check the weights, or use bfloat16 or float32"
            )
        return [_record(*each) for each in zip(probes, offered, scores, strict=True)]

    def figures(self, records: Sequence[RowResult]) -> Figures:
        """Return the summary, the accuracy, and the expected mean and accuracy of a choice by chance."""
        chance = [record["chance_recall"] for record in records if record["chance_recall"] is not None]
        return {
            **summary(records),
            "accuracy": float(np.mean([record["correct"] for record in records])),
            "chance_accuracy": float(np.mean([1 / len(record["options"]) for record in records])),
            "chance_mean": float(np.mean(chance)) if chance else None,
        }

    def shown(self, figures: Figures) -> dict[str, float | None]:
        """Return novel recall and accuracy, each together with its value by chance."""
        return {
            "": figures["mean"],
            "by chance": figures["chance_mean"],
            "accuracy": figures["accuracy"],
            "accuracy by chance": figures["chance_accuracy"],
        }


def _common(row: AuditRow) -> list[str]:
    return sorted(frozenset.intersection(*(content_words(text, row.language) for text in _options(row))))


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


@dataclass(frozen=True)
class Translated(View):
    """Format shift: ask within an instruction in each language except the row's own. The question is not translated.

    Attributes:
        languages: languages of the instruction; by default all that are available.
    """

    languages: tuple[str, ...] = ("en", "de", "fr", "es", "it")
    name: ClassVar[str] = "translated"

    def __post_init__(self) -> None:
        if unknown := [code for code in self.languages if code not in _FRAMES]:
            raise ValueError(f"`languages`: expected some of {', '.join(_FRAMES)}, got {unknown[0]!r}")

    def probes(self, rows: Sequence[AuditRow]) -> list[Probe]:
        """Return one probe per row and language, except the row's own language."""
        return [
            Probe(i, (_FRAMES[code].format(question=row.question),), row.answer, row.language, label=code)
            for code in self.languages
            for i, row in enumerate(rows)
            if code != row.language.code
        ]


@dataclass(frozen=True)
class BestOf(Direct):
    """Ask the question itself N times with sampling, which can reveal more than the greedy answer.

    Attributes:
        samples: number of samples N.
        temperature: divisor of the logits; 1 samples from the model's own distribution.
        top_p: total probability of the nucleus; 1 samples from all tokens.
        seed: seed of the samples. The samples of a row do not depend on the other rows.
    """

    samples: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    name: ClassVar[str] = "best-of-n"

    def __post_init__(self) -> None:
        self._sampling()  # raises ValueError for settings out of range

    def generate(self, exam: Exam, probes: Sequence[Probe]) -> list[list[str]]:
        """Return ``samples`` generations for each probe."""
        return exam.generate(probes, self._sampling())

    def figures(self, records: Sequence[RowResult]) -> Figures:
        """Return the summary with ``best_of``, the mean over rows of the expected best of k = 1, 2, 4, … N samples."""
        scored = [record["novel_recall"] for record in records if record["novel_recall"]]
        counts = sorted({self.samples, *(1 << i for i in range(self.samples.bit_length() - 1))})
        curve = {str(k): float(np.mean([best_of(values, k) for values in scored])) for k in counts if scored}
        return {**summary(records), "best_of": curve}

    def shown(self, figures: Figures) -> dict[str, float | None]:
        """Return the mean novel recall of one sample and of the best of N samples."""
        return {"": figures["mean"], f"best of {self.samples}": figures["best"]}

    def _sampling(self) -> Sampling:
        return Sampling(n=self.samples, temperature=self.temperature, top_p=self.top_p, seed=self.seed)


@dataclass(frozen=True)
class Clues(View):
    """Chain of clues: ask at the end of a conversation that reveals the author's j previous rows.

    Words that the conversation contains do not count as novel.

    Attributes:
        clues: the numbers j. A row with fewer than j previous rows of its author has no probe for j.
    """

    clues: tuple[int, ...] = (1, 3, 5)
    name: ClassVar[str] = "clues"

    def __post_init__(self) -> None:
        if not self.clues or min(self.clues) < 1:
            raise ValueError(f"`clues`: expected numbers of at least 1, got {self.clues}")

    def probes(self, rows: Sequence[AuditRow]) -> list[Probe]:
        """Return one probe per number of clues and row with enough previous rows."""
        if any(row.group is None for row in rows):
            raise ValueError(
                "view 'clues': expected an author for every row, got rows without one; set `group_column` "
                f"(--group-column), a `group_size` (--group-size) that divides {len(rows)}, or leave the view out"
            )
        by_group: dict[str | None, list[int]] = defaultdict(list)
        before: list[list[int]] = []
        for i, row in enumerate(rows):
            before.append(list(by_group[row.group]))
            by_group[row.group].append(i)
        probes = [
            Probe(i, _conversation(rows, before[i][-count:], row), row.answer, row.language, label=f"{count} revealed")
            for count in self.clues
            for i, row in enumerate(rows)
            if len(before[i]) >= count
        ]
        if not probes:
            raise ValueError(
                f"view 'clues': expected a row with at least {min(self.clues)} previous rows of its author, got none; "
                "give fewer clues, or another --group-column"
            )
        return probes


def _conversation(rows: Sequence[AuditRow], revealed: Sequence[int], row: AuditRow) -> tuple[str, ...]:
    texts = (text for i in revealed for text in (rows[i].question, rows[i].answer))
    return (*texts, row.question)


VIEWS: dict[str, type[View]] = {view.name: view for view in (Direct, Cloze, Choice, Translated, BestOf, Clues, Relearn)}


def get_view(view: str | View) -> View:
    """Return a view by name with its default settings, or return ``view`` unchanged if it is a view.

    Raises:
        ValueError: the name is unknown. The message lists the known ones.
    """
    if isinstance(view, View):
        return view
    if view not in VIEWS:
        raise ValueError(f"`views`: expected some of {', '.join(VIEWS)}, got {view!r}")
    return VIEWS[view]()
