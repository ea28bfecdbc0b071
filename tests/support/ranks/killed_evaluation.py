"""Evaluations that are killed and restarted. This process imports once and forks for every run.

``python killed_evaluation.py <folder> <words of the command as JSON>`` prints a JSON record: the number of batches that
each run began before it sent itself SIGKILL, which it cannot catch, or ended. If torchrun starts the script, each
process writes the number of batches that it began to ``rank<n>.note`` and is not killed.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from efface.cli.main import main
from efface.evaluate import AnswerTask, GenerationTask


def count_batches(note: Path, last: int | None) -> None:
    """Write the number of batches begun to ``note``; kill the process in batch ``last``, before it is stored."""
    begun = 0
    for task in (AnswerTask, GenerationTask):

        def run(self: Any, model: Any, rows: Any, run: Any = task.run) -> Any:
            nonlocal begun
            begun += 1
            note.write_text(str(begun))
            result = run(self, model, rows)
            if begun == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        task.run = run  # type: ignore[method-assign]


def evaluate(words: list[str], out: Path, last: int | None) -> tuple[int, int]:
    """Run the command in a child process; return its exit code and the number of batches that it began."""
    note = out.with_suffix(".note")
    note.write_text("0")
    child = os.fork()
    if child == 0:
        log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        count_batches(note, last)
        os._exit(main([*words, "--output", str(out)]))
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), int(note.read_text())


def drive(folder: Path, words: list[str]) -> dict[str, Any]:
    code, batches = evaluate(words, folder / "undisturbed", None)
    begun: list[int] = []
    for last in (3, 1, batches // 2, None):
        if code:
            break
        code, count = evaluate(words, folder / "killed", last)
        begun.append(count)
        code = 0 if code == -signal.SIGKILL and last is not None else code
    logs = {path.name: path.read_text() for path in folder.glob("*.log")} if code else {}
    return {"code": code, "batches": batches, "begun": begun, "logs": logs}


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        count_batches(Path(sys.argv[1], f"rank{os.environ['RANK']}.note"), None)
        sys.exit(main(json.loads(sys.argv[2])))
    print(json.dumps(drive(Path(sys.argv[1]), json.loads(sys.argv[2]))))
