"""The files of results: one a run of a suite, named ``<device>-<date>[-suite].json``."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# a suite's name and where its rows are in the file
ROWS = {
    "loss": ("loss",),
    "step": ("step",),
    "pack": ("packing",),
    "evaluate": ("likelihood", "generation"),
    "start": ("start",),
}
NAME = re.compile(r"(?P<device>[\w-]+?)-(?P<date>\d{4}-\d\d-\d\d)(?:-(?P<suite>[a-z-]+))?")


@dataclass(frozen=True)
class Result:
    """A file, read."""

    file: str  # its name
    suite: str
    record: dict[str, Any]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What was measured."""
        return [row for key in ROWS[self.suite] for row in self.record.get(key, [])]

    @property
    def machine(self) -> dict[str, Any]:
        """Of the run: device, versions, date, commit, command."""
        machine: dict[str, Any] = self.record["machine"]
        return machine

    @property
    def on_gpu(self) -> bool:
        """Whether the machine had one."""
        return "gpu" in self.machine

    @property
    def described(self) -> str:
        """The conditions, in a sentence."""
        m = self.machine
        device = m.get("gpu") or f"{m['threads']} threads, {m['processor']}"
        said = [device, f"torch {m['torch']}"]
        said += [f"{name} {version}" for name, version in m.get("rivals", {}).items()]
        if "load_average" in m:
            end = self.record.get("load_average_at_end", m["load_average"])
            said.append(f"load average {m['load_average']:.1f} at the start, {end:.1f} at the end")
        return f"{', '.join(said)}, {m['date']}, commit {m['commit'][:12]}. `{m['command']}`"


def read(folder: Path) -> list[Result]:
    """Return every file of the folder that has rows of a known suite, oldest first.

    Raises:
        ValueError: a name that is not ``<device>-<date>[-suite].json``.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        if NAME.fullmatch(path.stem) is None:
            raise ValueError(f"`{path.name}`: expected <device>-<date>[-suite].json; rename the file")
        record = json.loads(path.read_text(encoding="utf-8"))
        every = (Result(path.name, suite, record) for suite in ROWS)
        found += [result for result in every if result.rows]
    return sorted(found, key=lambda result: (result.machine["date"], result.machine.get("time", ""), result.file))


def newest(found: list[Result], suite: str, *, gpu: bool) -> Result | None:
    """Return the last result of a suite on the kind of device, or None."""
    own = [result for result in found if result.suite == suite and result.on_gpu == gpu]
    return own[-1] if own else None
