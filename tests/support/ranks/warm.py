"""A process that imports the scripts' dependencies once and forks for each script, as most of their time is imports.

It reads requests, one JSON object a line. It answers with the PID of the child that runs it, then its exit code.
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
    """Fork for each request. Return the request in the child, or None in the parent at the end of the input."""
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
    """Run the requested command in a new session, with its output redirected to ``files``."""
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
    gc.freeze()  # the children neither scan the imported objects for garbage nor copy their pages
    request = serve()
    if request is not None:
        become(**request)
