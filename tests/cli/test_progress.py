"""Tests of progress output: a bar on a terminal, occasional lines in a pipe, no output of other libraries."""

import fcntl
import io
import json
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from efface.cli import progress
from efface.cli.main import main
from efface.cli.progress import Bar, open_console
from support.helpers import TEXTS, written_rows
from support.processes import environment

COLUMNS = 72


def shown(text: str) -> list[str]:
    """Return the final lines of a terminal, for the escape codes that rich uses: up, line start, erase, colours."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", text):
        if part == "\r":
            column = 0
        elif part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part.startswith("\x1b"):
            assert part[-1] in "AKmhl", part
            row -= int(part[2:-1]) if part[-1] == "A" else 0
            lines[row] = "" if part[-1] == "K" else lines[row]
        else:
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines if line.strip()]


def on_a_terminal(*words: str) -> str:
    """Return what a command writes to a terminal; the command must succeed."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    known = {**environment(TERM="xterm-256color"), "COLUMNS": str(COLUMNS)}
    command = [sys.executable, "-m", "efface", *words]
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=known, start_new_session=True)
    os.close(slave)
    written = bytearray()
    try:
        while part := os.read(master, 65536):
            written += part
    except OSError:  # Linux reports the closed terminal as an error
        pass
    finally:
        os.close(master)
    assert process.wait() == 0, written.decode()
    return written.decode()


@pytest.fixture
def words(checkpoint: Path, tmp_path: Path) -> list[str]:
    for name, rows in (("forget", TEXTS[:2]), ("retain", TEXTS[2:])):
        written_rows(tmp_path / f"{name}.json", rows)
    sets = [word for name in ("forget", "retain") for word in (f"--{name}", str(tmp_path / f"{name}.json"))]
    options = ["--use-cpu", "True", "--num-train-epochs", "8", "--pairs-per-step", "1", "--save-schedule", "4"]
    return ["unlearn", "--model", str(checkpoint), *sets, *options, "--output", str(tmp_path / "out")]


def test_a_terminal_shows_one_bar_and_nothing_of_other_libraries(words: list[str], tmp_path: Path) -> None:
    written = on_a_terminal(*words)
    for state in ("loading the model", "reading the data", "reference", "of 16", " left", "loss ", "writing the model"):
        assert state in written
    for foreign in ("it/s", "Loading weights", "Writing model", "[transformers]", "grad_norm"):
        assert foreign not in written
    lines = shown(written)
    assert re.fullmatch(
        f"npo · model: forget, 2 of 2 rows, {tmp_path}/forget.json "
        f"npo · model: retain, 3 of 3 rows, {tmp_path}/retain.json "
        r"npo · model: shared prefixes are run once, which saves \d+% of the tokens "
        r"npo · model: reference, 2 of 2 sequences to compute "
        r"npo · model: 16 steps in \d:\d\d, loss [\d.]+ "
        f"wrote {tmp_path}/out",
        " ".join(lines),
    )
    assert all(len(line) <= COLUMNS or " " not in line for line in lines)  # no line is cut inside a word
    bars = [line for line in re.split(r"[\r\n]", re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", written)) if "━" in line]
    assert bars
    assert max(map(len, bars)) <= COLUMNS


def test_a_pipe_gets_plain_lines(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--logging-steps", "8"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert not any("\x1b" in line or "\r" in line for line in lines)
    assert "npo · model: 16 steps" in lines
    assert [line.split()[1] for line in lines if line.startswith("step ")] == ["8", "16"]
    assert lines[-1] == f"wrote {tmp_path / 'out'}"


def test_a_pipe_gets_a_line_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PAUSE", 0.05)
    monkeypatch.setattr(progress, "LONG_PAUSE", 0.25)
    file = io.StringIO()
    bar = Bar(Console(file=file, width=100), "a model")
    bar.stage("loading")
    time.sleep(0.2)  # no change within this time: one line
    bar.stage("", 40)
    for step in range(1, 21):
        bar.update(step, "1.5" if step > 10 else "")
        time.sleep(0.01)
    time.sleep(0.1)
    bar.close()
    loading, *steps = file.getvalue().splitlines()
    assert loading == "a model: loading, 0:00"
    assert 2 <= len(steps) <= 6  # 20 steps in 0.2 s, plus the last
    assert all(re.fullmatch(r"a model, \d+ of 40, 0:00 left(, loss 1\.5)?", line) for line in steps)
    assert steps[-1] == "a model, 20 of 40, 0:00 left, loss 1.5"
    time.sleep(0.1)
    assert file.getvalue().splitlines()[-1] == steps[-1]  # nothing is written on close


def test_log_lines_are_printed_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for handlers created before the bar. After it is closed, they write as before."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    handler, logger = logging.StreamHandler(), logging.getLogger("some.library")
    monkeypatch.setattr(logger, "handlers", [handler])
    console = Console(stderr=True, force_terminal=True, width=60, legacy_windows=False)
    console._environ = {"TERM": "xterm-256color"}
    bar = Bar(console, "a model")
    bar.stage("steps", 10)
    assert handler.stream is not stream
    logger.warning("careful")
    print("hello", file=sys.stderr)
    bar.update(5)
    bar.close()
    assert (handler.stream, sys.stderr) == (stream, stream)
    assert shown(stream.getvalue()) == ["careful", "hello"]


def test_a_dumb_terminal_is_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert open_console().is_terminal
    assert not Bar(open_console(), "").drawn


def test_other_libraries_are_asked_for_by_debug_or_by_their_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TRANSFORMERS_VERBOSITY")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    main(["report", "--debug", "nothing"])
    assert not any(name in os.environ for name in names)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    main(["report", "nothing"])
    assert [os.environ[name] for name in names] == ["1", "1", "info"]


def test_json_knows_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    document: dict[str, Any] = {"a": float("nan"), "b": [1, float("inf")], "c": Path("x")}
    progress.show_json(document)
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [1, None], "c": "x"}
