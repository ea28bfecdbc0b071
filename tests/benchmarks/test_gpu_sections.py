"""Tests of the sections of a borrowed GPU, run on the CPU: every row is written and every fault is raised."""

import itertools
import json
import math
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # tests share the cores


class Section:
    """A run of a section and the rows that it wrote."""

    def __init__(self, folder: Path, name: str, *arguments: str) -> None:
        from benchmarks.gpu.section import Run

        self.run = Run(name, folder, arguments, "cpu", time.monotonic() + 600)
        self.path = folder / "results.jsonl"

    @property
    def rows(self) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in self.path.read_text().splitlines()]
        assert all(row["section"] == self.run.name for row in found)
        return found


def test_the_machine(tmp_path: Path) -> None:
    from benchmarks.gpu.sections import machine

    section = Section(tmp_path, "machine")
    machine.run(section.run)
    what, card, can, launch = section.rows
    assert what["versions"]["torch"] == torch.__version__
    assert "Python.h" in what["tools"]
    assert "no GPU" in card["card"]
    assert can["copy_terabytes"] > 0
    assert can["product_tflops"] > 0
    assert launch["launch_us"] > 0


def test_without_nvidia_smi_only_the_clocks_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.harness import report

    monkeypatch.setenv("PATH", "")
    assert report.gpu_says("clocks.sm") == report.gpu_clocks() == ""


def test_of_two_installed_versions_the_imported_one_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.harness.report import versions

    for version in ("1", "2"):
        stub = tmp_path / version / f"twice-{version}.dist-info"
        stub.mkdir(parents=True)
        (stub / "METADATA").write_text(f"Metadata-Version: 2.1\nName: twice\nVersion: {version}\n")
        monkeypatch.syspath_prepend(tmp_path / version)
    assert versions(["twice", "a-package-that-nobody-has"]) == {"twice": "2"}


def test_the_products(tmp_path: Path) -> None:
    from benchmarks.expected import SHAPES
    from benchmarks.gpu.sections import loss

    section = Section(tmp_path, "products")
    loss.products(section.run)
    adds, *rows = section.rows
    assert adds["accumulates"] is False
    assert [row["rows"] for row in rows] == [16, 32]
    for row in rows:
        assert set(row["ms"]) == {"Z", "dh", "dW", "dW fp32", "dW fp32 added"}
        assert all(rate > 0 for rate in row["tflops"].values())
    assert {(shape.hidden_size, shape.vocabulary) for shape in SHAPES} >= {(2048, 128256), (4096, 32000)}


