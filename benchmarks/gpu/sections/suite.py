"""A suite of ``python -m benchmarks`` as a section. Tables go to the log; rows go to a JSON file and the results."""

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.__main__ import parsed, run_suite
from benchmarks.gpu.section import Run, card
from benchmarks.harness.report import Report, plain
from benchmarks.loss.providers import providers


class Rows(Report):
    """A report that also appends new and changed rows to the section's results."""

    def __init__(self, run: Run, path: Path, suite: str, *arguments: str) -> None:
        super().__init__(path, [suite, *arguments])
        self._run, self._suite = run, suite
        self._seen: list[dict[str, Any]] = []
        self._missing: set[str] = set()

    def save(self, **figures: object) -> None:
        super().save(**figures)
        rows = plain(figures.get(self._suite, self._seen))
        for row in rows:
            if row not in self._seen:
                self._run.row(SAID[self._suite](row), **row)
        self._seen = rows
        missing: Any = figures.get("not_measured", ())
        for reason in missing:
            if reason not in self._missing:
                self._missing.add(reason)
                self._run.row(f"not measured: {reason}", not_measured=reason)


def _given(form: str, value: float | None) -> list[str]:
    return [] if value is None else [form.format(value)]


def _loss(row: dict[str, Any]) -> str:
    figures = [f"{row['median_ms']:.2f} ms", f"x {row['against_floor']:.3f}"]
    figures += _given("wall {:.2f} ms", row["wall_ms"]) + _given("{:.2f} GiB", row["peak_gib"])
    figures += _given("dh {:.0e}", row["errors"].get("dh"))
    return f"{row['shape'].removeprefix('GPU: ')}, {row['provider']}: {', '.join(figures)}"


def _step(row: dict[str, Any]) -> str:
    name = f"{row['shape'].removeprefix('GPU: ')}, {row['provider']}"
    if row["problem"] or row["whole_median_ms"] is None:
        return f"{name}: {row['problem'] or 'no figure'}"
    figures = [f"{row['whole_median_ms']:.1f} ms", f"{row['tokens_per_second']:.0f} tokens/s"]
    figures += _given("MFU {:.1%}", row["utilisation"]) + _given("{:.1f} GiB", row["peak_gib"])
    figures += _given("x {:.2f}", row["whole_faster_than_live"])
    return f"{name}: {', '.join(figures)}"


SAID: dict[str, Callable[[dict[str, Any]], str]] = {"loss": _loss, "step": _step}


def imports(arguments: Sequence[str]) -> None:
    """Import the suite and, for the loss, the other implementations to compare; some take seconds."""
    options, suite = parsed([*arguments, "--device", "cuda"])
    if arguments[0] == "loss":
        assert suite is not None
        providers(suite.SHAPES[options.shape[0]], options.without)


def run(run: Run) -> None:
    """Run the suite that ``run.arguments`` name, with its options."""
    suite_name, *arguments = run.arguments
    if run.smoke:
        arguments = ["--shape", "smoke", "--rounds", "2"]
    else:
        arguments += ["--device", "cuda"]
    path = run.folder / f"{_slug(card(run.device))}-{time.strftime('%Y-%m-%d')}-{suite_name}.json"
    options, suite = parsed([suite_name, *arguments])
    assert suite is not None
    run_suite(suite, options, Rows(run, path, suite_name, *arguments))


def _slug(name: str) -> str:
    """Return a short name of a GPU for file names, such as "h200" for "NVIDIA H200"."""
    found = re.search(r"[A-Z]+\d+[A-Z]*", name)
    return found.group().lower() if found else "gpu"
