"""Interleaved timing: every call once a round, so that a slow moment of the machine slows all of them."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)


class Clock:
    """A device's own clock: on a GPU moments are events, and nothing waits until a time is made of two of them."""

    def __init__(self, device: torch.device | str) -> None:
        self._gpu = torch.device(device).type == "cuda"

    def now(self) -> Any:
        """Return this moment."""
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, begin: Any, end: Any) -> float:
        """Return the milliseconds from one moment to another, both past."""
        return float(begin.elapsed_time(end) if self._gpu else (end - begin) * 1e3)


def interleaved(
    calls: Mapping[Key, Callable[[int], object]], rounds: int, *, warm_up: int = 0
) -> dict[Key, list[float]]:
    """Return the milliseconds of every call in every round, in the order of ``calls`` within a round.

    A call is given the number of its round. Warm-up rounds come first, are not timed, and have the same numbers.
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


# Of a GPU's clock at most: a wait of so many cycles lasts no less than the seconds it stands for.
_CYCLES_A_SECOND = 2.0e9
_LONGEST_WAIT = 0.05  # seconds; what takes longer to launch than this is timed with its launches


def interleaved_on_gpu(
    calls: Mapping[Key, Callable[[int], object]], rounds: int, *, warm_up: int = 1
) -> dict[Key, list[float]]:
    """``interleaved`` by the GPU's own clock, between two events around each call: its kernels, and not its launches.

    A kernel that does nothing comes before the first event, so that the GPU is still busy with it while the call is
    being launched: for twice as long as the launches took at least. ``wall_times`` has what this leaves out. One round
    or more warms up.
    """
    # Seconds, the least so far: a call that waits for the GPU waits for that kernel too, but not the first time.
    launching: dict[Key, float] = {}
    times: dict[Key, list[float]] = {key: [] for key in calls}
    for round_ in range(-max(1, warm_up), rounds):
        events = {key: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for key in calls}
        for key, call in calls.items():
            torch.cuda.synchronize()
            wait = min(_LONGEST_WAIT, 2 * launching.get(key, 0.0))
            torch.cuda._sleep(int(_CYCLES_A_SECOND * wait))  # noqa: SLF001 - torch's benchmarks have no other
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
    """Return the median milliseconds of every call, interleaved, by the clock of a "cuda" or a "cpu" device."""
    times = (interleaved_on_gpu if device == "cuda" else interleaved)(calls, rounds, warm_up=1)
    return {key: statistics.median(each) for key, each in times.items()}


def wall_times(calls: Mapping[Key, Callable[[int], object]], rounds: int) -> dict[Key, list[float]]:
    """``interleaved`` with a GPU at rest before and after each call: launches and kernels, as a caller waits.

    Of calls that have run before: nothing warms up.
    """

    def finished(call: Callable[[int], object]) -> Callable[[int], object]:
        def run(round_: int) -> None:
            call(round_)
            torch.cuda.synchronize()

        return run

    torch.cuda.synchronize()
    return interleaved({key: finished(call) for key, call in calls.items()}, rounds)


def spread(milliseconds: Sequence[float], prefix: str = "") -> dict[str, float]:
    """Return what a row of results says of a provider's rounds, under the names that every suite gives it."""
    median, low, high = statistics.median(milliseconds), min(milliseconds), max(milliseconds)
    return {f"{prefix}median_ms": median, f"{prefix}low_ms": low, f"{prefix}high_ms": high}


def median_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Return the median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))
