"""One run: teach a model what is kept and another everything, make that one forget, and examine all of them."""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from efface.files import write_whole
from efface.simulate.data import Rows, SimulatedData

Progress = Callable[[str], TrainerCallback]
"""Returns what shows the progress of a training of that title."""


def no_progress(_: str) -> TrainerCallback:
    """Show nothing."""
    return TrainerCallback()


@dataclass(frozen=True)
class SimulatedModel:
    """A model on the disk."""

    name: str  # "retain", "full", or what made the full one forget
    folder: str  # where it lies
    figures: dict[str, float] = field(default_factory=dict)  # none where it could not be examined
    note: str = ""  # why not, or why its training ended early


class Simulation(ABC):
    """The run of a command, which says how a model is taught, made to forget and examined."""

    def __init__(self, data: SimulatedData, out: Path, progress: Progress) -> None:
        self.data, self.out, self.progress = data, out, progress

    @abstractmethod
    def teach(self, name: str, rows: Rows) -> SimulatedModel:
        """Return the model of a name, which knows the rows and nothing else."""

    @abstractmethod
    def forget(self, full: SimulatedModel, way: str) -> SimulatedModel:
        """Return the full model after it was made to forget in a way."""

    @abstractmethod
    def examine(self, model: SimulatedModel) -> SimulatedModel:
        """Return the model with its figures; the retain model, with which the others are compared, comes first."""

    def run(self, ways: Sequence[str]) -> list[SimulatedModel]:
        """Return the retain model, the full one, and what became of it in each way, examined."""
        retain, full = (self.teach(name, self.data.taught(name)) for name in ("retain", "full"))
        models = [retain, full, *(self.forget(full, way) for way in ways)]
        return [self.examine(model) for model in models]


def write_record(path: Path, value: Any) -> None:
    """Write a record as JSON, which knows no NaN: what a collapsed model may have as a figure is null."""
    write_whole(path, json.dumps(as_json(value), indent=2, allow_nan=False) + "\n")


def as_json(value: Any) -> Any:
    """Return a value as JSON gives it back."""
    if isinstance(value, dict):
        return {name: as_json(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, type(None))) else str(value)
