"""One trial, in a process of its own: what fails, or runs out of memory, ends that trial and nothing else.

``python -m efface.cli.trial '[["unlearn", ...], ["evaluate", ...]]'``; when its standard input ends, because the
sweep is gone, however that went, the trial stops as by Ctrl-C.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from efface.cli.main import main
from efface.cli.run_folder import RECORD


def carry_out(words: Sequence[str], evaluation: Sequence[str] | None) -> int:
    """Run ``efface unlearn`` with the words, if it has not finished there, then ``efface evaluate``; its exit code."""
    folder = next(Path(word.partition("=")[2]) for word in reversed(words) if word.startswith("--output_dir="))
    code = 0 if _finished(folder) else main(["unlearn", *words])
    if code or evaluation is None:
        return code
    return main(["evaluate", f"--model={folder}", f"--output={folder / 'evaluation'}", *evaluation])


def _finished(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / RECORD).read_text(encoding="utf-8"))["finished"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


class TrialProcess:
    """A trial's process."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process

    def poll(self) -> int | None:
        """Return its exit code, or None while it runs."""
        return self._process.poll()

    def stop(self) -> None:
        """Ask it to end, and wait; one that does not listen is killed."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()


@dataclass(frozen=True)
class Subprocesses:
    """Starts every trial in a process.

    Attributes:
        evaluation: words of ``efface evaluate``, for runs without a recipe that says how they are judged.
    """

    evaluation: Sequence[str] | None = None

    def __call__(self, words: Sequence[str], log: Path, environment: Mapping[str, str], lock: int) -> TrialProcess:
        """Start a trial; see ``efface.sweep.Launcher``."""
        command = [sys.executable, "-m", __spec__.name, json.dumps([list(words), self.evaluation])]
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            process = subprocess.Popen(  # noqa: S603 - our own command
                command,
                stdin=subprocess.PIPE,  # never written to: it ends when this process does
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                pass_fds=(lock,),
                start_new_session=True,  # Ctrl-C is for the sweep, which then stops its trials
            )
        return TrialProcess(process)


def _stop_with_the_sweep() -> None:
    def wait() -> None:
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    _stop_with_the_sweep()
    sys.exit(carry_out(*json.loads(sys.argv[1])))
