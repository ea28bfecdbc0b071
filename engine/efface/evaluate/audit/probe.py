"""A probe: one way of asking a model for one row's answer, and what came of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from efface.evaluate.audit.languages import Language
from efface.evaluate.audit.words import novel_words, recalled
from efface.evaluate.task import RowResult


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
