"""The driver of a call: runs each section in a subprocess with a time limit, and prints what it measured.

The driver does not import torch. The next section's process imports it while the current section measures.
"""

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.gpu import precompile, prepare
from benchmarks.gpu.section import COMMIT, RESULTS, SMOKE
from benchmarks.gpu.sections import Call, Section

Process: TypeAlias = "subprocess.Popen[bytes]"
_GRACE = 3.0  # seconds from SIGTERM to SIGKILL, and again to giving up
_FEWEST_SECONDS = 3.0  # time left below which a section is not started
_PRINTED = 60  # most lines printed per section
_WIDEST = 500  # most characters printed per line
_TAIL = 16384  # bytes at the end of a log, of which the last lines are printed


@dataclass(frozen=True)
class Ended:
    """The outcome of a section."""

    section: Section
    status: str
    seconds: float
    rows: int

    @property
    def good(self) -> bool:
        """Whether the section exited with code 0 and measured something."""
        return self.status == "ended" and self.rows > 0


class Driver:
    """Runs sections in a folder. Their rows go to ``results.jsonl``, the output of each section to ``NAME.log``."""

    def __init__(self, folder: Path, *, smoke: bool = False, path: Sequence[Path] = ()) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder.resolve()
        (self._folder / RESULTS).touch()  # fail now if the folder is not writable
        self._environment = environment(smoke=smoke, path=path)
        self._building: Process | None = None

    def run(self, call: Call) -> list[Ended]:
        """Run the call's sections, even after failures; print the rows of each, and a summary at the end."""
        deadline = time.monotonic() + call.seconds
        ended: list[Ended] = []
        waiting: Process | None = None  # process of the next section, already importing
        self._build()
        try:
            for section, following in itertools.zip_longest(call.sections, call.sections[1:]):
                if section.native:
                    self._finish_building(deadline)
                process, waiting = waiting or self._start(section), None
                if following is not None and not (following.native and self._building):
                    waiting = self._start(following)
                ended.append(self._one(section, process, min(section.seconds, deadline - time.monotonic())))
            self._finish_building(deadline)
        finally:
            for left in (waiting, self._building):
                if left is not None:
                    end(left)
        print(table(ended), flush=True)
        return ended

    def _start(self, section: Section) -> Process:
        command = [sys.executable, "-m", "benchmarks.gpu.section", str(self._folder), section.name, section.imported]
        return self._begin([*command, *section.arguments], section.name)

    def _begin(self, command: Sequence[str], name: str) -> Process:
        """Start a process in a new process group, so that its children can be ended with it.

        It is not a new session: a session would outlive the driver.
        """
        with self._log(name).open("ab") as log:
            return subprocess.Popen(
                command,
                cwd=prepare.ROOT,
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=os.setpgrp,  # noqa: PLW1509 - the driver has one thread
            )

    def _log(self, name: str) -> Path:
        """Return the log of a process. Each has a separate one, because two sections run at the same time."""
        return self._folder / f"{name}.log"

    def _one(self, section: Section, process: Process, limit: float) -> Ended:
        rows, begin = self._rows_from(self._size()), time.monotonic()
        if limit < _FEWEST_SECONDS:
            end(process)
            return Ended(section, "no time left", 0.0, 0)
        print(f"--- {section.name} (at most {limit:.0f} s)", flush=True)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it failed during its imports
            process.stdin.write(f"{limit}\n".encode())
            process.stdin.close()
        try:
            code = process.wait(limit)
            status = "ended" if code == 0 else f"failed, exit {code}"
        except subprocess.TimeoutExpired:
            status = "stopped at its limit"
        finally:
            end(process)  # end children that it left running
        count = printed = 0
        for row in rows:
            if row.get("section") != section.name:
                continue
            count += 1
            if row["said"] and printed < _PRINTED:
                printed += 1
                print(row["said"][:_WIDEST], flush=True)
        if status.startswith("failed"):
            print(f"{section.name}: {status}; the end of {section.name}.log:\n{self._tail(section.name)}", flush=True)
        return Ended(section, status, time.monotonic() - begin, count)

    def _size(self) -> int:
        """Return the size of the results file, after ending a truncated last line with a newline."""
        path = self._folder / RESULTS
        if not path.exists():
            return 0
        with path.open("rb+") as file:
            if size := file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                size += file.write(b"\n") if file.read(1) != b"\n" else 0
        return size

    def _rows_from(self, offset: int) -> Iterator[dict[str, Any]]:
        """Yield the rows after an offset, reading lazily; skip truncated lines."""
        path = self._folder / RESULTS
        if not path.exists():
            return
        for line in path.read_bytes()[offset:].splitlines():
            with contextlib.suppress(ValueError):
                yield json.loads(line)

    def _tail(self, name: str) -> str:
        with self._log(name).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            lines = file.read().decode(errors="replace").splitlines()[-6:]
        return "\n".join(line[:_WIDEST] for line in lines)

    def _native(self) -> bool:
        command = [sys.executable, "-c", f"import {prepare.EXTENSION}"]  # fails if built for another system
        done = subprocess.run(command, cwd=prepare.ROOT, env=self._environment, check=False, capture_output=True)
        return done.returncode == 0

    def _build(self) -> None:
        """Start to build the extension if it cannot be imported, in parallel with the sections that do not need it."""
        if self._native():
            return
        self._building = self._begin(prepare.build_command(self._folder), prepare.EXTENSION)

    def _finish_building(self, deadline: float) -> None:
        if self._building is None:
            return
        process, self._building = self._building, None
        try:
            code = process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            code = -1
        finally:
            end(process)
        built = sorted(self._folder.glob(f"{prepare.EXTENSION}*.so"))
        if code or not built:
            print(f"the extension could not be built: exit {code}, see {prepare.EXTENSION}.log", flush=True)
            return
        site = prepare.CARRIED / prepare.SITE
        site.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(built[0], site / built[0].name)
        print(f"{built[0].name}: built here; pass it to `prepare --extension` before the next call", flush=True)


