"""Where commands speak: results on standard output, what happens meanwhile on standard error."""

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
# Seconds between lines in a pipe: where something has changed, and where nothing has.
PAUSE, LONG_PAUSE = 5.0, 60.0


class Screen(Console):
    """A console that prints text as it is: on a terminal broken between words, never in one; elsewhere not at all."""

    def print(self, *objects: Any, **options: Any) -> None:
        """See rich."""
        if not all(isinstance(each, (str, Text)) for each in objects):
            super().print(*objects, **options)
            return
        lines = " ".join(map(str, objects)).split("\n")
        if self.is_terminal:  # rich would break a path that is longer than a line
            whole: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False, "replace_whitespace": False}
            lines = [part for line in lines for part in textwrap.wrap(line, self.width, **whole) or [""]]
        super().print("\n".join(lines), **{"soft_wrap": True, **options})


def open_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Return a console; in a pipe, which has no width of its own, it is wide enough for every table."""
    console = Screen(stderr=stderr, quiet=quiet, highlight=False, markup=False)
    if not console.is_terminal:
        console.width = max(console.width, PIPE_WIDTH)
    return console


def add_json_flag(flags: argparse.ArgumentParser) -> None:
    """Add ``--json``, which every command has that prints a table."""
    flags.add_argument("--json", action="store_true", help="print one JSON document instead of a table")


def show_json(document: Any) -> None:
    """Print what ``--json`` asks for: one document on standard output; JSON knows no NaN, which is null in it."""
    print(json.dumps(as_json(document), indent=2, ensure_ascii=False, allow_nan=False))  # nowhere, without an output


_QUIET = ("epoch", "time_", "padding_saved", "peak_memory_gib", "npo_weight")
"""Beginnings of figures that trackers get but a line has no room for."""


class Bar:
    """What a command is doing: on a terminal a bar, gone when it is done; elsewhere a line every few seconds.

    Args:
        console: on standard error.
        title: what it is about; may be changed meanwhile.
    """

    def __init__(self, console: Console, title: str) -> None:
        self.console = console
        self.title = title
        self.completed, self.total = 0, 0
        self.drawn = console.is_terminal and not console.is_dumb_terminal
        self._doing, self._loss = "", ""
        self._first, self._began, self._spoke = 0, 0.0, 0.0
        self._bar: Progress | None = None
        self._ended = threading.Event()
        self._speaker: threading.Thread | None = None

    def stage(self, doing: str, total: int = 0, completed: int = 0) -> None:
        """Begin something; ``total`` is 0 where nobody knows how much there is to do."""
        self._doing, self._loss, self.total = doing, "", total
        self.completed = self._first = completed
        self._began = self._spoke = time.monotonic()
        if self.console.quiet:
            return
        if not self.drawn:
            self._start_speaking()
            return
        if self._bar is None:
            width = Column(max_width=40)
            columns = (TextColumn("{task.description}"), BarColumn(None, table_column=width), _State(self))
            # A result that goes to a pipe is none of the terminal's.
            redirected = sys.stdout.isatty()
            self._bar = Progress(*columns, console=self.console, transient=True, redirect_stdout=redirected)
            stream = sys.stderr
            self._bar.start()
            _write_logs_to(sys.stderr, instead_of=stream)
        for task in self._bar.task_ids:  # rich keeps the total of one that gets none
            self._bar.remove_task(task)
        self._bar.add_task(self._name(), total=total or None, completed=completed)

    def update(self, completed: int, loss: str = "") -> None:
        """Say how much is done, and the loss if there is one."""
        self.completed, self._loss = completed, loss or self._loss
        self._draw()

    def follow(self, doing: str, done: int, total: int) -> None:
        """Show how far an evaluation is; see ``efface.evaluate.runner.Progress``."""
        if (doing, total) != (self._doing, self.total):
            self.stage(doing, total, done)
        else:
            self.update(done)

    def say(self, text: str) -> None:
        """Print a line; on a terminal, above the bar."""
        self._spoke = time.monotonic()
        self.console.print(text, highlight=False, markup=False)

    def state(self) -> str:
        """Return how much is done, the time that is left, and the loss."""
        seconds, done = time.monotonic() - self._began, self.completed - self._first
        said = [f"{self.completed:,} of {self.total:,}" if self.total else _clock(seconds)]
        if done > 0 and self.completed < self.total:
            said.append(f"{_clock(seconds / done * (self.total - self.completed))} left")
        return ", ".join([*said, *([f"loss {self._loss}"] if self._loss else [])])

    def close(self) -> None:
        """Remove the bar, also when a command broke off; another stage brings it back."""
        if self._bar is not None:
            bar, stream = self._bar, sys.stderr
            self._bar = None
            bar.stop()
            _write_logs_to(sys.stderr, instead_of=stream)
        if self._speaker is not None:
            self._ended.set()
            self._speaker.join()
            self._speaker = None

    def _name(self) -> str:
        return ": ".join(filter(None, (self.title, self._doing)))

    def _draw(self) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.completed)

    def _start_speaking(self) -> None:
        if self._speaker is None:
            self._ended.clear()
            self._speaker = threading.Thread(target=self._speak, name="efface progress", daemon=True)
            self._speaker.start()

    def _speak(self) -> None:
        said: tuple[str, int] | None = None
        while not self._ended.wait(PAUSE / 5):
            now, silent = (self._name(), self.completed), time.monotonic() - self._spoke
            if silent >= (PAUSE if now != said else LONG_PAUSE):
                said = now
                with suppress(OSError, ValueError):  # nobody reads any more
                    self.say(f"{now[0]}, {self.state()}")


class _State(ProgressColumn):
    """The state of a bar; rich asks for it several times a second."""

    def __init__(self, bar: Bar) -> None:
        super().__init__(Column(no_wrap=True))
        self._bar = bar

    def render(self, task: Task) -> Text:
        return Text(self._bar.state())


def _write_logs_to(stream: TextIO, *, instead_of: TextIO) -> None:
    """Let all log handlers that write to one stream write to another: a bar's, lest they write into the bar."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    for logger in loggers:
        for handler in getattr(logger, "handlers", ()):  # a placeholder has none
            if isinstance(handler, logging.StreamHandler) and handler.stream is instead_of:
                handler.setStream(stream)


class ProgressBar(Bar, ReferenceCallback):
    """Says what was taken of the data, then shows a cached reference being computed, then the steps of training.

    Args:
        console: as of ``Bar``.
        title: likewise.
        log: whether data and figures get lines of their own, the figures where no bar shows the loss.
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
        """Say what was taken of which data."""
        for role, facts in data.items() if self._log else ():
            self.say(f"{self.title}: {role}, {facts}")

    def on_reference(self, computed: int, missing: int, sequences: int) -> None:
        """Say what there is to compute, and show how far it is."""
        if not computed:
            if self._log:
                self.say(f"{self.title}: reference, {missing} of {sequences} sequences to compute")
            self.stage("reference", missing)
        self.update(computed)
        if computed == missing:
            self.close()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advance."""
        self.update(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the loss; where there is no bar, print the figures of a log, one line."""
        shown = {name: value for name, value in (logs or {}).items() if not name.startswith(_QUIET)}
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
    """``75.2`` as ``1:15``, and hours before that where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
