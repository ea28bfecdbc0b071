"""``python -m benchmarks SUITE``: a suite's tables, and its figures as JSON. ``report``: pages and plots of all.

``expected``: what a GPU is expected to show, computed. On a borrowed GPU, ``python -m benchmarks.gpu``.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch

from benchmarks import cpu
from benchmarks.options import BadOption
from benchmarks.report import Report

# A suite has SHAPES (the one called "smoke" only on demand), ROUNDS, add_arguments(parser) and run(options, report);
# where the shapes depend on the options, default_shapes(options).
# Only the one that is asked for is imported: a borrowed machine may lack what others need.
SUITES = {
    "evaluate": "benchmarks.evaluate.suite",
    "loss": "benchmarks.loss.suite",
    "pack": "benchmarks.packing.suite",
    "start": "benchmarks.start.suite",
    "step": "benchmarks.step.suite",
}


def parsed(arguments: Sequence[str]) -> tuple[argparse.Namespace, ModuleType | None]:
    """Return the options, and the suite's module where it is a suite that is asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    commands = parser.add_subparsers(dest="suite", required=True)
    commands.add_parser("report", description="Pages and plots of all results.")
    commands.add_parser("expected", description="What a GPU is expected to show, computed and not measured.")
    cpu.add_arguments(commands.add_parser("cpu", description=cpu.__doc__))
    suite = None
    for name, module in SUITES.items():
        command = commands.add_parser(name)
        if name in arguments[:1]:
            suite = importlib.import_module(module)
            command.description = suite.__doc__
            command.add_argument("--shape", action="append", choices=list(suite.SHAPES), help="default: all but smoke")
            command.add_argument("--rounds", type=int, default=suite.ROUNDS)
            command.add_argument("--json", type=Path, help="write the figures here")
            suite.add_arguments(command)
    options = parser.parse_args(arguments)
    if suite is not None and not options.shape:
        default_shapes = getattr(suite, "default_shapes", None)
        every = [name for name in suite.SHAPES if name != "smoke"]
        options.shape = every if default_shapes is None else default_shapes(options)
    return options, suite


def run_suite(suite: ModuleType, options: argparse.Namespace, report: Report) -> None:
    """Run a suite with its options."""
    torch.set_num_threads(1 if options.shape == ["smoke"] else 2)  # smoke: quick on a busy machine too
    suite.run(options, report)


def main() -> int:
    """Run what is asked for."""
    options, suite = parsed(sys.argv[1:])
    if suite is not None:
        try:
            run_suite(suite, options, Report(options.json))
        except BadOption as error:
            print(f"python -m benchmarks {options.suite}: {error}", file=sys.stderr)
            return 2
    elif options.suite == "cpu":
        return cpu.run(options, SUITES)
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