def environment(*, smoke: bool, path: Sequence[Path] = ()) -> dict[str, str]:
    """Return the environment of the sections: import path, no network, commit, Triton cache and TOFU folder."""
    root = prepare.ROOT
    places = [root / "engine", root / "kernels", root, prepare.CARRIED / prepare.SITE, *path]
    known = os.environ.get("PYTHONPATH", "")
    given = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*map(str, places), *([known] if known else [])]),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        COMMIT: prepare.commit(),
    }
    kernels = prepare.CARRIED / prepare.KERNELS
    if kernels.is_dir() and not smoke and "TRITON_CACHE_DIR" not in os.environ:
        cache = Path(tempfile.mkdtemp(prefix="efface-triton-"))
        precompile.unpack(kernels, cache)
        given["TRITON_CACHE_DIR"] = str(cache)
    tofu = prepare.CARRIED / prepare.TOFU
    if tofu.is_dir():
        given.setdefault("EFFACE_TOFU", str(tofu))
    if smoke:
        given |= {SMOKE: "1", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return given


def end(process: Process) -> None:
    """End a process and its group: SIGTERM first, then SIGKILL."""
    for sent, patience in ((signal.SIGTERM, _GRACE), (signal.SIGKILL, _GRACE)):
        try:
            os.killpg(process.pid, sent)
        except (ProcessLookupError, PermissionError):
            break
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            continue
    with contextlib.suppress(subprocess.TimeoutExpired):  # a process stuck in the GPU's driver must not block this one
        process.wait(_GRACE)
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()


def table(ended: Sequence[Ended]) -> str:
    """Return a table with the outcome of every section."""
    lines = [f"{'section':12} {'rows':>5} {'seconds':>8} {'limit':>6}  how it ended"]
    for each in ended:
        status = each.status if each.rows or each.status != "ended" else "measured nothing"
        lines.append(f"{each.section.name:12} {each.rows:5} {each.seconds:8.1f} {each.section.seconds:6.0f}  {status}")
    return "\n".join(lines)
