"""The entry point ``efface <command>``: dispatch to a command, and conversion of errors to messages and exit codes.

This module imports only light modules. The module of a command imports the heavy ones (torch, transformers) after the
signal handlers are installed, so Ctrl-C and SIGTERM end the process during those imports too.
"""

import importlib
import os
import select
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import efface
from efface.errors import in_words, on_purpose, one_line, out_of_memory
from efface.extras import check_extras

# command -> (module, summary). A module is imported only when its command is called.
COMMANDS = {
    "audit": ("efface.cli.audit", "prompt models in several ways and measure how much of the forget set they reveal"),
    "bench": ("efface.cli.bench", "measure speed and memory against other implementations; needs the repository"),
    "cache": ("efface.cli.cache", "list or remove cached tokens, reference log-probabilities and small trained models"),
    "cache-reference": (
        "efface.cli.cache_reference",
        "compute the reference log-probabilities of a forget set once for all runs",
    ),
    "completion": ("efface.cli.completion", "print a completion script for bash, zsh or tcsh"),
    "demo": ("efface.cli.demo", "train a small model, unlearn part of its data, and evaluate the result"),
    "evaluate": (
        "efface.cli.evaluate",
        "measure what a model forgot and what it still knows: TOFU, FAME and other metrics",
    ),
    "finetune": ("efface.cli.finetune", "fine-tune a model on a data set, to make full and retain models"),
    "plan": ("efface.cli.plan", "show the steps, forward passes and tokens of an epoch"),
    "recipes": ("efface.cli.recipes", "list the recipes, or show one"),
    "report": ("efface.cli.report", "compare evaluated runs on one HTML page"),
    "sweep": ("efface.cli.sweep", "run a recipe with many settings and rank the results"),
    "unlearn": ("efface.cli.unlearn", "make a checkpoint forget a data set"),
}

# Command -> extras that it requires in addition to "cli". ``unlearn`` requires "evaluate" only for some recipes.
_EXTRAS = {
    "audit": ("evaluate",),
    "demo": ("evaluate", "report"),
    "evaluate": ("evaluate",),
    "report": ("evaluate", "report"),
    "sweep": ("evaluate", "report", "sweep"),
}

EXIT_FAULT = 1
EXIT_USAGE = 2
EXIT_DIVERGED = 3
EXIT_INTERRUPTED = 130
EXIT_PIPE = 141
_AGAIN_SECONDS = 0.01

EXIT_CODES = {
    0: "done",
    EXIT_FAULT: "a bug in efface, shown with its traceback; or a sweep in which no trial finished",
    EXIT_USAGE: "invalid flags or input, or too little memory; one line names the problem and the remedy",
    EXIT_DIVERGED: "the loss or the weights diverged; no model was written",
    EXIT_INTERRUPTED: "interrupted by Ctrl-C or SIGTERM; run the same command again to continue",
    EXIT_PIPE: "the reader of the output closed the pipe, as `head` does",
}

# transformers.TrainingArguments has a --debug flag with these values. --debug without one of them is efface's own flag.
_DEBUG_OPTIONS = ("underflow_overflow", "tpu_metrics_debug")
_TRAINING = (
    "lower --token-budget or --chunk-rows, add --gradient-checkpointing True, or load the model with --dtype bfloat16"
)
_LESS_MEMORY = {
    "audit": "lower --token-budget or --samples, or load the models with --dtype bfloat16",
    "cache-reference": "lower --token-budget or --chunk-rows, or load the model with --dtype bfloat16",
    "demo": "add --scale smoke",
    "evaluate": "lower --token-budget, or load the model with --dtype bfloat16",
    "finetune": _TRAINING,
    "sweep": _TRAINING,
    "unlearn": f"{_TRAINING}; --dry-run estimates the memory of a run",
}
# Flags of every command, with their help texts.
COMMON = {
    "--help": "show the most used flags of the command, and examples",
    "--help-all": "show all flags of the command",
    "--debug": "show the traceback of an error",
}


