"""Output of commands: results and JSON on standard output, progress bars and messages on standard error."""

import argparse
import json
import logging
import sys
import textwrap
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text
from transformers import TrainerControl, TrainerState, TrainingArguments

from efface.hf.reference.cached import ReferenceCallback
from efface.hf.text.data import DataFacts
from efface.simulate.run import as_json

PIPE_WIDTH = 160
# Seconds between progress lines in a pipe: after a change, and without a change.
PAUSE, LONG_PAUSE = 5.0, 60.0


class Screen(Console):
    """A console that wraps text between words, never inside a word, and only on a terminal."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as ``rich.console.Console`` does, but wrap strings only between words."""
        if not all(isinstance(each, (str, Text)) for each in objects):
            super().print(*objects, **options)
            return
        lines = " ".join(map(str, objects)).split("\n")
        if self.is_terminal:  # rich would break a path longer than a line
            whole: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False, "replace_whitespace": False}
            lines = [part for line in lines for part in textwrap.wrap(line, self.width, **whole) or [""]]
        super().print("\n".join(lines), **{"soft_wrap": True, **options})


def open_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Return a console. If the output is not a terminal, it is at least 160 columns wide, to fit every table."""
    console = Screen(stderr=stderr, quiet=quiet, highlight=False, markup=False)
    if not console.is_terminal:
        console.width = max(console.width, PIPE_WIDTH)
    return console


def add_json_flag(flags: argparse.ArgumentParser) -> None:
    """Add the flag ``--json``. Every command that prints a table has it."""
    flags.add_argument("--json", action="store_true", help="print one JSON document instead of a table")


def show_json(document: Any) -> None:
    """Print a document as JSON on standard output. NaN and infinities become null."""
    # print() writes nothing if there is no stdout.
    print(json.dumps(as_json(document), indent=2, ensure_ascii=False, allow_nan=False))


_HIDDEN = ("epoch", "time_", "padding_saved", "prefixes_saved", "peak_memory_gib", "npo_weight")
"""Prefixes of figures that are sent to trackers, but not printed, to keep lines short."""


class Bar:
    """The progress of a command: a transient progress bar on a terminal, a line every few seconds elsewhere.

    Args:
        console: a console on standard error.
        title: start of the line, such as the name of the model. It can be changed between stages.
    """

    def __init__(self, console: Console, title: str) -> None:
        self.console = console
        self.title = title
        self.completed, self.total = 0, 0
        self.drawn = console.is_terminal and not console.is_dumb_terminal
        self._doing, self._loss = "", ""
        self._first, self._began, self._last_line = 0, 0.0, 0.0
        self._bar: Progress | None = None
        self._ended = threading.Event()
        self._reporter: threading.Thread | None = None

    def stage(self, doing: str, total: int = 0, completed: int = 0) -> None:
        """Start a stage with a new bar.

        Args:
            doing: name of the stage.
            total: number of steps, or 0 if unknown.
            completed: steps that are already done, for example those of a resumed run.
        """
        self._doing, self._loss, self.total = doing, "", total
        self.completed = self._first = completed
        self._began = self._last_line = time.monotonic()
        if self.console.quiet:
            return
        if not self.drawn:
            self._start_reporting()
            return
        if self._bar is None:
            width = Column(max_width=40)
            columns = (TextColumn("{task.description}"), BarColumn(None, table_column=width), _State(self))
            # Redirect stdout through the bar only if both share the terminal.
            redirected = sys.stdout.isatty()
            self._bar = Progress(*columns, console=self.console, transient=True, redirect_stdout=redirected)
            stream = sys.stderr
            self._bar.start()
            _write_logs_to(sys.stderr, instead_of=stream)
        for task in self._bar.task_ids:  # a new task, because rich cannot reset a total to None
            self._bar.remove_task(task)
        self._bar.add_task(self._name(), total=total or None, completed=completed)

    def update(self, completed: int, loss: str = "") -> None:
        """Set the number of completed steps, and the loss if it is given."""
        self.completed, self._loss = completed, loss or self._loss
        self._draw()

    def follow(self, doing: str, done: int, total: int) -> None:
        """Show the progress of an evaluation: a callback of type ``efface.evaluate.runner.Progress``."""
        if (doing, total) != (self._doing, self.total):
            self.stage(doing, total, done)
        else:
            self.update(done)

    def say(self, text: str) -> None:
        """Print a line. On a terminal it appears above the bar."""
        self._last_line = time.monotonic()
        self.console.print(text, highlight=False, markup=False)

    def state(self) -> str:
        """Return completed steps, remaining time and loss as text, such as ``3 of 10, 0:07 left, loss 1.2``."""
        seconds, done = time.monotonic() - self._began, self.completed - self._first
        said = [f"{self.completed:,} of {self.total:,}" if self.total else _clock(seconds)]
        if done > 0 and self.completed < self.total:
            said.append(f"{_clock(seconds / done * (self.total - self.completed))} left")
        return ", ".join([*said, *([f"loss {self._loss}"] if self._loss else [])])

    def close(self) -> None:
        """Remove the bar. A later ``stage`` shows it again."""
        if self._bar is not None:
            bar, stream = self._bar, sys.stderr
            self._bar = None
            bar.stop()
            _write_logs_to(sys.stderr, instead_of=stream)
        if self._reporter is not None:
            self._ended.set()
            self._reporter.join()
            self._reporter = None

    def _name(self) -> str:
        return ": ".join(filter(None, (self.title, self._doing)))

    def _draw(self) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.completed)

    def _start_reporting(self) -> None:
        if self._reporter is None:
            self._ended.clear()
            self._reporter = threading.Thread(target=self._report_lines, name="efface progress", daemon=True)
            self._reporter.start()

    def _report_lines(self) -> None:
        said: tuple[str, int] | None = None
        while not self._ended.wait(PAUSE / 5):
            now, silent = (self._name(), self.completed), time.monotonic() - self._last_line
            if silent >= (PAUSE if now != said else LONG_PAUSE):
                said = now
                with suppress(OSError, ValueError):  # the reader closed the pipe
                    self.say(f"{now[0]}, {self.state()}")


class _State(ProgressColumn):
    """The column with the state of a bar. rich renders it several times a second."""

    def __init__(self, bar: Bar) -> None:
        super().__init__(Column(no_wrap=True))
        self._bar = bar

    def render(self, task: Task) -> Text:
        return Text(self._bar.state())


def _write_logs_to(stream: TextIO, *, instead_of: TextIO) -> None:
    """Move all log handlers from one stream to another, so that log lines appear above a bar, not inside it."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    for logger in loggers:
        for handler in getattr(logger, "handlers", ()):  # a logging.PlaceHolder has no handlers
            if isinstance(handler, logging.StreamHandler) and handler.stream is instead_of:
                handler.setStream(stream)