def interpreted() -> None:
    pytest.importorskip("triton")
    from efface_kernels import triton_launch

    if not triton_launch.INTERPRETED:
        pytest.skip("the tensors are on the CPU, where Triton runs only with TRITON_INTERPRET=1")


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")  # −∞ − −∞ in masked lanes, computed by NumPy
def test_the_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interpreted()
    from benchmarks.gpu.sections import loss

    section = Section(tmp_path, "trial")
    loss.trial(section.run)
    agreed, auto = section.rows
    assert agreed["fault"] is None
    assert auto["auto"] in ("native", "torch")
    monkeypatch.setattr(loss.backends, "disagreement", lambda *_: "the row pass differs")
    with pytest.raises(ArithmeticError, match="the row pass differs"):
        loss.trial(section.run)
    assert section.rows[-2]["fault"] == "the row pass differs"


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
def test_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every configuration has a row. One with other results is an error; one that cannot run is only reported."""
    interpreted()
    from benchmarks.gpu.sections import sweep

    section = Section(tmp_path, "sweep")
    sweep.run(section.run)
    for case in sweep._TINY:
        rows = [row for row in section.rows if row["case"] == case.name]
        assert len(rows) == 3 + 1
        assert [row["own"] for row in rows[:-1]] == [True, False, False]
        assert rows[-1]["said"].startswith(case.name)
        assert all(row["ms"] > 0 and row["terabytes"] > 0 for row in rows[:-1])

    def wrong(self: Any, config: Any) -> tuple[torch.Tensor, ...]:
        if config.num_warps == 8:
            raise RuntimeError("out of resource: shared memory\nand more")
        return (torch.full((2,), 1.0 + config.hold),)

    monkeypatch.setattr(sweep.Work, "run", wrong)
    case = sweep._TINY[0]
    able, refused = sweep._able(case, [sweep.LaunchConfig(64, w, 0, h) for w in (4, 8) for h in (False, True)], "cpu")
    assert able == [sweep.LaunchConfig(64, 4)]
    assert set(refused.values()) == {
        "other results than the library's own configuration",
        "RuntimeError: out of resource: shared memory",
    }
    monkeypatch.setattr(sweep, "_able", lambda case, configs, device: ([], {configs[0]: "other results than …"}))
    monkeypatch.setattr(sweep, "_measure", lambda *_: None)
    with pytest.raises(ArithmeticError, match="other results"):
        sweep.run(section.run)


def test_the_sweep_compiles_a_kernel_once_and_tries_again_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu.sections import sweep

    tried: list[Any] = []

    def run(self: Any, config: Any) -> tuple[torch.Tensor, ...]:
        tried.append(config)
        if config == configs[3] and tried.count(config) == 1:
            raise TypeError("a kernel that another thread is loading has no function")
        return (torch.ones(2),)

    monkeypatch.setattr(sweep.Work, "run", run)
    some = sweep.LaunchConfig
    configs = [some(64, 4), some(64, 4, 2), some(64, 4, 1), some(64, 8, 2, True), some(64, 8, 1, True)]
    able, refused = sweep._able(sweep._TINY[0], configs, "cpu")
    assert (able, refused) == (configs, {})
    assert set(tried[:3]) == {configs[0], configs[1], configs[3]}  # no two with the same kernel
    assert tried[3:] == configs[2:]


def test_the_sweep_has_the_librarys_own_and_what_a_multiprocessor_holds() -> None:
    from benchmarks.gpu.sections import sweep

    for case in sweep.CASES:
        configs = list(case.configs())
        assert configs[0] == case.default()
        assert len(set(configs)) >= 12
        for config in configs:
            assert config.block & (config.block - 1) == 0
            assert max(config.resident, 1) * config.num_warps <= 64
        assert case.moved < 3 << 30
    row = set(sweep.CASES[0].configs())
    kinds = {(config.resident, config.hold) for config in row}
    assert kinds == set(itertools.product((0, 1, 2), (False, True)))


def test_the_profile(tmp_path: Path) -> None:
    from benchmarks.gpu.sections import loss

    section = Section(tmp_path, "profile")
    loss.profile(section.run)
    total, *kernels = section.rows
    assert total["kernels"] > 0
    assert any("mm" in row["kernel"] for row in kernels)
    assert math.fsum(row["share"] for row in kernels) <= 1 + 1e-9


def test_a_profile_without_kernels_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu.sections import loss

    monkeypatch.setattr(torch.profiler.profile, "key_averages", lambda _: [])
    section = Section(tmp_path, "profile")
    with pytest.raises(ArithmeticError, match="expected kernels, got none"):
        loss._profiled(section.run, "nothing", lambda: None)


def test_a_suites_rows_are_kept_as_they_come(tmp_path: Path) -> None:
    """A changed row is written again; a missing provider is listed once."""
    from benchmarks.gpu.sections.suite import Rows

    section = Section(tmp_path, "steps", "step")
    report = Rows(section.run, tmp_path / "step.json", "step", "--shape", "a b")
    row = {"shape": "GPU: a", "provider": "eager", "problem": "", "whole_median_ms": None}
    full = {"tokens_per_second": 10.0, "utilisation": 0.5, "peak_gib": None, "whole_faster_than_live": 1.0}
    report.save(step=[row], not_measured=[])
    report.save(step=[row | full | {"whole_median_ms": 2.0}], not_measured=["a rival: absent"])
    report.save(not_measured=["a rival: absent"])
    report.save(step=[row | full | {"whole_median_ms": 2.0}, row | {"problem": "out of memory"}])
    assert [row["said"] for row in section.rows] == [
        "a, eager: no figure",
        "a, eager: 2.0 ms, 10 tokens/s, MFU 50.0%, x 1.00",
        "not measured: a rival: absent",
        "a, eager: out of memory",
    ]
    record = json.loads((tmp_path / "step.json").read_text())
    assert len(record["step"]) == 2
    assert record["machine"]["command"] == "python -m benchmarks step --shape 'a b'"


def test_the_loss_suite_as_a_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu.sections import suite
    from benchmarks.loss import suite as loss
    from benchmarks.loss.providers import ours, products

    monkeypatch.setattr(loss, "providers", lambda shape, without=(): (products(shape) + ours(shape), []))
    section = Section(tmp_path, "floor", "loss", "--shape", "GPU: Llama-3.2-1B")
    suite.run(section.run)
    assert len(section.rows) == 3 * 3
    assert "x 1.000" in section.rows[0]["said"]
    (path,) = tmp_path.glob("gpu-*-loss.json")
    assert len(json.loads(path.read_text())["loss"]) == 9


TESTS = """
import pytest
def test_that_passes(): pass
def test_that_fails(): assert 1 + 1 == 3
@pytest.mark.skip
def test_that_is_skipped(): pass
"""


@pytest.mark.parametrize("arguments", [[], ["--parallel"]], ids=["alone", "parallel"])
def test_tests_are_counted_and_the_failing_are_named(tmp_path: Path, arguments: list[str]) -> None:
    file = tmp_path / "test_some.py"
    file.write_text(TESTS)
    code = f"""