def _listed(lines: Mapping[Any, str]) -> str:
    width = max(len(str(name)) for name in lines)
    return "\n".join(f"  {name!s:<{width}}  {text}" for name, text in lines.items())


def _help() -> str:
    return (
        "usage: efface [--version] <command> [flags]\n\n"
        "Fast, exact unlearning for Hugging Face causal language models.\n\n"
        f"commands:\n{_listed({name: summary for name, (_, summary) in COMMANDS.items()})}\n\n"
        f"flags of every command:\n{_listed(COMMON)}\n\n"
        f"exit codes:\n{_listed(EXIT_CODES)}\n\n"
        "Results go to standard output, as JSON with --json. Progress and errors go to standard error."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code, one of ``EXIT_CODES``.

    An error with a message written for users is printed as one line. Any other error is printed with its traceback.
    With ``--debug`` anywhere on the command line, every error is printed with its traceback.

    Args:
        argv: the words after ``efface``; None reads ``sys.argv``.

    Raises:
        SystemExit: after ``--help``, as argparse does.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    arguments, debug = _without_debug(words)
    name = arguments[0] if arguments else "--help"
    command = f"efface {name}" if name in COMMANDS else "efface"
    signals = _Signals(command, at_once=argv is None)
    if argv is None and not debug:  # efface was called as a program, not from another program
        warnings.showwarning = lambda message, category, *_: _warn(command, message, category)
    with signals.handled():
        try:
            return _run(arguments, signals, debug=debug)
        except SystemExit as stop:  # raised by --help, and by rich if the reader closed the pipe
            if isinstance(stop.__context__, BrokenPipeError) or not _flushed():
                return EXIT_PIPE
            raise
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the top level reports every error
            if debug:
                traceback.print_exception(error)
            return _report(name, command, error, signals.came)


def _without_debug(words: Sequence[str]) -> tuple[list[str], bool]:
    """Return the words without efface's ``--debug``, and whether it was given."""
    following = [*words[1:], ""]
    ours = [word == "--debug" and after not in _DEBUG_OPTIONS for word, after in zip(words, following, strict=False)]
    return [word for word, taken in zip(words, ours, strict=True) if not taken], any(ours)


# Turn off the progress bars of other libraries, and the warnings of transformers: efface raises an error where
# transformers would warn while it loads a model. The libraries read these variables when they are imported. Values that
# the user has set stay.
_QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


def _run(arguments: Sequence[str], signals: "_Signals", *, debug: bool) -> int:
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help", "--version"):
        print(f"efface {efface.__version__}" if name == "--version" else _help())
        code = 0 if arguments else EXIT_USAGE
    elif name not in COMMANDS:
        raise ValueError(f"unknown command {name!r}; expected one of {', '.join(COMMANDS)}")
    else:
        for variable, value in () if debug else _QUIET.items():
            os.environ.setdefault(variable, value)
        check_extras(f"efface {name}", "cli", *_EXTRAS.get(name, ()))
        with signals.importing():
            module = importlib.import_module(COMMANDS[name][0])
        code = int(module.run(rest))
        if "torch" in sys.modules:  # without torch there is no process group to leave
            importlib.import_module("efface.processes").leave()
    return code if _flushed() else EXIT_PIPE


def _report(name: str, command: str, error: BaseException, interrupted: bool) -> int:
    """Print the message of an error and return the exit code."""
    # A C extension that is interrupted can raise an error of another type.
    if interrupted or isinstance(error, KeyboardInterrupt):
        _say(f"{command}: interrupted")
        return EXIT_INTERRUPTED
    if isinstance(error, BrokenPipeError) and _reader_has_gone():
        _drop_output()
        return EXIT_PIPE
    if out_of_memory(error):
        said = f"{in_words(error)}; {_LESS_MEMORY.get(name, 'close other programs, or use a larger machine')}"
        _say(f"{command}: error: out of memory: {said}")
        return EXIT_USAGE
    if isinstance(error, FloatingPointError):
        _say(f"{command}: error: {one_line(str(error))}")
        return EXIT_DIVERGED
    meant = isinstance(error, (ValueError, TypeError, ImportError)) and on_purpose(error)
    if isinstance(error, ModuleNotFoundError):  # the user can install a missing package
        meant = not str(error.name).startswith("efface")
        if error.name == "efface_native":
            error = ImportError("the extension efface_native is not built; run `pip install -e .` in the checkout")
            meant = True
    if meant or isinstance(error, OSError):
        _say(f"{command}: error: {in_words(error)}")
        return EXIT_USAGE
    traceback.print_exception(error)
    fault = f"{type(error).__name__}: {one_line(str(error))}".removesuffix(": ")
    _say(f"{command}: fault: {fault}; this is a bug in efface: please report it with the lines above")
    return EXIT_FAULT


def _warn(command: str, message: Warning | str, category: type[Warning]) -> None:
    """Print a warning as one line, except deprecation warnings: they are for developers, not for users."""
    if not issubclass(category, (DeprecationWarning, FutureWarning, PendingDeprecationWarning)):
        _say(f"{command}: warning: {one_line(str(message))}")


def _say(line: str) -> None:
    with suppress(OSError):  # stderr is closed
        print(line, file=sys.stderr, flush=True)


def _flushed() -> bool:
    """Flush stdout. Return False if the reader has closed the pipe."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()
        return False
    except OSError:
        _drop_output()
        raise
    return True


def _reader_has_gone() -> bool:
    """Return whether stdout or stderr is a pipe that its reader has closed; the broken pipe can be another one."""
    try:
        poll = select.poll()
        for file in (sys.stdout, sys.stderr):
            poll.register(file.fileno(), 0)  # POLLERR is always reported
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # Windows has no poll; the file is closed or has no descriptor
        return True


def _drop_output() -> None:
    """Redirect stdout to the null device, so that the interpreter's last flush does not fail again."""
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


class _Signals:
    """Signal handlers that raise KeyboardInterrupt on SIGINT and SIGTERM, so that partial files are removed.

    ``came`` is True after the first signal.

    Args:
        command: the start of the message, such as ``efface unlearn``.
        at_once: exit the process immediately if a signal arrives during imports. A module that imports others can catch
            the exception or replace it by another, and no partial files exist yet.
    """

    def __init__(self, command: str, *, at_once: bool) -> None:
        self.came = False
        self._command, self._at_once = command, at_once
        self._imports = False
        self._handles, self._number = True, int(signal.SIGINT)

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Install the handlers until the block ends."""
        before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only in it
            for number in (signal.SIGINT, signal.SIGTERM):
                # leave a signal alone that is ignored, as by nohup, or handled outside Python
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    before[number] = signal.signal(number, self._interrupt)
        hook = sys.unraisablehook
        sys.unraisablehook = lambda lost: (
            self._resend() if isinstance(lost.exc_value, KeyboardInterrupt) else hook(lost)
        )
        try:
            yield
        finally:
            self._handles = False
            sys.unraisablehook = hook
            for number, handler in before.items():
                signal.signal(number, handler)

    def _resend(self) -> None:
        """Send the signal again after 10 ms, because Python discards an exception that is raised in a ``__del__``.

        Python runs ``__del__`` methods at any point, so the handler can run inside one.
        """
        again = threading.Timer(_AGAIN_SECONDS, self._send)
        again.daemon = True
        again.start()

    def _send(self) -> None:
        if not self._handles:
            return
        if hasattr(signal, "pthread_kill"):  # also wakes a system call that waits; Windows has none
            signal.pthread_kill(threading.main_thread().ident or 0, self._number)
        else:
            signal.raise_signal(self._number)

    def _interrupt(self, number: int, _: object) -> None:
        self.came, self._number = True, number
        if self._imports and self._at_once:
            with suppress(OSError):
                os.write(2, f"{self._command}: interrupted\n".encode())
            os._exit(EXIT_INTERRUPTED)
        raise KeyboardInterrupt

    @contextmanager
    def importing(self) -> Iterator[None]:
        """Mark the block as importing modules."""
        self._imports = True
        try:
            yield
        finally:
            self._imports = False
