"""Tests of the benchmarks' command line, of the start-up suite, and of the CPU command after a failing suite."""

import importlib
import json
import runpy
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Make the benchmarks importable, without TOFU: the same tokens on every machine, and no tokenizer to train."""
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.harness import shared

    monkeypatch.setattr(shared, "FOLDER", tmp_path / "absent")


def smoke(suite: str, folder: Path, monkeypatch: pytest.MonkeyPatch, shape: str = "smoke") -> dict[str, Any]:
    path = folder / "figures.json"
    monkeypatch.setattr(sys, "argv", ["benchmarks", suite, "--shape", shape, "--rounds", "2", "--json", str(path)])
    # with two threads each, tests that run in parallel would mostly wait for each other
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.delitem(sys.modules, "benchmarks.__main__", raising=False)  # runpy warns about an imported module
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("benchmarks", run_name="__main__")
    record: dict[str, Any] = json.loads(path.read_text())
    assert record["machine"]["command"].startswith(f"python -m benchmarks {suite}")
    return record


def test_the_pack_suite_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = smoke("pack", tmp_path, monkeypatch)["packing"]
    assert {row["task"].split()[0] for row in rows} == {"plan", "assemble"}
    assert all(row["median_ms"] > 0 for row in rows)


def test_the_pack_suite_is_measured_with_shared_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = smoke("pack", tmp_path, monkeypatch, "smoke, shared")["packing"]
    assert {row["task"].split()[0] for row in rows} == {"plan", "assemble", "find"}
    assert all(row["median_ms"] > 0 for row in rows)
    (assembled,) = {row["task"] for row in rows if row["task"].startswith("assemble")}
    stored, whole = 8192, int(assembled.split(" tokens without")[0].split()[-1])
    assert 1.5 * stored < whole < 2 * stored  # 36 of 93 tokens are shared


def test_numpy_stores_shared_beginnings_as_the_packer_does() -> None:
    from benchmarks.packing.suite import check_packers

    from efface.batching import MicroBatch, TokenStore

    tokens = [[1, 2, 3], [1, 2, 3], [1, 2], [1, 2, 3, 4, 5], [1, 2, 4, 4], [7, 2, 3], [1, 2, 3, 4, 6], [1, 2, 4, 4]]
    stores = [TokenStore.from_sequences(tokens, [1] * len(tokens)) for _ in range(2)]
    rng = np.random.default_rng(0)
    for _ in range(50):
        roles, sequences = np.sort(rng.integers(2, size=9)).astype(np.int8), rng.integers(len(tokens), size=9)
        check_packers(stores, MicroBatch(roles, sequences), share=True)


def test_packers_that_differ_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.packing import suite

    stores = (suite.store(40, 1, 3), suite.store(40, 2, 3))
    batch = suite.batches_of(stores, share=True)
    assert batch == []  # the only micro-batch is not full
    tree = suite.numpy_tree
    monkeypatch.setattr(suite, "numpy_tree", lambda *arguments: [*tree(*arguments)[:-1], [0]])
    with pytest.raises(ArithmeticError, match="the packers differ in cu_paths"):
        suite.measure("smoke, shared", 1)


def test_numpy_fills_as_few_micro_batches_as_the_planner() -> None:
    from benchmarks.packing.suite import lengths, numpy_plan

    from efface.batching import plan_epoch

    forget, retain = lengths(500, 1), lengths(2000, 2)
    ours = plan_epoch(forget, retain, pairs_per_step=100, token_budget=1024, seed=0, epoch=0)
    theirs = numpy_plan(forget, retain, 100, 1024)
    assert abs(len(theirs) - len(ours.batch_tokens)) <= 2  # they draw other pairs
    assert sum(len(roles) for roles, _ in theirs) == len(ours.roles)


def test_the_likelihood_part_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.evaluate.providers import SCORERS

    rows = smoke("evaluate", tmp_path, monkeypatch)["likelihood"]
    assert [row["provider"] for row in rows] == [scorer.name for scorer in SCORERS]
    assert all(row["error"] <= 1e-5 and len(row["rounds_ms"]) == 2 for row in rows)
    padded, _, ours = rows
    assert 2 * ours["tokens"] < padded["tokens"]


def test_a_scorer_with_other_scores_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.evaluate.inputs import SHAPES
    from benchmarks.evaluate.providers import Efface
    from benchmarks.evaluate.suite import measure_likelihood

    scores = Efface.scores
    monkeypatch.setattr(
        Efface,
        "scores",
        lambda self, model: [[[1.001 * mean for mean in row] for row in split] for split in scores(self, model)],
    )
    with pytest.raises(ArithmeticError, match="'efface' is not timed"):
        measure_likelihood("smoke", SHAPES["smoke"], 1)


def test_the_synthetic_lengths_are_those_of_tofu() -> None:
    from benchmarks.step.data import synthetic

    store = synthetic(4000, 100, seed=0)
    assert store.lengths.mean() == pytest.approx(57, abs=1)
    assert np.percentile(store.lengths, 95) == pytest.approx(82, abs=1)
    assert store.lengths.max() <= 139
    assert store.label_counts.sum() / store.lengths.sum() == pytest.approx(0.58, abs=0.01)


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


def test_a_failing_task_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
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
    for suite, arguments in program.CUT_SHORT.items():  # every option of the full run is valid for its suite
        if "--shape" in arguments:
            assert arguments[arguments.index("--shape") + 1] in importlib.import_module(program.SUITES[suite]).SHAPES
    assert program.processor_name()
