"""The suites run and refuse to time what differs; synthetic data has TOFU's lengths."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Importable, and without TOFU: the same tokens on every machine, and no tokenizer to train."""
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.step import data

    monkeypatch.setattr(data, "TOFU", tmp_path / "absent")


def smoke(suite: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    path, threads = folder / "figures.json", torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["benchmarks", suite, "--shape", "smoke", "--rounds", "2", "--json", str(path)])
    try:
        with pytest.raises(SystemExit, match="0"):
            runpy.run_module("benchmarks", run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    record: dict[str, Any] = json.loads(path.read_text())
    assert record["machine"]["command"].startswith(f"python -m benchmarks {suite}")
    return record


def test_the_pack_suite_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = smoke("pack", tmp_path, monkeypatch)["packing"]
    assert {row["task"].split()[0] for row in rows} == {"plan", "assemble"}
    assert all(row["median_ms"] > 0 for row in rows)


def test_the_loss_suite_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.loss import suite
    from benchmarks.loss.providers import rivals

    eager = [provider for provider in rivals("cpu")[0] if provider.name.startswith("eager")]
    monkeypatch.setattr(suite, "rivals", lambda _: (eager, ["another: absent"]))  # those that compile take long
    record = smoke("loss", tmp_path, monkeypatch)
    assert record["not_measured"] == ["another: absent"]
    assert all(row["median_ms"] > 0 for row in record["loss"])


def test_the_loss_suite_as_a_gpu_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its clock and its memory counters stood in for: every provider and mode, one that fails, peaks and errors."""
    from argparse import Namespace

    from benchmarks.loss import providers, suite
    from benchmarks.loss.inputs import memorised

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            pass

        def elapsed_time(self, _other: "Event") -> float:
            return 2.0

    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(suite, "memorised", lambda *a, **k: memorised(*a, **{**k, "device": "cpu"}))
    monkeypatch.setattr(suite, "ours", lambda _: [providers._efface("torch", mode) for mode in providers.FLOOR])

    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("no kernel for this shape")

    found = providers._from_nll("eager", providers.FLOOR, "", providers._token_nll)
    lame = providers._from_nll("broken", {"live": 5}, "", broken)
    monkeypatch.setattr(suite, "rivals", lambda _: ([*found, *lame], []))
    rows, missing = suite.measure("smoke", Namespace(device="cuda", rounds=3, errors=True))
    assert missing == ["broken, live: RuntimeError: no kernel for this shape (smoke)"]
    assert [row.provider for row in rows] == [
        f"{name}, {mode}" for name in ("bare GEMMs", "efface torch", "eager") for mode in providers.FLOOR
    ]
    for row in rows:
        assert row.median_ms == 2.0
        assert row.against_floor == 1.0
        assert (row.peak_gib is None) == row.provider.startswith("bare")
        assert (row.error_dw is not None) == (row.provider in {"efface torch, live", "eager, live"})


def test_every_gpu_shape_is_for_a_gpu() -> None:
    from argparse import Namespace

    from benchmarks.loss.suite import SHAPES, default_shapes

    on_gpu, on_cpu = (set(default_shapes(Namespace(device=device))) for device in ("cuda", "cpu"))
    assert on_gpu | on_cpu | {"smoke"} == set(SHAPES)
    assert not on_gpu & on_cpu
    assert {SHAPES[name][:3] for name in on_gpu} >= {
        (8192, 2048, 128256),
        (8192, 3072, 128256),
        (8192, 4096, 32000),
        (8192, 2048, 51200),
        *((n, 2048, 128256) for n in (64, 256, 1024)),
    }


@pytest.mark.slow
def test_the_script_for_a_borrowed_gpu(tmp_path: Path) -> None:
    """All its legs, on the CPU with tiny shapes; then a leg that fails, which the next one survives."""
    if shutil.which("bash") is None or shutil.which("timeout") is None:
        pytest.skip("needs bash and timeout")
    script = [str(ROOT / "benchmarks" / "on_gpu.sh")]
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path), "EFFACE_ON_GPU_SMOKE": "1"}
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "gpu-loss.json").read_text())["loss"]
    summary = (tmp_path / "gpu-summary.txt").read_text()
    assert "tests: exit 0" in summary
    assert "bench: exit 0" in summary
    assert "step: exit 0" in summary
    assert json.loads((tmp_path / "gpu-step.json").read_text())["step"]
    failing = tmp_path / "python"
    failing.write_text(f'#!/bin/sh\ncase "$*" in *"-m pytest"*) exit 3;; *) exec {sys.executable} "$@";; esac\n')
    failing.chmod(0o755)
    environment |= {"PYTHON": str(failing), "OUT": str(tmp_path / "again"), "LEGS": "tests bench"}
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "tests: exit 3" in done.stdout
    assert "bench: exit 0" in done.stdout


def test_numpy_fills_as_few_micro_batches_as_the_planner() -> None:
    from benchmarks.packing.rivals import numpy_plan
    from benchmarks.packing.suite import lengths

    from efface.batching import plan_epoch

    forget, retain = lengths(500, 1), lengths(2000, 2)
    ours = plan_epoch(forget, retain, pairs_per_step=100, token_budget=1024, seed=0, epoch=0)
    theirs = numpy_plan(forget, retain, 100, 1024)
    assert abs(len(theirs) - len(ours.batch_tokens)) <= 2  # they draw other pairs
    assert sum(len(roles) for roles, _ in theirs) == len(ours.roles)


def test_the_synthetic_lengths_are_those_of_tofu() -> None:
    from benchmarks.step.data import synthetic

    store = synthetic(4000, 100, seed=0)
    assert store.lengths.mean() == pytest.approx(57, abs=1)
    assert np.percentile(store.lengths, 95) == pytest.approx(82, abs=1)
    assert store.lengths.max() <= 139
    assert store.label_counts.sum() / store.lengths.sum() == pytest.approx(0.58, abs=0.01)
