"""Tests of how a command ends: messages, bugs, out of memory, interrupts, and a closed pipe."""

import errno
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pytest
import torch

from efface.batching import plan_epoch
from efface.cli import main as command_line
from efface.cli.main import COMMANDS, EXIT_CODES, main
from efface.errors import in_words, on_purpose, one_line, out_of_memory, reading
from efface.hf.train.arguments import UnlearnArguments

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _not_in_the_background() -> Iterator[None]:
    """Restore SIGINT: a shell makes background processes ignore Ctrl-C, and their children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def raised(call: Callable[[], Any]) -> BaseException:
    try:
        call()
    except Exception as error:  # noqa: BLE001 - any error
        return error
    raise AssertionError


def raising(error: BaseException) -> Callable[..., NoReturn]:
    def run(*_: Any) -> NoReturn:
        raise error

    return run


def planned(**changes: Any) -> Any:
    lengths = np.ones(3, np.int32)
    options = {"pairs_per_step": 1, "token_budget": 10, "world_size": 1, "seed": 0, "epoch": 0, **changes}
    return plan_epoch(lengths, lengths, **options)


@pytest.mark.parametrize(
    ("call", "meant"),
    [
        (raising(ValueError("x")), True),
        (lambda: json.loads(""), True),  # raised by a library
        (lambda: planned(world_size=0), True),  # raised by the C++ core
        (lambda: int("x"), False),
        (lambda: len(None), False),  # type: ignore[arg-type]
        (lambda: dict([1]), False),  # type: ignore[list-item]
        (lambda: {}["x"], False),
        (lambda: None.x, False),  # type: ignore[attr-defined]
        (lambda: torch.ones(2) + torch.ones(3), False),
        (lambda: np.array([1, [2]], np.float64), False),  # type: ignore[list-item]
        (b"\xff".decode, False),
    ],
)
def test_errors_with_a_written_message_are_told_from_bugs(call: Callable[[], Any], meant: bool) -> None:
    assert on_purpose(raised(call)) is meant


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Return a function that runs `efface unlearn` with the given ``run``, and returns the exit code and stderr."""

    def end(run: Callable[..., Any], *words: str) -> tuple[int, str]:
        monkeypatch.setitem(sys.modules, "a_command", SimpleNamespace(run=run))  # type: ignore[arg-type]
        monkeypatch.setitem(COMMANDS, "unlearn", ("a_command", ""))
        return main(["unlearn", *words]), capsys.readouterr().err

    return end


@pytest.mark.parametrize(
    ("run", "code", "said"),
    [
        (raising(ValueError("`a`: expected\n  b, got c")), 2, "error: `a`: expected b, got c"),
        (raising(TypeError("expected rows")), 2, "error: expected rows"),
        (lambda _: open("nowhere"), 2, "error: 'nowhere': No such file or directory"),  # noqa: PTH123, SIM115
        (raising(OSError("no \x1b[1mconnection\x1b[0m\0")), 2, r"error: no connection\x00"),
        (lambda _: importlib.import_module("nowhere_"), 2, "error: No module named 'nowhere_'"),
        (raising(FloatingPointError("the loss is not finite")), 3, "error: the loss is not finite"),
        (raising(KeyboardInterrupt()), 130, "interrupted"),
        (raising(MemoryError()), 2, "error: out of memory: MemoryError; lower --token-budget"),
        (lambda _: torch.empty(1 << 60), 2, "error: out of memory: "),
        (
            raising(torch.OutOfMemoryError("CUDA out of memory. Tried")),
            2,
            "error: out of memory: OutOfMemoryError: CUDA",
        ),
        (raising(OSError(errno.ENOMEM, "Cannot allocate memory")), 2, "error: out of memory: "),
        (raising(ImportError("libtorch.so: failed to map segment from shared object")), 2, "error: out of memory: "),
    ],
)
def test_a_message_is_one_line(
    run: Callable[..., Any], code: int, said: str, ends: Callable[..., tuple[int, str]]
) -> None:
    found, line = ends(run)
    assert found == code
    assert line.startswith(f"efface unlearn: {said}")
    assert line.count("\n") == 1
    assert "Traceback" in ends(run, "--debug")[1]


