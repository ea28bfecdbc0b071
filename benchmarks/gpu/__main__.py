"""Measure on a borrowed GPU with ``python -m benchmarks.gpu CALL``, after ``python -m benchmarks.gpu prepare``.

The exit code is 1 if a section failed, was stopped or measured nothing.
"""

import argparse
import dataclasses
import signal
import sys
from pathlib import Path

from benchmarks.gpu import prepare
from benchmarks.gpu.driver import Driver
from benchmarks.gpu.section import RESULTS
from benchmarks.gpu.sections import CALLS
from benchmarks.harness.shared import BadOption


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    prepare.add_arguments(commands.add_parser("prepare", description=prepare.__doc__))
    for number, call in CALLS.items():
        listed = ", ".join(section.name for section in call.sections)
        command = commands.add_parser(str(number), description=f"{listed}; {call.seconds:.0f} seconds at most.")
        command.add_argument(
            "--out", type=Path, default=Path("gpu-out"), help="folder for the results (default: gpu-out)"
        )
        command.add_argument("--section", action="append", choices=[each.name for each in call.sections])
        command.add_argument("--seconds", type=float, help="time limit instead of the call's default")
        command.add_argument(
            "--smoke", action="store_true", help="run tiny shapes on the CPU, to check that every section works"
        )
    options = parser.parse_args()
    if options.command == "prepare":
        try:
            return prepare.run(options)
        except BadOption as error:
            print(f"python -m benchmarks.gpu prepare: {error}", file=sys.stderr)
            return 2
    call = CALLS[int(options.command)]
    chosen = tuple(each for each in call.sections if not options.section or each.name in options.section)
    seconds = options.seconds or (call.seconds if not options.smoke else 20 * call.seconds)
    if options.smoke:
        chosen = tuple(dataclasses.replace(each, seconds=20 * each.seconds) for each in chosen)
    for sent in (signal.SIGTERM, signal.SIGHUP):  # so that an interrupted driver also stops its sections
        signal.signal(sent, signal.default_int_handler)
    call = dataclasses.replace(call, seconds=seconds, sections=chosen)
    try:
        driver = Driver(options.out, smoke=options.smoke)
    except OSError as error:
        print(f"python -m benchmarks.gpu {options.command}: --out: {error}", file=sys.stderr)
        return 2
    try:
        ended = driver.run(call)
    except KeyboardInterrupt:
        print(f"interrupted; the results so far are in {options.out / RESULTS}", flush=True)
        return 130
    print(f"{options.out / RESULTS}", flush=True)
    return 0 if all(each.good for each in ended) else 1


if __name__ == "__main__":
    sys.exit(main())
