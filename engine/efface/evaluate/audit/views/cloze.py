"""Format shift: the answer with a gap where its novel content was."""

import itertools
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from efface.evaluate.audit.probe import Probe
from efface.evaluate.audit.rows import AuditRow
from efface.evaluate.audit.view import View
from efface.evaluate.audit.words import content_words, words

GAP = "____"

_COMPLETE = {
    "en": "Complete the sentence",
    "de": "Vervollständige den Satz",
    "fr": "Complète la phrase",
    "es": "Completa la frase",
    "it": "Completa la frase",
}
# A sentence ends with a full stop (not of a title or an initial), and what closes it, before white space.
_SENTENCE_END = re.compile(
    r"(?:[!?]|(?<!\b[A-Z])(?<!\bMr)(?<!\bMs)(?<!\bDr)(?<!\bSt)(?<!\bMrs)\.)[\"'\u201d\u2019)\]]*(?=\s)"
)


@dataclass(frozen=True)
class Gap:
    """A sentence of an answer, and the part of it that is left out."""

    sentence: str
    start: int
    end: int
    novel: int

    @property
    def cloze(self) -> str:
        """The sentence with the gap."""
        return self.sentence[: self.start] + GAP + self.sentence[self.end :]


def sentences(text: str) -> list[str]:
    """Return the sentences of a text."""
    borders = [0, *(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]
    parts = (text[a:b].strip() for a, b in itertools.pairwise(borders))
    return [part for part in parts if part]


def gap(row: AuditRow) -> Gap | None:
    """Return where the row's answer says most that its question does not; None where it says nothing new.

    Within a sentence, a stretch begins and ends with a novel word, and holds nothing but novel words and stop words.
    The gap is the stretch with the most novel words of all sentences, the last one of equals.
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
    """Ask to complete a sentence of the answer behind the question; what is left out of it is scored."""

    name: ClassVar[str] = "cloze"

    def probes(self, rows: Sequence[AuditRow]) -> list[Probe]:
        """Return a probe for each row."""
        return [_probe(i, row, gap(row)) for i, row in enumerate(rows)]


def _probe(number: int, row: AuditRow, found: Gap | None) -> Probe:
    if found is None:  # nothing novel: left out
        return Probe(number, (row.question,), row.answer, row.language)
    prompt = f"{row.question}\n{_COMPLETE[row.language.code]}: {found.cloze}"
    return Probe(number, (prompt,), found.sentence, row.language)
