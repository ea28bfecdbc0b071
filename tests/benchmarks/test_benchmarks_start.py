"""The start-up suite starts processes; the CPU command runs every suite and survives one that fails."""

import importlib
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


def test_the_start_suite_is_measured(tmp_path: Path) -> None:
    from benchmarks.harness.report import Report
    from benchmarks.start import suite

    path = tmp_path / "start.json"
    suite.run(Namespace(shape=["smoke"], rounds=1), Report(path))
    rows = {row["task"]: row for row in json.loads(path.read_text())["start"]}
    assert list(rows) == list(suite.SHAPES["smoke"])
    assert rows["import torch"]["above_ms"] > 0
    assert rows["import efface"]["compared_with"] == "import torch"
    assert all(len(row["rounds_ms"]) == 1 for row in rows.values())


def test_a_task_that_fails_is_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.start import suite

    monkeypatch.setitem(suite.TASKS, "broken", (["-c", "import nothing_of_that_name"], None))
    with pytest.raises(subprocess.CalledProcessError):
        suite.measure(("broken",), 1)


@pytest.mark.parametrize("whose", ["efface", "transformers"])
def test_the_first_step_is_taken(whose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers
    from benchmarks.start import first_step

    trained: list[int] = []
    step = transformers.Trainer.training_step

    def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        trained.append(1)
        return step(self, *arguments, **options)

    monkeypatch.setattr(transformers.Trainer, "training_step", counted)
    first_step.main(whose)
    assert trained == [1]


def test_all_cpu_suites_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from benchmarks import __main__ as program

    commands: list[list[str]] = []

    def run(command: list[str], *, check: bool) -> Any:
        assert not check
        commands.append(command)
        return Namespace(returncode=3 if "pack" in command else 0)

    monkeypatch.setattr(program.subprocess, "run", run)
    options = Namespace(out=tmp_path / "results", name="machine", smoke=True)
    assert program.run_all(options) == 3
    assert [command[3] for command in commands] == list(program.SUITES)
    for command in commands:
        assert command[:3] == [sys.executable, "-m", "benchmarks"]
        assert command[4:8] == ["--shape", "smoke", "--rounds", "2"]
        assert command[-1] == str(tmp_path / "results" / f"machine-{command[3]}.json")
    for suite, arguments in program.CUT_SHORT.items():  # what the full run asks for, its suite has
        if "--shape" in arguments:
            assert arguments[arguments.index("--shape") + 1] in importlib.import_module(program.SUITES[suite]).SHAPES
    assert program.processor_name()
