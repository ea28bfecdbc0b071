"""``python -m benchmarks SUITE``: print a suite's tables, and write its figures as JSON."""

import argparse
import sys
from pathlib import Path

import torch

from benchmarks import cpu
from benchmarks.loss import suite as loss
from benchmarks.packing import suite as packing
from benchmarks.report import Report
from benchmarks.start import suite as start
from benchmarks.step import suite as step

# A suite has SHAPES (the one called "smoke" only on demand), ROUNDS, add_arguments(parser) and run(options, report);
# where the shapes depend on the options, default_shapes(options).
SUITES = {"loss": loss, "pack": packing, "step": step, "start": start}


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
    cpu.add_arguments(commands.add_parser("cpu", description=cpu.__doc__))
    options = parser.parse_args()
    if options.suite == "cpu":
        return cpu.run(options, SUITES)
    suite = SUITES[options.suite]
    if not options.shape:
        default_shapes = getattr(suite, "default_shapes", None)
        every = [name for name in suite.SHAPES if name != "smoke"]
        options.shape = every if default_shapes is None else default_shapes(options)
    torch.set_num_threads(1 if options.shape == ["smoke"] else 2)  # smoke: quick on a busy machine too
    suite.run(options, Report(options.json))
    return 0


if __name__ == "__main__":
    sys.exit(main())
