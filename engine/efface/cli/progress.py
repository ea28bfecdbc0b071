"""Where commands speak: results on standard output, what happens meanwhile on standard error."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerControl, TrainerState, TrainingArguments

from efface.hf.reference.cached import ReferenceCallback
from efface.hf.text.data import DataFacts

PIPE_WIDTH = 160


def open_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Return a console; in a pipe, which has no width of its own, it is wide enough for every table."""
    console = Console(stderr=stderr, quiet=quiet)
    if not console.is_terminal:
        console.width = max(console.width, PIPE_WIDTH)
    return console


_QUIET = ("epoch", "time_", "padding_saved", "peak_memory_gib", "npo_weight")
"""Beginnings of figures that trackers get but a line has no room for."""


def progress_on(console: Console) -> Progress:
    """Return a bar, not started: on a terminal alone, and gone when it ends."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


class ProgressBar(ReferenceCallback):
    """Says what was taken of the data, then shows a cached reference being computed, then the steps of training.

    The title can be changed meanwhile.
    """

    def __init__(self, console: Console, title: str, *, log: bool = True) -> None:
        self._console = console
        self._log = log
        self.title = title
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the bar."""
        if not self._console.is_terminal:
            self._console.print(f"{self.title}: {state.max_steps} steps")
        self._start(self.title, state.max_steps, state.global_step)

    def on_data(self, data: Mapping[str, DataFacts]) -> None:
        """Say what was taken of which data."""
        for role, facts in data.items() if self._log else ():
            self._console.print(f"{self.title}: {role}, {facts}", highlight=False, markup=False, soft_wrap=True)

    def on_reference(self, computed: int, missing: int, sequences: int) -> None:
        """Say what there is to compute, and show how far it is."""
        if not computed:
            if self._log:
                counts = f"{missing} of {sequences} sequences to compute"
                self._console.print(f"{self.title}: reference, {counts}", highlight=False, soft_wrap=True)
            self._start(f"{self.title}: reference", missing, 0)
        elif self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=computed)
        if computed == missing:
            self.close()

    def _start(self, title: str, total: int, completed: int) -> None:
        self._progress = progress_on(self._console)
        self._progress.start()
        self._task = self._progress.add_task(title, total=total, completed=completed)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advance."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print the figures of a log, one line."""
        if not self._log:
            return
        shown = {name: value for name, value in (logs or {}).items() if not name.startswith(_QUIET)}
        figures = "  ".join(f"{name} {_short(value)}" for name, value in shown.items())
        self._console.print(f"step {state.global_step}  {figures}", highlight=False, soft_wrap=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the bar."""
        self.close()

    def close(self) -> None:
        """Remove the bar, also when a run broke off."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _short(value: Any) -> str:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    return f"{number:,.0f}" if abs(number) >= 10_000 else f"{number:.4g}"
