"""``python -m benchmarks SUITE``: a suite's tables, and its figures as JSON. ``report``: pages and plots of all.

``expected``: what a GPU is expected to show, computed.
"""

import argparse
import importlib
import sys
from pathlib import Path

import torch

from benchmarks import cpu
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


def main() -> int:
    """Run a suite."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    commands = parser.add_subparsers(dest="suite", required=True)
    commands.add_parser("report", description="Pages and plots of all results.")
    commands.add_parser("expected", description="What a GPU is expected to show, computed and not measured.")
    cpu.add_arguments(commands.add_parser("cpu", description=cpu.__doc__))
    for name, module in SUITES.items():
        command = commands.add_parser(name)
        if name in sys.argv[1:2]:
            suite = importlib.import_module(module)
            command.description = suite.__doc__
            command.add_argument("--shape", action="append", choices=list(suite.SHAPES), help="default: all but smoke")
            command.add_argument("--rounds", type=int, default=suite.ROUNDS)
            command.add_argument("--json", type=Path, help="write the figures here")
            suite.add_arguments(command)
    options = parser.parse_args()
    if options.suite == "cpu":
        return cpu.run(options, SUITES)
    if options.suite == "expected":
        expected = importlib.import_module("benchmarks.expected")
        report = Report(None)
        report.table("Computed, not measured; milliseconds", expected.HEADINGS, expected.table())
        report.note(expected.assumptions())
        report.table("Computed, not measured; MiB", expected.MEMORY_HEADINGS, expected.memory_table())
        return 0
    if options.suite == "report":
        importlib.import_module("benchmarks.publish").everything()
        return 0
    if not options.shape:
        default_shapes = getattr(suite, "default_shapes", None)
        every = [name for name in suite.SHAPES if name != "smoke"]
        options.shape = every if default_shapes is None else default_shapes(options)
    torch.set_num_threads(1 if options.shape == ["smoke"] else 2)  # smoke: quick on a busy machine too
    suite.run(options, Report(options.json))
    return 0


if __name__ == "__main__":
    sys.exit(main())
