"""The parts of a training step, by the device's own clock."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.timing import Clock
from efface.hf.model.adapted_head import base_of
from efface.hf.model.packing import decoder_of

PARTS = ("forward", "reference", "head", "backward", "update")
"""The policy's decoder; the frozen model's; heads and losses; backward; clipping and AdamW. In milliseconds."""


class Stopwatch:
    """Keeps moments while steps run, and makes times of them when read: on a GPU it never waits for a step."""

    def __init__(self, device: torch.device | str) -> None:
        self._gpu = torch.device(device).type == "cuda"
        self._clock = Clock(device)
        self._steps: list[list[tuple[str, Any, Any]]] = []
        self._spans: list[tuple[str, Any, Any]] = []

    def follow(self, *models: Any) -> None:
        """Time the decoders of the models: "reference" where no gradients are kept, else "forward"."""
        begun: list[Any] = []

        def begin(*_: object) -> None:
            begun.append(self._clock.now())

        def end(*_: object) -> None:
            part = "forward" if torch.is_grad_enabled() else "reference"
            self._spans.append((part, begun.pop(), self._clock.now()))

        for model in models:
            decoder = decoder_of(base_of(model))
            decoder.register_forward_pre_hook(begin)
            decoder.register_forward_hook(end)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time what is within."""
        begin = self._clock.now()
        yield
        self._spans.append((name, begin, self._clock.now()))

    def end_step(self) -> None:
        """What follows belongs to the next step."""
        self._steps.append(self._spans)
        self._spans = []

    def read(self) -> list[dict[str, float]]:
        """Return the milliseconds of ``PARTS`` in every step since the last reading."""
        if self._gpu:
            torch.cuda.synchronize()
        steps, self._steps = self._steps, []
        return [self._parts(spans) for spans in steps]

    def _parts(self, spans: list[tuple[str, Any, Any]]) -> dict[str, float]:
        times = dict.fromkeys(("loss", *PARTS), 0.0)
        for name, begin, end in spans:
            times[name] += self._clock.between(begin, end)
        times["head"] = times.pop("loss") - times["forward"] - times["reference"]
        return times
