"""Ranking of trials: the highest Forget Quality among those with enough Model Utility."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from efface.sweep.space import Point

_LEAST_LOG = -324.0  # below the logarithm of every positive double
_BELOW = -1000.0


@dataclass(frozen=True)
class Trial:
    """A trial with its result.

    Attributes:
        number: number in the study.
        name: name of the folder.
        point: values of the varied parameters.
        state: "complete", "failed", "running" or "waiting".
        metrics: figures of the evaluation, by open-unlearning's names.
        error: message of a failed trial; empty otherwise.
        exit_code: exit code of the process; None if it has not ended.
        seconds: duration of the last process; None if it has not ended.
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
    """The lowest Model Utility with which a trial can win.

    Attributes:
        share: the floor as a share of the full model's utility, or of the best trial's if ``full`` is None.
        full: the full model's utility; None if unknown.
        least: an absolute floor, which replaces ``share`` and ``full``; None if not given.
    """

    share: float = 0.9
    full: float | None = None
    least: float | None = None

    def of(self, metrics: Iterable[Mapping[str, float]]) -> float:
        """Return the floor for trials with these metrics."""
        if self.least is not None:
            return self.least
        full = self.full
        if full is None:
            full = max((each["model_utility"] for each in metrics if "model_utility" in each), default=0.0)
        return self.share * full


def objective(metrics: Mapping[str, float], floor: float) -> float:
    """Return the value that Optuna maximises.

    If Model Utility ≥ floor, the value is log10(Forget Quality), but at least −324. Otherwise it is −1000 + Model
    Utility: a trial below the floor is worse than every trial above it, and better the closer it is to the floor. The
    value is 0 without Forget Quality.
    """
    utility = metrics.get("model_utility")
    if utility is not None and utility < floor:
        return _BELOW + utility
    quality = metrics.get("forget_quality")
    if quality is None:
        return 0.0
    return math.log10(quality) if quality > 0 else _LEAST_LOG


def ranked(trials: Sequence[Trial], floor: Floor) -> list[Trial]:
    """Return the trials, best first.

    The order is: trials above the floor, trials below it, trials without Forget Quality, running, waiting, failed.
    """
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
    """Return the best complete trial with metrics, or None."""
    complete = [trial for trial in trials if trial.state == "complete" and trial.metrics]
    return ranked(complete, floor)[0] if complete else None
