"""What a run of a suite leaves behind: tables on the screen, and a JSON file with the machine beside the rows."""

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
except ImportError:  # a borrowed machine with torch and little else: plain lines will do
    Console = None  # type: ignore[assignment, misc]

_PROCESSOR = ("model name", "cpu family", "model")
_RIVALS = ("transformers", "triton", "liger-kernel", "cut-cross-entropy", "quack-kernels", "trl")  # providers' packages


class Report:
    """Prints, and writes the JSON file anew at every ``save``: a run that is stopped keeps what it measured."""

    def __init__(self, path: Path | None, arguments: Sequence[str] | None = None) -> None:
        """``arguments``: of ``python -m benchmarks``, where the process was started otherwise."""
        self._path = path
        self._console = None if Console is None else Console(width=170)
        self._record: dict[str, object] = {"machine": machine(sys.argv[1:] if arguments is None else arguments)}

    def table(self, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table; its first column holds names, the others figures."""
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
        """Print a line."""
        (print if self._console is None else self._console.print)(text)

    def save(self, **figures: object) -> None:
        """Add entries to the record and write it; rows of results are dataclasses."""
        self._record.update({name: plain(value) for name, value in figures.items()})
        self._record["load_average_at_end"] = os.getloadavg()[0]
        if self._path is not None:
            self._path.write_text(json.dumps(self._record, indent=2) + "\n", encoding="utf-8")


def plain(value: Any) -> Any:
    """Return a list of rows as JSON holds them, and anything else as it is."""
    if not isinstance(value, list):
        return value
    return [asdict(row) if is_dataclass(row) and not isinstance(row, type) else row for row in value]


def cells(form: str, *values: float | None) -> list[str]:
    """Return figures as a table shows them; nothing for one that was not measured."""
    return ["" if value is None else format(value, form) for value in values]


def said(error: BaseException) -> str:
    """Return an error in a line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def machine(arguments: Sequence[str]) -> dict[str, object]:
    """Return what the figures depend on besides the code, and the code's commit."""
    known = processor()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "time": time.strftime("%H:%M:%S"),
        "processor": ", ".join(f"{key} {known[key]}" for key in _PROCESSOR if key in known) or platform.processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],  # of the minute before
        "rivals": versions(_RIVALS),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
        "command": "python -m benchmarks " + shlex.join(arguments),
        **_gpu(),
    }


def commit() -> str:
    """Return the code's commit: as the driver of a borrowed GPU says it, or git; empty where neither knows."""
    if given := os.environ.get("EFFACE_COMMIT"):
        return given
    try:
        asked = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:  # no git
        return ""
    return asked.stdout.strip()


def _gpu() -> dict[str, object]:
    """Return the first GPU, its driver and its clocks at this moment; nothing without one."""
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
    """Return the first GPU's clock, power and temperature at this moment, as its tool says them."""
    return gpu_says("clocks.sm,power.draw,temperature.gpu")


def gpu_says(fields: str) -> str:
    """Return what nvidia-smi says of these fields of the first GPU; nothing where it is missing or hangs."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def versions(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed: of two, that of the one that is imported."""
    found = {name: list(importlib.metadata.distributions(name=name)) for name in names}
    return {name: each[0].version for name, each in found.items() if each}  # in the order of the path


def processor() -> dict[str, str]:
    """Return what Linux says of the processor; nothing elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines) if value}
