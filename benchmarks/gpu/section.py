"""The process of a section: ``python -m benchmarks.gpu.section FOLDER NAME MODULE [ARGUMENT ...]``.

It imports MODULE at once, while the previous section is still measuring, and calls ``imports(arguments)`` of the
module, if defined, for further imports. Neither uses the GPU. It then waits for a line on stdin with the time limit in
seconds, and calls ``run`` or, for ``MODULE:FUNCTION``, that function.
"""

import importlib
import json
import math
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

RESULTS = "results.jsonl"
SMOKE = "EFFACE_GPU_SMOKE"  # set for runs without a GPU: tiny shapes on the CPU
COMMIT = "EFFACE_COMMIT"
_LATE = 15.0  # seconds after the deadline by which the driver has certainly ended a section


@dataclass(frozen=True)
class Run:
    """The parameters of a section's run.

    Attributes:
        name: name of the section.
        folder: for output files; only a few, since a borrowed machine returns few files.
        arguments: of the section in this call.
        device: "cuda", or "cpu" for a smoke test with tiny shapes.
        deadline: on the clock of ``time.monotonic``; the section is stopped then.
    """

    name: str
    folder: Path
    arguments: tuple[str, ...] = ()
    device: str = "cuda"
    deadline: float = float("inf")

    @property
    def smoke(self) -> bool:
        """Whether this is a smoke test, which measures nothing."""
        return self.device == "cpu"

    def row(self, said: str = "", **figures: object) -> None:
        """Append a row to the results file at once, so that a run that is killed keeps it.

        Args:
            said: one line that describes the row, printed by the driver; empty for most rows.
            **figures: values that can be serialised as JSON.
        """
        head = {
            "section": self.name,
            "commit": os.environ.get(COMMIT, ""),
            "gpu": card(self.device),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "said": said,
        }
        if taken := sorted(head.keys() & figures.keys()):
            raise ValueError(f"`figures`: expected names of new columns, got {', '.join(taken)}; rename them")
        line = json.dumps(head | figures)
        with (self.folder / RESULTS).open("a", encoding="utf-8") as file:
            file.write(line + "\n")  # the file is closed, and so flushed, after every row


def card(device: str) -> str:
    """Return the GPU's name, or an empty string on a CPU."""
    if device == "cpu":
        return ""
    import torch  # noqa: PLC0415 - a section that fails to import torch can still write rows

    return torch.cuda.get_device_name(0)


def main(folder: str, name: str, module: str, *arguments: str) -> None:
    place, _, function = module.partition(":")
    section = importlib.import_module(place)
    getattr(section, "imports", lambda _: None)(arguments)
    seconds = float(sys.stdin.readline())
    signal.alarm(math.ceil(seconds + _LATE))  # ends the section even if the driver was killed
    deadline = seconds + time.monotonic()
    device = "cpu" if os.environ.get(SMOKE) == "1" else "cuda"
    getattr(section, function or "run")(Run(name, Path(folder), arguments, device, deadline))


if __name__ == "__main__":
    main(*sys.argv[1:])
