"""Runs of ``efface unlearn`` that are killed and restarted. This process imports once and forks for every run.

``python killed_run.py <folder> <words of the command as JSON>`` prints a JSON record. A run is killed at a random
moment: a training step, or an open, rename, creation or removal of a file or folder in the output folder. The process
sends itself SIGKILL, which it cannot catch.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import datasets  # noqa: F401 - imported here, so that the children need not import it
import torch
import torch._dynamo

from efface.cli.main import main
from efface.hf.train.trainer import UnlearnTrainer

KILLS = 10


class Moments:
    """A counter of the moments of a run that kills the process at the chosen one."""

    def __init__(self, folder: Path, last: int | None, only_steps: bool, note: Path) -> None:
        self.folder, self.last, self.only_steps, self.note, self.count = str(folder), last, only_steps, note, 0
        step = UnlearnTrainer.training_step

        def counted(trainer: UnlearnTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
            self.pass_by("step")
            return step(trainer, *args, **kwargs)

        UnlearnTrainer.training_step = counted  # type: ignore[method-assign]
        sys.addaudithook(self.hear)

    def hear(self, event: str, args: tuple[Any, ...]) -> None:
        watched = event in {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}
        if watched and args and isinstance(args[0], (str, os.PathLike)) and str(args[0]).startswith(self.folder):
            self.pass_by(f"{event} {os.path.relpath(args[0], self.folder)}")

    def pass_by(self, what: str) -> None:
        if self.only_steps and what != "step":
            return
        self.count += 1
        if self.count == self.last:
            self.note.write_text(what)
            os.kill(os.getpid(), signal.SIGKILL)


def run(words: list[str], out: Path, last: int | None, only_steps: bool = False) -> tuple[int, str]:
    """Run the command in a child; return its exit code, and where it was killed or how many moments it had."""
    note = out.with_suffix(".note")
    child = os.fork()
    if child == 0:
        log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        moments = Moments(out, last, only_steps, note)
        code = main([*words, "--output_dir", str(out)])
        note.write_text(str(moments.count))
        os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), note.read_text() if note.exists() else ""


def drive(folder: Path, words: list[str]) -> dict[str, Any]:
    code, moments = run(words, folder / "undisturbed", None)
    if code:
        return {"failed": (folder / "undisturbed.log").read_text()}
    lot, where = random.Random(6), []
    began = time.perf_counter()
    while True:
        # Bounds that let ten kills spread over the whole run. Every third kill happens in a training step.
        only_steps = len(where) % 3 == 0
        last = lot.randint(1, 3 if only_steps else int(moments) // 4) if len(where) < KILLS else None
        code, what = run(words, folder / "killed", last, only_steps)
        if code == 0:
            return {"where": where, "moments": int(moments), "seconds": time.perf_counter() - began}
        if code != -signal.SIGKILL:
            return {"failed": (folder / "killed.log").read_text(), "where": where}
        where.append(what)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(drive(Path(sys.argv[1]), json.loads(sys.argv[2]))))
