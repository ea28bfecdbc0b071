"""``efface <command>``: picks the command and turns errors into messages and exit codes.

Whatever is heavy is imported by a command's module, so that an interrupt has an end even while that goes on.
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

# command -> module and what it does; the modules are imported only when their command is called
COMMANDS = {
    "audit": ("efface.cli.audit", "ask models in many ways for what they should have forgotten"),
    "bench": ("efface.cli.bench", "measure speed and memory against rivals; needs the repository"),
    "cache": ("efface.cli.cache", "list or remove what runs keep: tokens of data sets, references"),
    "cache-reference": ("efface.cli.cache_reference", "compute the reference of a forget set once for all runs"),
    "completion": ("efface.cli.completion", "print what completes commands in bash, zsh or tcsh"),
    "demo": ("efface.cli.demo", "teach a small model, make it forget, and measure it"),
    "evaluate": ("efface.cli.evaluate", "measure what a model forgot and what it can still do: TOFU's evaluation"),
    "finetune": ("efface.cli.finetune", "teach a model a data set: full and retain models"),
    "plan": ("efface.cli.plan", "show what an epoch holds: steps, forward passes, tokens"),
    "recipes": ("efface.cli.recipes", "list the recipes, or explain one"),
    "report": ("efface.cli.report", "show evaluated runs side by side, on one page"),
    "sweep": ("efface.cli.sweep", "run a recipe with many settings, and rank the results"),
    "unlearn": ("efface.cli.unlearn", "make a checkpoint forget a data set"),
}

# Extras that a command imports packages of, in addition to "cli". ``unlearn`` needs "evaluate" for some recipes only.
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
    EXIT_FAULT: "a fault in efface, shown with its traceback; or a sweep without a finished trial",
    EXIT_USAGE: "wrong use or input, or too little memory; one line says what, where, and what to do",
    EXIT_DIVERGED: "the loss or the weights diverged; no model was written",
    EXIT_INTERRUPTED: "interrupted, by Ctrl-C or SIGTERM; the same command continues",
    EXIT_PIPE: "the reader of the output ended, as `head` does",
}

# Of TrainingArguments, which have a --debug with a value; alone it is ours.
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
    "unlearn": f"{_TRAINING}; --dry-run estimates what a run takes",
}
# Flags that every command takes, and what they do.
COMMON = {
    "--help": "show the flags of the command that are used most, and examples",
    "--help-all": "show all of its flags",
    "--debug": "show tracebacks of errors",
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
        "Results go to standard output, as JSON where a command has --json; progress and errors to standard error."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code, one of ``EXIT_CODES``.

    A message of one line stands for an error that somebody wrote a message for; one that nobody foresaw shows its
    traceback, and with ``--debug``, anywhere among the words, so do all.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    arguments, debug = _without_debug(words)
    name = arguments[0] if arguments else "--help"
    command = f"efface {name}" if name in COMMANDS else "efface"
    signals = _Signals(command, at_once=argv is None)
    if argv is None and not debug:  # the process is ours
        warnings.showwarning = lambda message, category, *_: _warn(command, message, category)
    with signals.handled():
        try:
            return _run(arguments, signals, debug=debug)
        except SystemExit as stop:  # of --help, and of rich where the reader of its output has gone
            if isinstance(stop.__context__, BrokenPipeError) or not _flushed():
                return EXIT_PIPE
            raise
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the last to see it
            if debug:
                traceback.print_exception(error)
            return _told(name, command, error, signals.came)


def _without_debug(words: Sequence[str]) -> tuple[list[str], bool]:
    """Return the words without ``--debug``, and whether it was among them."""
    following = [*words[1:], ""]
    ours = [word == "--debug" and after not in _DEBUG_OPTIONS for word, after in zip(words, following, strict=False)]
    return [word for word, taken in zip(words, ours, strict=True) if not taken], any(ours)


# Other libraries draw no bars, and transformers says nothing below an error: what it warns of when it loads a model,
# efface refuses. Read when they are imported; a user's own values hold.
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
        if "torch" in sys.modules:  # a command without it has no other processes, and is instant
            importlib.import_module("efface.processes").leave()
    return code if _flushed() else EXIT_PIPE


def _told(name: str, command: str, error: BaseException, interrupted: bool) -> int:
    """Say what went wrong, and return the exit code."""
    # An interrupt in the middle of an extension's work can come out as an error of that.
    if interrupted or isinstance(error, KeyboardInterrupt):
        _say(f"{command}: interrupted")
        return EXIT_INTERRUPTED
    if isinstance(error, BrokenPipeError) and _nobody_reads():
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
    if isinstance(error, ModuleNotFoundError):  # of a package that can be installed
        meant = not str(error.name).startswith("efface")
    if meant or isinstance(error, OSError):
        _say(f"{command}: error: {in_words(error)}")
        return EXIT_USAGE
    traceback.print_exception(error)
    fault = f"{type(error).__name__}: {one_line(str(error))}".removesuffix(": ")
    _say(f"{command}: fault: {fault}; this is an error of efface itself: please report it, with the lines above")
    return EXIT_FAULT


def _warn(command: str, message: Warning | str, category: type[Warning]) -> None:
    """Show a warning as one line; those about code are for whoever writes it."""
    if not issubclass(category, (DeprecationWarning, FutureWarning, PendingDeprecationWarning)):
        _say(f"{command}: warning: {one_line(str(message))}")


def _say(line: str) -> None:
    with suppress(OSError):  # nobody reads it
        print(line, file=sys.stderr, flush=True)


def _flushed() -> bool:
    """Write what is still to be written; return whether there is somebody to read it."""
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


def _nobody_reads() -> bool:
    """Whether the output is a pipe whose reader has gone: another pipe may be the broken one."""
    try:
        poll = select.poll()
        for file in (sys.stdout, sys.stderr):
            poll.register(file.fileno(), 0)  # the error condition is always told
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # Windows has no poll; a closed or an imagined file
        return True


def _drop_output() -> None:
    """Let the interpreter's last flush go nowhere, instead of failing again."""
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


class _Signals:
    """Lets SIGTERM end a command as Ctrl-C does, so that what is half written is cleared away; remembers that one came.

    Args:
        command: the words of the message.
        at_once: whether the process may be ended while modules are imported. An exception there may be caught, or come
            out as another, by whoever imports; and there is nothing to clear away.
    """

    def __init__(self, command: str, *, at_once: bool) -> None:
        self.came = False
        self._command, self._at_once = command, at_once
        self._imports = False
        self._handles, self._number = True, int(signal.SIGINT)

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle them until the block ends."""
        before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():  # only there does Python allow handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # ignored, as under a shell's &; not ours
                    before[number] = signal.signal(number, self._interrupt)
        hook = sys.unraisablehook
        sys.unraisablehook = lambda lost: self._again() if isinstance(lost.exc_value, KeyboardInterrupt) else hook(lost)
        try:
            yield
        finally:
            self._handles = False
            sys.unraisablehook = hook
            for number, handler in before.items():
                signal.signal(number, handler)

    def _again(self) -> None:
        """Interrupt once more, a moment later: Python drops what is raised in a ``__del__``, which it runs anywhere."""
        again = threading.Timer(_AGAIN_SECONDS, self._send)
        again.daemon = True
        again.start()

    def _send(self) -> None:
        if not self._handles:
            return
        if hasattr(signal, "pthread_kill"):  # wakes what waits there, too; Windows has none
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
        """Mark what imports."""
        self._imports = True
        try:
            yield
        finally:
            self._imports = False
