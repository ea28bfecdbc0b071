"""Best of N: what sampling gives away that the greedy answer does not."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from efface.evaluate.audit.exam import Exam
from efface.evaluate.audit.probe import Probe
from efface.evaluate.audit.summary import Figures, best_of, summary
from efface.evaluate.audit.views.direct import Direct
from efface.evaluate.sampling import Sampling
from efface.evaluate.task import RowResult


@dataclass(frozen=True)
class BestOf(Direct):
    """Ask the question itself, N times, and sample the answers.

    Attributes:
        samples: N.
        temperature: 1 samples from the model's own distribution.
        top_p: of the nucleus; 1 samples from all tokens.
        seed: fixes every row's samples, whatever other rows there are.
    """

    samples: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    name: ClassVar[str] = "best-of-n"

    def __post_init__(self) -> None:
        """Check the settings."""
        self._sampling()

    def generate(self, exam: Exam, probes: Sequence[Probe]) -> list[list[str]]:
        """Return N samples for each probe."""
        return exam.generate(probes, self._sampling())

    def figures(self, records: Sequence[RowResult]) -> Figures:
        """Return the summary, and under ``best_of`` the mean over rows of the expected best of k = 1, 2, 4, … N."""
        scored = [record["novel_recall"] for record in records if record["novel_recall"]]
        counts = sorted({self.samples, *(1 << i for i in range(self.samples.bit_length() - 1))})
        curve = {str(k): float(np.mean([best_of(values, k) for values in scored])) for k in counts if scored}
        return {**summary(records), "best_of": curve}

    def shown(self, figures: Figures) -> dict[str, float | None]:
        """Return the mean of one sample, and of the best of all."""
        return {"": figures["mean"], f"best of {self.samples}": figures["best"]}

    def _sampling(self) -> Sampling:
        return Sampling(n=self.samples, temperature=self.temperature, top_p=self.top_p, seed=self.seed)
