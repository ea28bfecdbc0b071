"""Tests of the loss suite: its fp64 gradients, rejected providers, its shapes, and a GPU run with a fake clock."""

import gc
import json
import runpy
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.harness.report import Report
from benchmarks.harness.shared import BadOption
from benchmarks.loss import providers as everybody
from benchmarks.loss import suite
from benchmarks.loss.inputs import FLOOR, FUNCTIONS, LossShape, gold, make_inputs
from benchmarks.loss.providers import (
    EAGER,
    Found,
    Head,
    eager,
    eager_nll,
    from_mean,
    from_nll,
    liger_budget,
    ours,
    products,
)

ROOT = Path(__file__).resolve().parents[2]

_1B = (2048, 128256)
NAMES = [f"{shape.objective}-{i}" for i, shape in enumerate(suite.CHECKS)]


def asked(device: str, rounds: int, without: tuple[str, ...] = (), seconds: float | None = None) -> Namespace:
    return Namespace(device=device, rounds=rounds, memory=False, without=without, seconds=seconds)


def quick(shape: LossShape, without: tuple[str, ...] = ()) -> Found:
    """Return the providers that compile nothing."""
    return [*products(shape), *ours(shape), *eager(EAGER, "", shape)], ["another: absent"]


@pytest.mark.parametrize("shape", suite.CHECKS, ids=NAMES)
def test_providers_agree_with_gold(shape: LossShape) -> None:
    found = quick(shape)[0]
    rivals = (r for r in everybody.RIVALS if r.name.startswith(("torch", "liger-kernel chunked")))
    found += everybody.offered(rivals, shape)[0]
    errors, refused = suite.checked(found, shape)
    assert not refused
    assert len(errors) == len(found)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_gold_is_autograd_in_fp64(name: str) -> None:
    mode = "live" if name in ("NPO", "DPO") else "no reference"
    shape = LossShape(128, 16, 40, torch.float64, name, (mode,), bias=True, softcap=30.0, unlearned=name == "GradDiff")
    inputs = make_inputs(shape)
    (provider,) = eager("", "", shape)
    # the eager provider's logits are float32
    for got, exact in zip(provider.run(inputs), gold(inputs, mode), strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-3, atol=1e-5 * float(exact.abs().max()))


def test_a_provider_with_another_gradient_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = suite.SHAPES["smoke"]

    def wrong(hidden: torch.Tensor, head: Head, targets: torch.Tensor) -> torch.Tensor:
        return 1.001 * eager_nll(hidden, head.weight, head.bias, head.softcap, targets)

    def raises(*_: object) -> torch.Tensor:
        raise RuntimeError("no kernel for this shape")

    lame = [*from_nll("wrong", 0, "", wrong, shape), *from_nll("broken", 1, "", raises, shape)]
    monkeypatch.setattr(suite, "providers", lambda s, _=(): ([*quick(s)[0], *lame], []))
    rows, missing = suite.measure("smoke", asked("cpu", 2))
    assert {row.who for row in rows} == {"bare GEMMs", "efface native", "efface torch", "eager"}
    assert any(reason.startswith("wrong, live: gradients differ from fp64, dh is off by") for reason in missing)
    assert "broken, live: RuntimeError: no kernel for this shape (smoke)" in missing
    with pytest.raises(ArithmeticError, match="no kernel"):
        suite.check(Report(None))


