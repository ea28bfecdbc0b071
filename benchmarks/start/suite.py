"""The start-up suite: imports, ``efface --help`` and the first training step, each in a new process.

The tasks are interleaved, with files in the page cache. The time that efface adds is its time minus that of the
libraries it imports, in the same round.
"""

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.harness.report import Report, cells
from benchmarks.harness.timing import interleaved, spread

ROUNDS = 5
ROOT = Path(__file__).resolve().parents[2]
_FIRST_STEP = str(Path(__file__).with_name("first_step.py"))

# task -> arguments of a Python process, and the task that it is compared with
TASKS: dict[str, tuple[list[str], str | None]] = {
    "python": (["-c", ""], None),
    "import torch": (["-c", "import torch"], "python"),
    "import transformers": (["-c", "import transformers"], "python"),
    "import efface": (["-c", "import efface"], "import torch"),
    "transformers.Trainer, imported": (["-c", "from transformers import Trainer"], "import transformers"),
    "efface.UnlearnTrainer, imported": (["-c", "from efface import UnlearnTrainer"], "transformers.Trainer, imported"),
    "efface --help": (["-m", "efface", "--help"], "import torch"),
    "transformers.Trainer, first step done": ([_FIRST_STEP, "transformers"], None),
    "efface.UnlearnTrainer, first step done": ([_FIRST_STEP, "efface"], "transformers.Trainer, first step done"),
}
SHAPES = {"smoke": ("python", "import torch", "import efface", "efface --help"), "all": tuple(TASKS)}


@dataclass
class StartRow:
    """One task. Times are in milliseconds, from the start of the process to its end."""

    task: str
    median_ms: float
    low_ms: float
    high_ms: float
    compared_with: str | None
    above_ms: float | None  # median over rounds of the difference
    rounds_ms: list[float] = field(repr=False)


def measure(tasks: tuple[str, ...], rounds: int) -> list[StartRow]:
    """Time the tasks in new processes, one per task and round.

    Raises:
        subprocess.CalledProcessError: a task fails.
    """
    times = interleaved({task: process(TASKS[task][0]) for task in tasks}, rounds, warm_up=1)
    rows = []
    for task, own in times.items():
        other = TASKS[task][1]
        above = None
        if other in times:
            above = statistics.median(a - b for a, b in zip(own, times[other], strict=True))
        rows.append(StartRow(task=task, **spread(own), compared_with=other, above_ms=above, rounds_ms=own))
    return rows


def process(arguments: list[str]) -> Callable[[int], object]:
    """Return a call that runs Python to its end with these arguments and this checkout's packages on the path."""
    paths = [str(ROOT / "engine"), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *arguments]
    return lambda _: subprocess.run(command, env=environment, check=True, capture_output=True)


def run(options: argparse.Namespace, report: Report) -> None:
    rows = [row for name in options.shape for row in measure(SHAPES[name], options.rounds)]
    report.save(start=rows)
    report.table(
        f"a new process each, {options.rounds} rounds",
        ("task", "median ms", "low", "high", "above", "compared with"),
        [_cells(row) for row in rows],
    )


def _cells(row: StartRow) -> list[str]:
    above = ["", ""] if row.above_ms is None else [f"{row.above_ms:.0f}", row.compared_with or ""]
    return [row.task, *cells(".0f", row.median_ms, row.low_ms, row.high_ms), *above]
