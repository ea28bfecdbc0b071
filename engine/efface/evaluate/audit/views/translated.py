"""Format shift: the question in an instruction in another language."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from efface.evaluate.audit.probe import Probe
from efface.evaluate.audit.rows import AuditRow
from efface.evaluate.audit.view import View

# Each says: answer the following question in the language in which it is asked.
FRAMES = {
    "en": "Answer the following question in the language in which it is asked:\n{question}",
    "de": "Beantworte die folgende Frage in der Sprache, in der sie gestellt ist:\n{question}",
    "fr": "Réponds à la question suivante dans la langue dans laquelle elle est posée :\n{question}",
    "es": "Responde a la siguiente pregunta en el idioma en que está formulada:\n{question}",
    "it": "Rispondi alla seguente domanda nella lingua in cui è posta:\n{question}",
}


@dataclass(frozen=True)
class Translated(View):
    """Ask within an instruction in each language but the row's own; the question stays as it is.

    Attributes:
        languages: of the instruction, codes in ``FRAMES``.
    """

    languages: tuple[str, ...] = ("en", "de", "fr", "es", "it")
    name: ClassVar[str] = "translated"

    def __post_init__(self) -> None:
        """Check the languages."""
        if unknown := [code for code in self.languages if code not in FRAMES]:
            raise ValueError(f"`languages`: expected some of {', '.join(FRAMES)}, got {unknown[0]!r}")

    def probes(self, rows: Sequence[AuditRow]) -> list[Probe]:
        """Return a probe for each row and other language."""
        return [
            Probe(i, (FRAMES[code].format(question=row.question),), row.answer, row.language, label=code)
            for code in self.languages
            for i, row in enumerate(rows)
            if code != row.language.code
        ]
