"""``python -m benchmarks SUITE``: print a suite's tables, and write its figures as JSON."""

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.evaluate import suite as evaluate
from benchmarks.loss import suite as loss
from benchmarks.packing import suite as packing
from benchmarks.report import Report
from benchmarks.step import suite as step

# A suite has SHAPES (the one called "smoke" only on demand), ROUNDS, add_arguments(parser) and run(options, report).
SUITES = {"evaluate": evaluate, "loss": loss, "pack": packing, "step": step}


def main() -> int:
    """Run a suite."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    commands = parser.add_subparsers(dest="suite", required=True)
    for name, suite in SUITES.items():
        command = commands.add_parser(name, description=suite.__doc__)
        command.add_argument("--shape", action="append", choices=list(suite.SHAPES), help="default: all but smoke")
        command.add_argument("--rounds", type=int, default=suite.ROUNDS)
        command.add_argument("--json", type=Path, help="write the figures here")
        suite.add_arguments(command)
    options = parser.parse_args()
    suite = SUITES[options.suite]
    options.shape = options.shape or [name for name in suite.SHAPES if name != "smoke"]
    torch.set_num_threads(2)
    suite.run(options, Report(options.json))
    return 0


if __name__ == "__main__":
    sys.exit(main())