@pytest.mark.parametrize(
    "run",
    [
        lambda _: int("x"),
        lambda _: len(None),  # type: ignore[arg-type]
        lambda _: {}["x"],
        raising(RuntimeError("x")),
        raising(AssertionError()),
        lambda _: importlib.import_module("efface.nothing"),
    ],
)
def test_a_bug_keeps_its_traceback(run: Callable[..., Any], ends: Callable[..., tuple[int, str]]) -> None:
    code, said = ends(run)
    assert code == 1
    assert said.startswith("Traceback")
    last = said.splitlines()[-1]
    assert last.startswith("efface unlearn: fault: ")
    assert "report it" in last


def test_debug_is_taken_from_anywhere(ends: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    for words in (["--debug", "--a", "b"], ["--a", "--debug", "b"], ["--a", "b", "--debug"]):
        assert ends(lambda words: seen.append(list(words)) or 0, *words) == (0, "")
    assert seen == [["--a", "b"]] * 3
    ends(lambda words: seen.append(list(words)) or 0, "--debug", "underflow_overflow")  # a flag of TrainingArguments
    assert seen[-1] == ["--debug", "underflow_overflow"]
    assert main(["--debug", "--version"]) == 0


def test_every_exit_code_is_documented() -> None:
    codes = {value for name, value in vars(command_line).items() if name.startswith("EXIT_") and name != "EXIT_CODES"}
    assert codes | {0} == set(EXIT_CODES)


def test_errors_of_parsers_get_a_remedy(tmp_path: Path) -> None:
    def read(call: Callable[[], Any]) -> None:
        with reading("'f'", "JSON", "write it anew"):
            call()

    with pytest.raises(ValueError, match=r"^'f': expected JSON, got something else \(Expecting value: .*\); write it"):
        read(lambda: json.loads(""))
    with pytest.raises(ValueError, match=r"expected JSON, got something else \(RecursionError: "):
        read(lambda: json.loads("[" * 100_000))
    with pytest.raises(FileNotFoundError, match="gone"):
        read((tmp_path / "gone").read_text)
    with pytest.raises(MemoryError):
        read(raising(MemoryError()))

    def longest() -> None:
        json.loads("[] " + "x" * 1000, object_hook=None, cls=None, parse_float=raising(ValueError("x" * 1000)))

    assert len(str(raised(lambda: read(longest)))) < 500
    code = compile("def fault(): return {}['x']", "f", "exec")
    names: dict[str, Any] = {"__name__": "efface.somewhere"}
    exec(code, names)
    with pytest.raises(KeyError):  # raised by our own code: it stays a bug
        read(names["fault"])


def test_words_of_errors() -> None:
    assert in_words(KeyError("x")) == "KeyError: 'x'"
    assert in_words(RuntimeError("a\n b")) == "a b"
    assert in_words(EOFError()) == "EOFError"
    assert one_line("a\tb\u2028c\x07") == r"a b c\x07"
    assert not out_of_memory(ValueError("out of memory"))


def test_a_warning_is_one_line(tmp_path: Path) -> None:
    module = """
import warnings
def run(words):
    warnings.warn("the cache\\ncannot be used", stacklevel=2)
    warnings.warn("for programmers", FutureWarning, stacklevel=2)
    return 0
"""
    process = program(tmp_path, module)
    assert process.communicate(timeout=60) == ("", "efface plan: warning: the cache cannot be used\n")
    assert process.returncode == 0


def test_signals_end_every_command(ends: Callable[..., tuple[int, str]]) -> None:
    """Also if an extension raises a different error for the interrupt."""
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

    def run(number: int) -> None:
        try:
            os.kill(os.getpid(), number)
            signal.sigtimedwait([], 1)
        except KeyboardInterrupt:
            raise ImportError("initialization failed") from None

    for number in (signal.SIGTERM, signal.SIGINT):
        assert ends(lambda _, number=number: run(number)) == (130, "efface unlearn: interrupted\n")
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_full_or_missing_stdout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Help on a full disk is an error, which argparse alone would ignore. Without a stdout, nothing is printed."""
    with Path("/dev/full").open("w", buffering=1) as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["plan", "--help"]) == 2
        monkeypatch.setattr(sys, "stdout", None)
        with suppress(OSError):
            full.close()
    assert main(["recipes", "--json"]) == 0


class Dropping:
    """An object whose ``__del__`` raises; Python prints and ignores such exceptions."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.kill(os.getpid(), self.number)
        signal.sigtimedwait([], 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_that_python_drops_is_raised_again(number: int, ends: Callable[..., tuple[int, str]]) -> None:
    hook = sys.unraisablehook

    def run(_: Any) -> int:
        Dropping(number)
        signal.sigtimedwait([], 5)
        return 0

    assert ends(run) == (130, "efface unlearn: interrupted\n")
    assert sys.unraisablehook is hook


def program(folder: Path, module: str, **options: Any) -> "subprocess.Popen[str]":
    """Start `efface plan` as a subprocess with the given text as its module."""
    (folder / "a_command.py").write_text(module)
    code = "import sys; from efface.cli import main as m; m.COMMANDS['plan'] = ('a_command', ''); sys.exit(m.main())"
    paths = [str(folder), str(ROOT / "engine"), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, "-c", code, "plan"],
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupt_of_imports(name: str, tmp_path: Path) -> None:
    """Imported code can catch every exception; the command is interrupted all the same."""
    module = f"""
import os, signal, time
try:
    os.kill(os.getpid(), signal.{name})
    time.sleep(5)
except BaseException:
    pass
"""
    process = program(tmp_path, module)
    assert process.communicate(timeout=60) == ("", "efface plan: interrupted\n")
    assert process.returncode == 130


@pytest.mark.parametrize(
    "write",
    [
        "for _ in range(100_000): print('a line')",
        "print('a line')",
        "from rich.console import Console\n    for _ in range(1000): Console().print('a line')",
    ],
)
def test_a_reader_that_has_gone(write: str, tmp_path: Path) -> None:
    """For example `head`: nothing is printed, and the exit code is that of SIGPIPE."""
    module = f"""
import sys
def run(words):
    sys.stdin.read()
    {write}
    return 0
"""
    process = program(tmp_path, module, stdin=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stdin is not None
    process.stdin.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait(60) == 141


def test_another_broken_pipe_is_an_error(ends: Callable[..., tuple[int, str]]) -> None:
    code, said = ends(raising(BrokenPipeError(errno.EPIPE, "Broken pipe")))
    assert (code, said.count("\n")) in ((2, 1), (141, 0))  # under pytest, stdout may have no file descriptor


def test_a_tracker_that_is_not_installed(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match="--report-to (wandb|neptune): .* to be installed"):
        UnlearnArguments(output_dir=str(tmp_path), use_cpu=True, report_to=["wandb", "neptune"])
    with pytest.raises(ValueError, match="wundb is not supported, only"):
        UnlearnArguments(output_dir=str(tmp_path), use_cpu=True, report_to="wundb")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"lr_scheduler_kwargs": "x"},
            r"`lr_scheduler_kwargs`: expected a JSON object, got something else \(Expecting",
        ),
        ({"lr_scheduler_kwargs": "[1]"}, r"`lr_scheduler_kwargs`: expected a JSON object, got '\[1\]'"),
        ({"accelerator_config": '{"a": '}, "`accelerator_config`: expected a JSON object, got something else"),
        ({"optim_args": "x"}, r"`optim_args`: expected name=value\[,name=value\], got 'x'"),
    ],
)
def test_texts_of_arguments_are_read_at_once(changes: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        UnlearnArguments(output_dir=str(tmp_path), use_cpu=True, **changes)
