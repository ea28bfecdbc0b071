"""Which trial is best: the greatest Forget Quality among those that can still do what the full model could."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from efface.sweep.space import Point

_LEAST_LOG = -324.0  # below the logarithm of every positive double
_BELOW = -1000.0


@dataclass(frozen=True)
class Trial:
    """A trial as it is shown.

    Attributes:
        number: in the study.
        name: of its folder.
        point: its parameters.
        state: "complete", "failed", "running" or "waiting".
        metrics: by open-unlearning's names.
        error: of a failed one.
        exit_code: of its process, where that has ended.
        seconds: of its last process.
    """

    number: int
    name: str
    point: Point
    state: str
    metrics: Mapping[str, float]
    error: str = ""
    exit_code: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Floor:
    """The least Model Utility of a trial that may win.

    Attributes:
        share: of the full model's utility, or where that is not known, of the best trial's.
        full: the full model's utility.
        least: an absolute floor instead.
    """

    share: float = 0.9
    full: float | None = None
    least: float | None = None

    def of(self, metrics: Iterable[Mapping[str, float]]) -> float:
        """Return the floor among trials with these metrics."""
        if self.least is not None:
            return self.least
        full = self.full
        if full is None:
            full = max((each["model_utility"] for each in metrics if "model_utility" in each), default=0.0)
        return self.share * full


def objective(metrics: Mapping[str, float], floor: float) -> float:
    """Return what Optuna maximises.

    It equals log10(Forget Quality), at least −324, where Model Utility ≥ floor, else −1000 + Model Utility: a trial
    below the floor is worse than every other, and better the nearer it is to the floor. 0 without Forget Quality.
    """
    utility = metrics.get("model_utility")
    if utility is not None and utility < floor:
        return _BELOW + utility
    quality = metrics.get("forget_quality")
    if quality is None:
        return 0.0
    return math.log10(quality) if quality > 0 else _LEAST_LOG


def ranked(trials: Sequence[Trial], floor: Floor) -> list[Trial]:
    """Return the trials, best first: those that meet the floor, those below it, without figures, unfinished, failed."""
    least = floor.of(trial.metrics for trial in trials)
    order = ("complete", "running", "waiting", "failed")

    def key(trial: Trial) -> tuple[float, ...]:
        quality, utility = trial.metrics.get("forget_quality"), trial.metrics.get("model_utility")
        return (
            order.index(trial.state),
            quality is None,
            -objective(trial.metrics, least),
            -(utility or 0.0),
            trial.number,
        )

    return sorted(trials, key=key)


def best_of(trials: Sequence[Trial], floor: Floor) -> Trial | None:
    """Return the best complete trial that was evaluated, or None."""
    complete = [trial for trial in trials if trial.state == "complete" and trial.metrics]
    return ranked(complete, floor)[0] if complete else None
