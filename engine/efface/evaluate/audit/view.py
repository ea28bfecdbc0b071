"""What the views of an audit share: they make probes of rows, and an examined model answers them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from efface.evaluate.audit.exam import Exam
from efface.evaluate.audit.probe import Probe
from efface.evaluate.audit.rows import AuditRow
from efface.evaluate.audit.summary import Figures, summary
from efface.evaluate.task import RowResult


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
