"""The tests marked ``gpu``, the most informative first. One row for each failure, and one for the total."""

import importlib.util
import os
import time
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.gpu.section import Run

ROOT = Path(__file__).resolve().parents[3]
KERNELS = ROOT / "tests" / "kernels"
# Tests of what only a GPU can show come first, then the oracle tests of each op.
FILES = (
    "on_gpu",
    "backends",
    "row_pass",
    "distribution_pass",
    "linear_loss_rule",
    "distribution_loss",
    "sequence_loss",
    "workspace",
    "scale_pass",
)
PARALLEL = "--parallel"
_PROCESSES = 14  # at most; each has a separate CUDA context of half a GiB
_RESERVE = 4.0  # seconds before the deadline at which pytest starts to finish


class Recorder:
    """A pytest plugin that records outcomes and stops at the deadline."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.outcomes: Counter[str] = Counter()
        self.collected = 0

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.collected = self.collected or len(session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        """Count the tests under pytest-xdist, where worker processes collect them."""
        self.collected = len(ids)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Record a file that cannot be imported."""
        if report.failed:
            self._failed(report.nodeid, str(report.longrepr))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Record the outcome of a test's set-up, call or tear-down."""
        if report.failed:
            self._failed(report.nodeid, report.longreprtext)
        elif report.skipped or report.when == "call":
            self.outcomes[report.outcome] += 1
        if report.when == "call" and report.passed and "test_on_gpu" in report.nodeid:
            printed = " ".join(text for name, text in report.sections if "stdout" in name).strip()
            self.run.row(test=report.nodeid, seconds=report.duration, printed=printed)

    def pytest_runtest_logfinish(self) -> None:
        """Stop pytest at the deadline."""
        if time.monotonic() > self.run.deadline - _RESERVE:
            pytest.exit("the section's time is up")

    def _failed(self, name: str, text: str) -> None:
        self.outcomes["failed"] += 1
        last = (text.strip().splitlines() or [""])[-1]
        reason = next((line[1:].strip() for line in text.splitlines() if line.startswith("E ")), last)
        self.run.row(f"FAILED {Path(name).name}: {reason[:160]}", test=name, failure=text[-4000:])


def run(run: Run) -> None:
    """Run the tests in ``run.arguments``: names of ``FILES`` or paths; by default all ``FILES``.

    With ``--parallel`` they run in several processes.

    Raises:
        AssertionError: a test failed.
    """
    parallel = PARALLEL in run.arguments and importlib.util.find_spec("xdist") is not None
    chosen = [name for name in run.arguments if name != PARALLEL] or FILES
    if run.smoke:
        chosen = [name for name in chosen if name.endswith(".py")] or ["chunks"]
    files = [name if name.endswith(".py") else str(KERNELS / f"test_{name}.py") for name in chosen]
    recorder, begin = Recorder(run), time.perf_counter()
    # Other versions there raise other warnings, and pytest plugins may be missing.
    options = ["--override-ini=addopts=", "--override-ini=filterwarnings=default", "--strict-markers", "-q", "-rf"]
    options += [f"--config-file={ROOT / 'pyproject.toml'}", "-p", "no:cacheprovider"]
    options += ["--continue-on-collection-errors", "--durations=15"]
    # Most of the time goes to compiling kernels, for some files more than the time limit, so tests are split over
    # processes.
    processes = str(max(2, min(_PROCESSES, os.cpu_count() or 1)))
    options += ["-n", processes, "--dist", "loadgroup"] if parallel else ["-p", "no:xdist"]
    options += ["-m", "not gpu" if run.smoke else "gpu"]
    status = pytest.main([*options, *files], plugins=[recorder])
    seconds, outcomes = time.perf_counter() - begin, recorder.outcomes
    left = recorder.collected - sum(outcomes.values())
    listed = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    said = f"{listed or 'none ran'} in {seconds:.0f} s" + (f"; {left} not reached" if left > 0 else "")
    run.row(said, outcomes=dict(outcomes), not_reached=left, seconds=seconds, status=int(status))
    if outcomes["failed"] or not outcomes["passed"]:
        raise AssertionError(f"expected all tests to pass, got {said}")