import time
from pathlib import Path
from benchmarks.gpu.section import Run
from benchmarks.gpu.sections import tests
tests.run(Run('tests', Path({str(tmp_path)!r}), ({str(file)!r}, *{arguments}), 'cpu', time.monotonic() + 600))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    failed, total = Section(tmp_path, "tests").rows
    assert failed["test"].endswith("::test_that_fails")
    assert failed["said"].endswith("::test_that_fails: assert (1 + 1) == 3")
    assert total["outcomes"] == {"passed": 1, "failed": 1, "skipped": 1}
    assert total["not_reached"] == 0


def test_tests_end_before_their_time_is_up(tmp_path: Path) -> None:
    from benchmarks.gpu.section import Run
    from benchmarks.gpu.sections import tests

    recorder = tests.Recorder(Run("tests", tmp_path, (), "cpu", time.monotonic() + 600))
    recorder.pytest_runtest_logfinish()
    recorder = tests.Recorder(Run("tests", tmp_path, (), "cpu", time.monotonic() + 1))
    with pytest.raises(pytest.exit.Exception):
        recorder.pytest_runtest_logfinish()


def test_every_file_with_gpu_tests_is_run(request: pytest.FixtureRequest) -> None:
    """Of the files that this run of pytest has collected; in CI these are all."""
    from benchmarks.gpu.sections.tests import FILES, KERNELS

    listed = {KERNELS / f"test_{name}.py" for name in FILES}
    assert all(path.is_file() for path in listed)
    items = request.session.items
    marked = {item.path for item in items if item.get_closest_marker("gpu")}
    assert marked <= listed
    if listed <= {item.path for item in items}:
        assert marked == listed


def test_a_gpus_clock_waits_for_the_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU is kept busy for twice as long as the launches took, up to a limit. Wall times include the wait at the
    end.
    """
    from benchmarks.harness import timing

    now, slept, order = [0.0], [], []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            order.append("event")

        def elapsed_time(self, _other: "Event") -> float:
            return 3.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: (slept.append(cycles), order.append("sleep")))
    monkeypatch.setattr(timing, "time", Namespace(perf_counter=lambda: now[0]))

    def call(seconds: float) -> Any:
        def run(_: int) -> None:
            order.append("call")
            now[0] += seconds

        return run

    times = timing.interleaved_on_gpu({"short": call(0.001), "long": call(1.0)}, 2, warm_up=0)
    assert times == {"short": [3.0, 3.0], "long": [3.0, 3.0]}
    assert slept[:2] == [0, 0]  # the warm-up round
    assert slept[2:] == pytest.approx([2e9 * 0.002, 2e9 * 0.05] * 2)
    assert order[:6] == ["wait", "sleep", "event", "call", "event", "wait"]
    order.clear()
    wall = timing.wall_times({"a": call(0.5)}, 1)
    assert wall == {"a": [pytest.approx(500.0)]}
    assert order == ["wait", "call", "wait"]
