"""Interleaved timing: every call once a round, so that a slow moment of the machine slows all of them."""

import statistics
import subprocess
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)


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


def interleaved_on_gpu(
    calls: Mapping[Key, Callable[[int], object]], rounds: int, *, warm_up: int = 0
) -> dict[Key, list[float]]:
    """``interleaved`` by the GPU's own clock: between two events around each call, read after the round."""
    times: dict[Key, list[float]] = {key: [] for key in calls}
    for round_ in range(-warm_up, rounds):
        events = {key: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for key in calls}
        for key, call in calls.items():
            torch.cuda.synchronize()  # so that no call hides its launches behind the one before
            events[key][0].record()
            call(round_)
            events[key][1].record()
        torch.cuda.synchronize()
        for key, (begin, end) in events.items():
            if round_ >= 0:
                times[key].append(begin.elapsed_time(end))
    return times


def median_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Return the median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def gpu_clocks() -> str:
    """Return the first GPU's clock, power and temperature at this moment, as its tool says them."""
    fields = "clocks.sm,power.draw,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
