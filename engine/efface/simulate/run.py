"""A run with small models: train the retain and the full model, unlearn from the full one, and evaluate all."""

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
"""Function from the title of a training to a trainer callback that shows its progress."""


def no_progress(_: str) -> TrainerCallback:
    """Return a callback that shows nothing."""
    return TrainerCallback()


@dataclass(frozen=True)
class SimulatedModel:
    """A saved model with its figures."""

    name: str  # "retain", "full", or the name of an unlearning method
    folder: str  # folder of the checkpoint
    figures: dict[str, float] = field(default_factory=dict)  # empty if the evaluation failed
    note: str = ""  # reason why the evaluation failed or the training ended early


class Simulation(ABC):
    """Base class of a run. A subclass defines how models are trained, unlearned and evaluated.

    Args:
        data: the rows.
        out: the output folder.
        progress: function that shows the progress of a training.
    """

    def __init__(self, data: SimulatedData, out: Path, progress: Progress) -> None:
        self.data, self.out, self.progress = data, out, progress

    @abstractmethod
    def teach(self, name: str, rows: Rows) -> SimulatedModel:
        """Train a new model on the rows only, and return it."""

    @abstractmethod
    def forget(self, full: SimulatedModel, way: str) -> SimulatedModel:
        """Unlearn from a copy of the full model with the method ``way``, and return the result."""

    @abstractmethod
    def examine(self, model: SimulatedModel) -> SimulatedModel:
        """Evaluate a model and return it with its figures. The first call is for retain, the baseline of the others."""

    def run(self, ways: Sequence[str]) -> list[SimulatedModel]:
        """Return the evaluated models: retain, full, and the result of each method in ``ways``."""
        retain, full = (self.teach(name, self.data.taught(name)) for name in ("retain", "full"))
        models = [retain, full, *(self.forget(full, way) for way in ways)]
        return [self.examine(model) for model in models]


def write_record(path: Path, value: Any) -> None:
    """Write a record as JSON with an atomic rename. NaN and infinities, as of a diverged model, become null."""
    write_whole(path, json.dumps(as_json(value), indent=2, allow_nan=False) + "\n")


def as_json(value: Any) -> Any:
    """Convert a value to JSON types. Tuples become lists, NaN and infinities None, and other objects text."""
    if isinstance(value, dict):
        return {name: as_json(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, type(None))) else str(value)
