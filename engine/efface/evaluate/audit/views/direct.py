"""The question as it was learnt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from efface.evaluate.audit.probe import Probe
from efface.evaluate.audit.rows import AuditRow
from efface.evaluate.audit.view import View


@dataclass(frozen=True)
class Direct(View):
    """Ask the question itself; the answer is greedy."""

    name: ClassVar[str] = "direct"

    def probes(self, rows: Sequence[AuditRow]) -> list[Probe]:
        """Return a probe for each row."""
        return [Probe(i, (row.question,), row.answer, row.language) for i, row in enumerate(rows)]
