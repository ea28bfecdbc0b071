"""PrivLeak: a membership attack's success, measured by that on a model that never saw the forget set (MUSE)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from efface.evaluate.metrics.attack import Attack
from efface.evaluate.metrics.base import Found, Metric, MetricResult
from efface.evaluate.metrics.mia_min_k import MiaMinK
from efface.evaluate.metrics.part import Part
from efface.evaluate.metrics.registry import register_metric
from efface.evaluate.task import RowResult, Task

# Open-unlearning's, against a retain model whose AUC is 1.
_EPSILON = 1e-10


@register_metric
@dataclass(frozen=True)
class PrivLeak(Metric):
    """100 · ((1 − AUC) − (1 − AUC_retain)) / ((1 − AUC_retain) + 1e-10) (arXiv 2407.06460).

    1 − AUC is MUSE's AUC, as open-unlearning has it: ``Attack`` counts the other way round. 0 is best: the attack does
    as well as on a model trained on the retain set alone. Below 0 the forget set still shows (under-unlearning; −100
    where it always does), above it is conspicuously unlikely (over-unlearning).

    Attributes:
        attack: whose AUC; the retain model's, of the same attack, is ``retain_values[attack.name]``. Open-unlearning
            takes 0.5 where there is none; here that must be said.
    """

    attack: Attack = field(default_factory=MiaMinK)
    name: ClassVar[str] = "privleak"
    needs_holdout: ClassVar[bool] = True

    @property
    def needs_reference(self) -> bool:  # type: ignore[override]
        """What the attack needs."""
        return self.attack.needs_reference

    def check(self, holdout: Part | None, *, reference: bool, retain_values: Mapping[str, float]) -> None:
        """Raise ValueError if the metric lacks what it compares with."""
        super().check(holdout, reference=reference, retain_values=retain_values)
        self._retain(retain_values)

    def task(self, part: Part) -> Task:
        """Return the attack's."""
        return self.attack.task(part)

    def scores(self, part: Part, found: Found) -> list[RowResult]:
        """Return the attack's."""
        return self.attack.scores(part, found)

    def result(
        self, part: Part, holdout: Part | None, retain_values: Mapping[str, float], found: Found
    ) -> MetricResult:
        """Return PrivLeak and the AUCs that it is made of."""
        retain = self._retain(retain_values)
        value = float(self.attack.result(part, holdout, {}, found)["agg_value"])
        leak = ((1 - value) - (1 - retain)) / ((1 - retain) + _EPSILON) * 100
        return {"agg_value": leak, "auc": value, "retain_auc": retain}

    def _retain(self, values: Mapping[str, float]) -> float:
        value = values.get(self.attack.name)
        if value is None or not 0 <= value <= 1:
            raise ValueError(
                f"privleak: expected {self.attack.name!r} of a model trained on the retain set alone, between 0 and 1, "
                f"got {value}; evaluate that model with the same rows and the metric {self.attack.name}, or name 0.5, "
                "which open-unlearning assumes"
            )
        return value
