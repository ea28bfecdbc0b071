"""Chain of clues: what a model says about an author once it has been told something of them."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from efface.evaluate.audit.probe import Probe
from efface.evaluate.audit.rows import AuditRow
from efface.evaluate.audit.view import View


@dataclass(frozen=True)
class Clues(View):
    """Ask at the end of a conversation that has revealed the j rows before this one, of the same author.

    Nothing that the conversation said counts as novel.

    Attributes:
        clues: the numbers j; a row that has fewer rows before it is not asked with so many.
    """

    clues: tuple[int, ...] = (1, 3, 5)
    name: ClassVar[str] = "clues"

    def __post_init__(self) -> None:
        """Check the numbers of clues."""
        if not self.clues or min(self.clues) < 1:
            raise ValueError(f"`clues`: expected numbers from 1, got {self.clues}")

    def probes(self, rows: Sequence[AuditRow]) -> list[Probe]:
        """Return a probe for each number of clues and row."""
        if any(row.group is None for row in rows):
            raise ValueError(
                f"view 'clues': {len(rows)} rows are no whole number of authors, so it is not known which rows belong "
                "together; name the column that tells (--group-column, `group_column`), or leave the view out"
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
                f"view 'clues': no row has {min(self.clues)} others of its author before it; give fewer clues, or "
                "another --group-column"
            )
        return probes


def _conversation(rows: Sequence[AuditRow], revealed: Sequence[int], row: AuditRow) -> tuple[str, ...]:
    told = (turn for i in revealed for turn in (rows[i].question, rows[i].answer))
    return (*told, row.question)
