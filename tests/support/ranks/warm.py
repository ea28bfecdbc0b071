"""A process that imports what scripts need once, and forks for each: imports are most of the time of a short one.

Reads requests, a JSON object a line; answers with the number of the process that serves it, and then its exit code.
"""

import gc
import json
import os
import runpy
import sys
from typing import Any

import datasets  # noqa: F401
import torch._dynamo
import torch.distributed.run

import efface.cli.evaluate
import efface.cli.unlearn  # noqa: F401


def serve() -> dict[str, Any] | None:
    """Serve one request after the other; return one in the process that has to do it, None at the end."""
    while line := sys.stdin.readline():
        child = os.fork()
        if child == 0:
            request: dict[str, Any] = json.loads(line)
            return request
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return None


def become(words: list[str], processes: int, environment: dict[str, str], folder: str, files: list[str]) -> None:
    """Be what was asked for, in a group of processes of its own; its output goes to the files."""
    os.setsid()
    for stream, name in enumerate((os.devnull, *files)):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    ranks = ["--standalone", f"--nproc-per-node={processes}"]
    if words[0] == "-m":
        os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", *ranks, *words])
    if processes:
        torch.distributed.run.main(["--run-path", "--start-method=fork", *ranks, *words])
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    gc.freeze()  # a child neither looks through what was imported nor copies it
    request = serve()
    if request is not None:
        become(**request)