class ProgressBar(Bar, ReferenceCallback):
    """A trainer callback that shows the data, the computation of a cached reference, and the training steps.

    Args:
        console: as for ``Bar``.
        title: as for ``Bar``.
        log: also print lines about the data sets, the reference and the end of the training, and, if there is no bar,
            one line for each log of the trainer.
    """

    def __init__(self, console: Console, title: str, *, log: bool = True) -> None:
        super().__init__(console, title)
        self._log = log

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the bar."""
        if not self.drawn:
            self.say(f"{self.title}: {state.max_steps} steps")
        self.stage("", state.max_steps, state.global_step)

    def on_data(self, data: Mapping[str, DataFacts]) -> None:
        """Print one line about each data set."""
        for role, facts in data.items() if self._log else ():
            self.say(f"{self.title}: {role}, {facts}")

    def on_sharing(self, saved: float) -> None:
        """Print the share of tokens that shared prefixes save, if they save any."""
        if saved and self._log:
            self.say(f"{self.title}: shared prefixes are run once, which saves {saved:.0%} of the tokens")

    def on_reference(self, computed: int, missing: int, sequences: int) -> None:
        """Show the progress of the reference. ``computed`` counts up to ``missing``, out of ``sequences`` in all."""
        if not computed:
            if self._log:
                self.say(f"{self.title}: reference, {missing} of {sequences} sequences to compute")
            self.stage("reference", missing)
        self.update(computed)
        if computed == missing:
            self.close()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advance the bar."""
        self.update(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the loss in the bar, or print the figures as one line if there is no bar."""
        shown = {name: value for name, value in (logs or {}).items() if not name.startswith(_HIDDEN)}
        if "train_runtime" in shown:  # the last log of a run
            self.close()
            if self._log:
                loss, seconds = _short(shown.get("train_loss")), _clock(float(shown["train_runtime"]))
                self.say(f"{self.title}: {state.global_step} steps in {seconds}, loss {loss}")
            return
        self.update(state.global_step, _short(shown.get("loss", "")))
        if self._log and not self.drawn:
            figures = "  ".join(f"{name} {_short(value)}" for name, value in shown.items())
            self.say(f"step {state.global_step}  {figures}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the bar."""
        self.close()


def _short(value: Any) -> str:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    return f"{number:,.0f}" if abs(number) >= 10_000 else f"{number:.4g}"


def _clock(seconds: float) -> str:
    """Format seconds as ``1:15``, or as ``1:01:15`` from one hour on."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
