"""``python -m benchmarks loss``: print the table, and write it as JSON."""

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.loss import SHAPES, as_json, measure, row_pass_alone


def _machine() -> dict[str, object]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit,
        "command": "python -m benchmarks " + " ".join(sys.argv[1:]),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    wanted = ("model name", "cpu family", "model")
    found = {key.strip(): value.strip() for key, value in fields.items()}
    return ", ".join(f"{key} {found[key]}" for key in wanted if key in found)


def main() -> int:
    """Run a suite."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("suite", choices=["loss"])
    parser.add_argument("--shape", action="append", choices=list(SHAPES), help="default: all but smoke")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--errors", action="store_true", help="also compare every gradient with fp64 (slow)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(2)
    console = Console(width=120)
    record: dict[str, object] = {"machine": _machine(), "loss": []}
    rows, notes = [], set()
    for shape in options.shape or [name for name in SHAPES if name != "smoke"]:
        n, d, v, dtype = SHAPES[shape]
        measured, missing = measure(shape, options.rounds, errors=options.errors)
        rows += measured
        notes.update(missing)
        table = Table(title=f"{shape}: NPO forward + backward, N {n}, D {d}, V {v}, {dtype}, {options.rounds} rounds")
        for heading in ("provider", "GEMMs", "median ms", "low", "high", "x floor", "error dh", "error dW"):
            table.add_column(heading, justify="left" if heading == "provider" else "right", no_wrap=True)
        for row in measured:
            errors = ["" if e is None else f"{e:.1e}" for e in (row.error_dh, row.error_dw)]
            times = [f"{value:.1f}" for value in (row.median_ms, row.low_ms, row.high_ms)]
            table.add_row(row.provider, str(row.gemms), *times, f"{row.against_floor:.3f}", *errors)
        console.print(table)
        record["loss"] = as_json(rows)
        _write(record, options.json)  # after every shape: a run that is stopped keeps what it measured
    alone = row_pass_alone(options.rounds)
    for name, value in alone.items():
        console.print(f"{name}, (1024, 32000) bf16: {value:.2f} ms")
    for note in sorted(notes):
        console.print(f"not measured: {note}")
    record["row_pass_ms"] = alone
    _write(record, options.json)
    return 0


def _write(record: dict[str, object], path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
