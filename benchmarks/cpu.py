"""``python -m benchmarks cpu``: every suite on the CPU, cut short, a JSON file each; under ten minutes on two cores."""

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

RESULTS = Path(__file__).parent / "results"

# What keeps a suite's part of the ten minutes; a suite that is not named here runs as it does by itself.
ARGUMENTS: dict[str, list[str]] = {
    "evaluate": ["--quick", "--shape", "Llama 4 layers, d 128, V 8192, fp32"],
    "loss": ["--shape", "Llama-2 head, D 1024, bf16", "--rounds", "3"],
    "start": ["--rounds", "2"],
    "step": ["--rounds", "3"],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what it can be asked."""
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--name", help="their first part; default: cpu-<processor>-<date>")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes and two rounds, to see that all runs")


def run(options: argparse.Namespace, suites: Iterable[str]) -> int:
    """Run the suites one after another, each in a process of its own; return the worst of their exit codes.

    A suite that fails leaves the others their turn.
    """
    name = options.name or f"cpu-{processor()}-{time.strftime('%Y-%m-%d')}"
    options.out.mkdir(parents=True, exist_ok=True)
    worst = 0
    for suite in suites:
        begin = time.perf_counter()
        path = options.out / f"{name}-{suite}.json"
        code = subprocess.run(command(suite, path, smoke=options.smoke), check=False).returncode
        print(f"{suite}: exit {code} after {time.perf_counter() - begin:.0f} s", flush=True)
        worst = max(worst, abs(code))
    return worst


def command(suite: str, path: Path, *, smoke: bool) -> Sequence[str]:
    """Return the command of a suite."""
    chosen = ["--shape", "smoke", "--rounds", "2"] if smoke else ARGUMENTS.get(suite, [])
    return [sys.executable, "-m", "benchmarks", suite, *chosen, "--json", str(path)]


def processor() -> str:
    """Return the processor's maker and family as part of a file name, "amd-epyc" for example."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    model = next((line.split(":", 1)[1] for line in lines if line.startswith("model name")), "unknown")
    return re.sub(r"[^a-z0-9]+", "-", model.lower().replace("(r)", "").replace("(tm)", "")).strip("-")[:40]
