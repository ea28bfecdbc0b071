"""Where the time of a step goes, without making the device wait for the host."""

import time
from typing import Any

import torch

PHASES = ("forward", "backward", "optimizer", "data")


class PhaseClock:
    """Adds up seconds by phase: each ``end`` gives the time since the last mark to a phase.

    On a CUDA device marks are events in its stream, looked at only by ``read``: a phase costs what the device spent on
    it, and waiting for data counts only as far as the device had nothing else left to do.
    """

    def __init__(self) -> None:
        self._cuda = False
        self._last: Any = None
        self._spans: list[tuple[str, Any, Any]] = []

    def begin(self, device: torch.device) -> None:
        """Set a mark."""
        self._cuda = device.type == "cuda"
        self._last = self._now()

    def end(self, phase: str) -> None:
        """Give the time since the last mark to ``phase``, and set a mark. Without a mark, nothing happens."""
        if self._last is not None:
            now = self._now()
            self._spans.append((phase, self._last, now))
            self._last = now

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> dict[str, float]:
        """Return the seconds of each phase since the last call; waits for the device's last mark."""
        seconds = dict.fromkeys(PHASES, 0.0)
        if self._spans and self._cuda:
            self._spans[-1][2].synchronize()
        for phase, start, stop in self._spans:
            seconds[phase] += start.elapsed_time(stop) / 1000 if self._cuda else stop - start
        self._spans = []
        return seconds
