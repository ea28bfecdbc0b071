"""Launching of the scripts and commands in ``ranks/`` as subprocesses."""

import functools
import json
import os
import select
import shlex
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest

RANKS = Path(__file__).parent / "ranks"
ROOT = RANKS.parents[2]


LIMIT = 240  # seconds; a launch takes about 10 s alone, 20 s when other tests run


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a subprocess that imports this checkout and ``support``, limited to one thread."""
    path = os.pathsep.join(str(ROOT / folder) for folder in ("engine", "kernels", "tests"))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


@functools.cache
def _warm() -> subprocess.Popen[bytes]:
    """Start the process that forks for each script. It exits when this process ends and its stdin is closed."""
    # unbuffered: a buffered read could take the next line too, and select would not see it
    return subprocess.Popen(
        [sys.executable, str(RANKS / "warm.py")],
        env=environment(PYTHONFAULTHANDLER="1"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
    )


def launch(processes: int, words: list[str], *, limit: float = LIMIT) -> subprocess.CompletedProcess[str]:
    """Run a script or module (``-m``) on several processes. With ``processes=0``, run a script alone, without torchrun.

    A module is started as users start it. A script runs in a fork of a process that has imported most dependencies.
    After ``limit`` seconds the test fails with the stack of each process.
    """
    server = _warm()
    assert server.stdin is not None
    assert server.stdout is not None
    answers = server.stdout
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("out", "errors")]
        request = {"words": words, "processes": processes, "environment": environment(PYTHONFAULTHANDLER="1")}
        request |= {"folder": str(Path.cwd()), "files": list(map(str, files))}
        server.stdin.write(json.dumps(request).encode() + b"\n")
        child = int(answers.readline())
        try:
            hangs = not select.select([answers], [], [], limit)[0]
            if hangs:
                ranks = Path(f"/proc/{child}/task/{child}/children")
                for rank in ranks.read_text().split() if processes and ranks.is_file() else [child]:
                    with suppress(ProcessLookupError):
                        os.kill(int(rank), signal.SIGABRT)  # faulthandler prints the stacks of all threads
                select.select([answers], [], [], 40)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            code = int(answers.readline())
        out, errors = (path.read_text(errors="replace") for path in files)
    if hangs:
        pytest.fail(f"still running after {limit} s: {shlex.join(words)}\n{errors}")
    return subprocess.CompletedProcess(words, code, out, errors)
