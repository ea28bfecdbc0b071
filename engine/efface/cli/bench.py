"""``efface bench``: run the benchmarks, which are in the repository and not in the installed package."""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import efface
from efface.flags import FlagParser

_EXAMPLES = """
examples:
  efface bench loss --shape smoke --rounds 2
  efface bench step --json step.json
  efface bench loss --help
"""


def parser() -> FlagParser:
    """Return the parser of the command's flags."""
    flags = FlagParser(
        "bench",
        "Runs `python -m benchmarks SUITE ...` in the checkout from which efface was installed (pip install -e).",
        _EXAMPLES,
    )
    flags.add_argument("suite", help="name of the suite: evaluate, loss, pack, step, ...")
    flags.add_argument("options", nargs=argparse.REMAINDER, help="flags of the suite")
    return flags


def run(argv: Sequence[str]) -> int:
    """Run the command and return its exit code.

    Raises:
        FileNotFoundError: efface was not installed from a checkout.
    """
    options = parser().parse_args(argv)
    checkout = Path(efface.__file__).resolve().parents[2]
    if not (checkout / "benchmarks" / "__main__.py").is_file():
        raise FileNotFoundError(
            "the benchmarks are not part of the installed package; git clone the repository and run "
            f"`python -m benchmarks {options.suite}` there"
        )
    path = os.pathsep.join(filter(None, [str(checkout), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "benchmarks", options.suite, *options.options]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False).returncode  # noqa: S603 - no shell