def test_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "providers", quick)
    path, threads = tmp_path / "figures.json", torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["benchmarks", "loss", "--shape", "smoke", "--rounds", "3", "--json", str(path)])
    try:
        monkeypatch.delitem(sys.modules, "benchmarks.__main__", raising=False)  # runpy warns about an imported module
        with pytest.raises(SystemExit, match="0"):
            runpy.run_module("benchmarks", run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    record: dict[str, Any] = json.loads(path.read_text())
    assert record["not_measured"] == ["another: absent"]
    assert min(record["machine"]["load_average"], record["load_average_at_end"]) >= 0
    for row in record["loss"]:
        assert 0 < row["low_ms"] <= row["quarter_ms"] <= row["median_ms"] <= row["three_quarters_ms"] <= row["high_ms"]
        assert row["provider"] == f"{row['who']}, {row['mode']}"
        assert row["rounds"] == 3
        frozen = row["mode"].startswith("frozen")
        expected = set() if row["who"] == "bare GEMMs" else {"dh"} if frozen else {"dh", "dw"}
        assert set(row["errors"]) == expected


def test_providers_are_left_out_by_a_part_of_their_name(monkeypatch: pytest.MonkeyPatch) -> None:
    rivals = tuple(r for r in everybody.RIVALS if r.name in (EAGER, "liger-kernel FLCE"))
    assert len(rivals) == 2
    monkeypatch.setattr(everybody, "RIVALS", rivals)
    rows, missing = suite.measure("smoke", asked("cpu", 1, ("torch", "frozen", "liger")))
    assert {row.who for row in rows} == {"bare GEMMs", "efface native", "eager"}
    assert {row.mode for row in rows if row.who != "bare GEMMs"} == {"live", "cached"}
    assert not missing


def test_an_unknown_provider_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    options = Namespace(**vars(asked("cpu", 1, ("liger", "unheard-of"))), shape=["smoke"], check=False)
    with pytest.raises(BadOption, match="--without: expected a part of a provider's name, got 'unheard-of'; they are"):
        suite.run(options, Report(None))
    command = [sys.executable, "-m", "benchmarks", "loss", "--shape", "smoke", "--without", "unheard-of"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("python -m benchmarks loss: --without: expected")
    assert "Traceback" not in done.stderr


def test_as_a_gpu_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With fake clock and memory counters: every mode, the peaks and the clocks."""

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            pass

        def elapsed_time(self, _other: "Event") -> float:
            return 2.0

    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda _: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    on_gpu = replace(suite.SHAPES["smoke"], device="cuda")
    monkeypatch.setitem(suite.SHAPES, "smoke", on_gpu)
    monkeypatch.setattr(suite, "make_inputs", lambda shape, **k: make_inputs(replace(shape, device="cpu"), **k))
    monkeypatch.setattr(suite, "providers", lambda shape, without: quick(replace(shape, device="cpu"), without))
    monkeypatch.setattr(suite, "gpu_clocks", lambda: "1980 MHz, 300 W, 50")
    rows, _ = suite.measure("smoke", asked("cuda", 3))
    assert [row.mode for row in rows[:3]] == list(on_gpu.modes)
    for row in rows:
        assert row.median_ms == 2.0
        assert row.against_floor == 1.0
        assert row.of_floor_percent == 100
        assert row.wall_ms > 0
        assert (row.peak_gib is None) == (row.who == "bare GEMMs")
        assert row.clocks["before"] == row.clocks["after"] == "1980 MHz, 300 W, 50"


def test_shapes_are_those_that_must_hold() -> None:
    on_gpu, on_cpu = (set(suite.default_shapes(Namespace(device=device))) for device in ("cuda", "cpu"))
    assert on_gpu | on_cpu | {"smoke"} == set(suite.SHAPES)
    assert not on_gpu & on_cpu
    assert all(shape.n % 64 == 0 and set(shape.modes) <= set(FLOOR) for shape in suite.SHAPES.values())
    heads = {(shape.n, shape.d, shape.v) for shape in map(suite.SHAPES.__getitem__, on_gpu)}
    assert heads >= {(8192, 2048, 128256), (8192, 3072, 128256), (8192, 4096, 32000), (8192, 2048, 51200)}
    assert heads >= {(n, 2048, 128256) for n in (64, 256, 1024, 8192, 32768)}
    assert any(shape.softcap and shape.v == 256000 for shape in suite.SHAPES.values())
    for device in ("cpu", "cuda"):
        got = {shape.objective for shape in suite.SHAPES.values() if shape.device == device}
        assert got == {"NPO", "SimNPO", "DPO", "NLL", "GradDiff", "KL retain"}


@pytest.mark.parametrize(("n", "d", "v"), [(8192, *_1B), (8192, 4096, 32000), (64, *_1B), (32768, *_1B)])
def test_ligers_chunks_are_tuned_to_2048_rows(n: int, d: int, v: int) -> None:
    pieces = -(-v // (liger_budget(n, d, v) * d))  # as in Liger's source
    rows = min(n, 1 << (-(-n // pieces) - 1).bit_length())
    assert rows == min(n, 2048)


def test_gold_of_a_mean_is_gold_of_rows() -> None:
    """For ops that compute gradients in the forward call: NLL in one call, GradDiff in two."""

    def mean(hidden: torch.Tensor, head: Head, targets: torch.Tensor) -> torch.Tensor:
        return eager_nll(hidden, head.weight, head.bias, head.softcap, targets).mean()

    for objective in ("NLL", "GradDiff"):
        shape = LossShape(64, 64, 512, torch.float32, objective, ("no reference",))
        errors, refused = suite.checked(from_mean("mean", 0, "", mean, shape), shape)
        assert errors
        assert not refused
    assert not from_mean("mean", 0, "", mean, suite.SHAPES["smoke"])


def test_after_unlearning_the_targets_are_improbable() -> None:
    shape = LossShape(64, 256, 4096, torch.float32, "GradDiff", ("no reference",), unlearned=True)
    inputs = make_inputs(shape)
    p = torch.softmax(inputs.hidden @ inputs.weight.T, 1).gather(1, inputs.targets[:, None])[:, 0].detach()
    before = torch.softmax(inputs.reference_hidden @ inputs.reference_weight.T, 1).gather(1, inputs.targets[:, None])
    assert p[:32].max() < 1e-2
    assert p[:32].median() < 1e-4
    assert p[32:].median() > 0.9
    assert before[:32].median() > 0.9


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_the_resident_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(provider: str) -> float:
        gc.collect()  # otherwise garbage of earlier tests would be freed during the measurement
        return suite.resident_peak("small", provider)

    monkeypatch.setattr(suite, "providers", quick)
    monkeypatch.setitem(suite.SHAPES, "small", LossShape(1024, 64, 16384, torch.float32))
    few, all_logits = (measured(f"{who}, live") for who in ("efface native", "eager"))
    assert all_logits > 2 * 1024 * 16384 * 4 / (1 << 30)  # logits and their gradient
    assert few < all_logits
