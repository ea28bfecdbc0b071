"""Scripts and commands of ``ranks/`` in processes of their own."""

import os
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

RANKS = Path(__file__).parent / "ranks"
ROOT = RANKS.parents[2]


LIMIT = 240  # seconds; a launch takes about ten alone, twenty beside other tests


def environment(**more: str) -> dict[str, str]:
    """The variables of a process that imports this checkout and ``support``, on one thread."""
    path = os.pathsep.join(str(ROOT / folder) for folder in ("engine", "kernels", "tests"))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def launch(processes: int, words: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a script or module (``-m``) on several processes; where they hang, fail with what each of them was doing.

    A module is started as users do. The ranks of a script share their imports, which are half of the time.
    """
    forked = [str(RANKS / "warm_torchrun.py"), "--run-path", "--start-method=fork"]
    launcher = ["-m", "torch.distributed.run"] if words[0] == "-m" else forked
    launcher += ["--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *launcher, *words]
    running = subprocess.Popen(
        command,
        env=environment(PYTHONFAULTHANDLER="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, errors = running.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        ranks = Path(f"/proc/{running.pid}/task/{running.pid}/children")
        for rank in ranks.read_text().split() if ranks.is_file() else []:
            with suppress(ProcessLookupError):
                os.kill(int(rank), signal.SIGABRT)  # faulthandler writes the stacks of all threads
        with suppress(subprocess.TimeoutExpired):
            _, errors = running.communicate(timeout=40)
            pytest.fail(f"still running after {LIMIT} s: {shlex.join(command)}\n{errors}")
        pytest.fail(f"still running after {LIMIT} s, and after SIGABRT: {shlex.join(command)}")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, running.returncode, out, errors)
