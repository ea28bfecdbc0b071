"""Interleaved timing: every round calls each provider once, so that a slow moment of the machine affects all."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)


class Clock:
    """A device's clock. On a GPU a moment is an event, and only ``between`` waits for the device."""

    def __init__(self, device: torch.device | str) -> None:
        self._gpu = torch.device(device).type == "cuda"

    def now(self) -> Any:
        """Return the current moment."""
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, begin: Any, end: Any) -> float:
        """Return the milliseconds between two past moments."""
        return float(begin.elapsed_time(end) if self._gpu else (end - begin) * 1e3)


def interleaved(
    calls: Mapping[Key, Callable[[int], object]], rounds: int, *, warm_up: int = 0
) -> dict[Key, list[float]]:
    """Return the milliseconds of every call in every round; within a round, calls run in the order of ``calls``.

    Each call receives the number of its round. Warm-up rounds run first with the same numbers and are not timed.
    """
    for round_ in range(warm_up):
        for call in calls.values():
            call(round_)
    times: dict[Key, list[float]] = {key: [] for key in calls}
    for round_ in range(rounds):
        for key, call in calls.items():
            begin = time.perf_counter()
            call(round_)
            times[key].append((time.perf_counter() - begin) * 1e3)
    return times


# Upper bound on a GPU's clock, so that a wait of this many cycles lasts at least a second.
_CYCLES_A_SECOND = 2.0e9
_LONGEST_WAIT = 0.05  # seconds; for a call that takes longer to launch, the launches are timed too


def interleaved_on_gpu(
    calls: Mapping[Key, Callable[[int], object]], rounds: int, *, warm_up: int = 1
) -> dict[Key, list[float]]:
    """Time calls like ``interleaved``, but with GPU events around each call: its kernels without its launches.

    An empty kernel runs before the first event, for at least twice as long as the call took to launch. It keeps the GPU
    busy during the launches. ``wall_times`` includes the launches. At least one round warms up.
    """
    # The shortest launch time so far, in seconds. A call that synchronises also waits for the empty kernel, except in
    # its first round.
    launching: dict[Key, float] = {}
    times: dict[Key, list[float]] = {key: [] for key in calls}
    for round_ in range(-max(1, warm_up), rounds):
        events = {key: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for key in calls}
        for key, call in calls.items():
            torch.cuda.synchronize()
            wait = min(_LONGEST_WAIT, 2 * launching.get(key, 0.0))
            torch.cuda._sleep(int(_CYCLES_A_SECOND * wait))  # noqa: SLF001 - there is no public function
            begin = time.perf_counter()
            events[key][0].record()
            call(round_)
            events[key][1].record()
            taken = time.perf_counter() - begin
            launching[key] = min(taken, launching.get(key, taken))
        torch.cuda.synchronize()
        for key, (first, last) in events.items():
            if round_ >= 0:
                times[key].append(first.elapsed_time(last))
    return times


def medians(calls: Mapping[Key, Callable[[int], object]], rounds: int, device: str) -> dict[Key, float]:
    """Return the median milliseconds of every call, interleaved, on the clock of "cuda" or "cpu"."""
    times = (interleaved_on_gpu if device == "cuda" else interleaved)(calls, rounds, warm_up=1)
    return {key: statistics.median(each) for key, each in times.items()}


def wall_times(calls: Mapping[Key, Callable[[int], object]], rounds: int) -> dict[Key, list[float]]:
    """Time calls like ``interleaved``, with the GPU idle before and after each, as a caller experiences them.

    The calls must have run before, because there is no warm-up.
    """

    def finished(call: Callable[[int], object]) -> Callable[[int], object]:
        def run(round_: int) -> None:
            call(round_)
            torch.cuda.synchronize()

        return run

    torch.cuda.synchronize()
    return interleaved({key: finished(call) for key, call in calls.items()}, rounds)


def spread(milliseconds: Sequence[float], prefix: str = "") -> dict[str, float]:
    """Return the fields of a results row for a provider's rounds: median, minimum and maximum."""
    median, low, high = statistics.median(milliseconds), min(milliseconds), max(milliseconds)
    return {f"{prefix}median_ms": median, f"{prefix}low_ms": low, f"{prefix}high_ms": high}


def median_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Return the median of the ratios within each round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))
