"""Output of a suite: tables on the terminal, and a JSON file with the machine's properties in addition to the rows."""

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch

try:
    from rich.console import Console
    from rich.table import Table
except ImportError:  # a borrowed machine may have little more than torch; tables are then printed as plain lines
    Console = None  # type: ignore[assignment, misc]

_PROCESSOR = ("model name", "cpu family", "model")
# of the other implementations
_RIVALS = ("transformers", "triton", "liger-kernel", "cut-cross-entropy", "quack-kernels", "trl")


class Report:
    """Prints tables and rewrites the JSON file at every ``save``, so that an interrupted run keeps its results."""

    def __init__(self, path: Path | None, arguments: Sequence[str] | None = None) -> None:
        """``arguments`` of ``python -m benchmarks``; by default those of this process."""
        self._path = path
        self._console = None if Console is None else Console(width=170)
        self._record: dict[str, object] = {"machine": machine(sys.argv[1:] if arguments is None else arguments)}

    def table(self, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table; the first column contains names, the others numbers."""
        if self._console is None:
            print("\n".join((title, *(" | ".join(row) for row in (headings, *rows)))), flush=True)
            return
        table = Table(title=title)
        for column, heading in enumerate(headings):
            table.add_column(heading, justify="right" if column else "left", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        self._console.print(table)

    def note(self, text: str) -> None:
        (print if self._console is None else self._console.print)(text)

    def save(self, **figures: object) -> None:
        """Add entries to the record and write it. Rows of results are dataclasses."""
        self._record.update({name: plain(value) for name, value in figures.items()})
        self._record["load_average_at_end"] = os.getloadavg()[0]
        if self._path is not None:
            self._path.write_text(json.dumps(self._record, indent=2) + "\n", encoding="utf-8")


def plain(value: Any) -> Any:
    """Return a list of dataclass rows as a list of dictionaries, and any other value unchanged."""
    if not isinstance(value, list):
        return value
    return [asdict(row) if is_dataclass(row) and not isinstance(row, type) else row for row in value]


def cells(form: str, *values: float | None) -> list[str]:
    """Return formatted numbers for a table; an empty string for None."""
    return ["" if value is None else format(value, form) for value in values]


def said(error: BaseException) -> str:
    """Return an error as one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def machine(arguments: Sequence[str]) -> dict[str, object]:
    """Return the code's commit, and the properties of the machine on which the results depend."""
    known = processor()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "time": time.strftime("%H:%M:%S"),
        "processor": ", ".join(f"{key} {known[key]}" for key in _PROCESSOR if key in known) or platform.processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],  # average of the last minute
        "rivals": versions(_RIVALS),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
        "command": "python -m benchmarks " + shlex.join(arguments),
        **_gpu(),
    }


def commit() -> str:
    """Return the code's commit, from the driver of a borrowed GPU or from git; an empty string if unknown."""
    if given := os.environ.get("EFFACE_COMMIT"):
        return given
    try:
        asked = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:  # git is not installed
        return ""
    return asked.stdout.strip()


def _gpu() -> dict[str, object]:
    """Return the first GPU's name, driver and current clocks; an empty dictionary without a GPU."""
    if not torch.cuda.is_available():
        return {}
    fields = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
    asked = gpu_says(fields)
    return {
        "gpu": torch.cuda.get_device_name(0),
        "gpu_memory_gib": round(torch.cuda.get_device_properties(0).total_memory / (1 << 30), 1),
        "cuda": torch.version.cuda,
        "nvidia_smi": dict(zip(fields.split(","), (part.strip() for part in asked.split(",")), strict=False)),
        "triton": importlib.metadata.version("triton"),
    }


def gpu_clocks() -> str:
    """Return the first GPU's current clock, power and temperature from nvidia-smi."""
    return gpu_says("clocks.sm,power.draw,temperature.gpu")


def gpu_says(fields: str) -> str:
    """Return these fields of the first GPU from nvidia-smi; an empty string if it is missing or hangs."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def versions(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of the installed packages. If a package is installed twice, the imported one counts."""
    found = {name: list(importlib.metadata.distributions(name=name)) for name in names}
    return {name: each[0].version for name, each in found.items() if each}  # in the order of the import path


def processor() -> dict[str, str]:
    """Return the fields of /proc/cpuinfo; an empty dictionary on systems other than Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines) if value}
