"""The command line of the benchmarks: ``python -m benchmarks SUITE`` prints a suite's tables and saves its results.

``cpu`` runs every suite, with a JSON file for each. ``report`` generates the pages and plots of all results.
``expected`` prints the computed times of a GPU. ``python -m benchmarks.gpu`` is the command for a borrowed GPU.
"""

import argparse
import importlib
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch

from benchmarks.harness.report import Report, processor
from benchmarks.harness.shared import BadOption

# ``harness.shared`` describes the module of a suite. Only the requested suite is imported: a borrowed machine may lack
# the packages of the others.
SUITES = {
    "evaluate": "benchmarks.evaluate.suite",
    "loss": "benchmarks.loss.suite",
    "pack": "benchmarks.packing.suite",
    "start": "benchmarks.start.suite",
    "step": "benchmarks.step.suite",
}
RESULTS = Path(__file__).parent / "results"
# Options with which ``cpu`` keeps each suite short, so that all take under ten minutes. A suite without an entry runs
# with its defaults.
CUT_SHORT: dict[str, list[str]] = {
    "evaluate": ["--quick", "--shape", "Llama 4 layers, d 128, V 8192, fp32"],
    "loss": ["--shape", "Llama-2 head, D 1024, bf16", "--rounds", "3"],
    "start": ["--rounds", "2"],
    "step": ["--quick", "--rounds", "3"],
}


def parsed(arguments: Sequence[str]) -> tuple[argparse.Namespace, ModuleType | None]:
    """Return the options, and the suite's module if the command is a suite."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    commands = parser.add_subparsers(dest="suite", required=True)
    commands.add_parser("report", description="Generate the pages and plots of all results.")
    commands.add_parser("expected", description="Print the times expected on a GPU. They are computed, not measured.")
    cpu = commands.add_parser(
        "cpu",
        description="Run every suite on the CPU, shortened, with a JSON file for each; under ten minutes on two cores.",
    )
    cpu.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON files")
    cpu.add_argument("--name", help="start of the file names; default: cpu-<processor>-<date>")
    cpu.add_argument("--smoke", action="store_true", help="run tiny shapes for two rounds, as a test")
    suite = None
    for name, module in SUITES.items():
        command = commands.add_parser(name)
        if name in arguments[:1]:
            suite = importlib.import_module(module)
            command.description = suite.__doc__
            command.add_argument(
                "--shape", action="append", choices=list(suite.SHAPES), help="default: all for the device"
            )
            command.add_argument("--rounds", type=int, default=suite.ROUNDS)
            command.add_argument(
                "--threads", type=int, default=2, help="threads of torch; always 1 for the smoke shapes"
            )
            command.add_argument("--json", type=Path, help="write the results to this file")
            getattr(suite, "add_arguments", lambda _: None)(command)
    options = parser.parse_args(arguments)
    if suite is not None and not options.shape:
        default_shapes = getattr(suite, "default_shapes", None)
        every = [name for name in suite.SHAPES if not name.startswith("smoke")]
        options.shape = every if default_shapes is None else default_shapes(options)
    return options, suite


def run_suite(suite: ModuleType, options: argparse.Namespace, report: Report) -> None:
    smoke = all(name.startswith("smoke") for name in options.shape)  # these run in tests, on busy machines
    torch.set_num_threads(1 if smoke else options.threads)
    suite.run(options, report)


def run_all(options: argparse.Namespace) -> int:
    """Run every suite on the CPU, each in a subprocess; return the largest exit code.

    A suite that fails does not stop the others.
    """
    name = options.name or f"cpu-{processor_name()}-{time.strftime('%Y-%m-%d')}"
    options.out.mkdir(parents=True, exist_ok=True)
    worst = 0
    for suite in SUITES:
        begin = time.perf_counter()
        chosen = ["--shape", "smoke", "--rounds", "2"] if options.smoke else CUT_SHORT.get(suite, [])
        command = [sys.executable, "-m", "benchmarks", suite, *chosen]
        code = subprocess.run([*command, "--json", str(options.out / f"{name}-{suite}.json")], check=False).returncode
        print(f"{suite}: exit {code} after {time.perf_counter() - begin:.0f} s", flush=True)
        worst = max(worst, abs(code))
    return worst


def processor_name() -> str:
    """Return the processor's model name in lower case and with hyphens, for file names."""
    model = processor().get("model name", "unknown").lower()
    return re.sub(r"[^a-z0-9]+", "-", model.replace("(r)", "").replace("(tm)", "")).strip("-")[:40]


def main() -> int:
    options, suite = parsed(sys.argv[1:])
    if suite is not None:
        try:
            run_suite(suite, options, Report(options.json))
        except BadOption as error:
            print(f"python -m benchmarks {options.suite}: {error}", file=sys.stderr)
            return 2
    elif options.suite == "cpu":
        return run_all(options)
    elif options.suite == "expected":
        expected = importlib.import_module("benchmarks.expected")
        report = Report(None)
        report.table("Computed, not measured; milliseconds", expected.HEADINGS, expected.table())
        report.note(expected.assumptions())
        report.table("Computed, not measured; MiB", expected.MEMORY_HEADINGS, expected.memory_table())
    else:
        importlib.import_module("benchmarks.publish").everything()
    return 0


if __name__ == "__main__":
    sys.exit(main())
