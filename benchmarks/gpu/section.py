"""A section's process: ``python -m benchmarks.gpu.section FOLDER NAME MODULE [ARGUMENT ...]``.

The module is imported at once, while the section before is still measuring, and so is what its ``imports(arguments)``
imports, if it has one; no GPU is touched. ``run``, or what MODULE names behind a colon, begins when a line comes in:
the seconds after which the driver ends it.
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
SMOKE = "EFFACE_GPU_SMOKE"  # set where there is no GPU: tiny shapes on the CPU
COMMIT = "EFFACE_COMMIT"
_LATE = 15.0  # seconds after its deadline in which the driver has surely ended a section


@dataclass(frozen=True)
class Run:
    """What a section is given.

    Attributes:
        name: the section's.
        folder: for its files; a few, since a borrowed machine hands few back.
        arguments: of the section in this call.
        device: "cuda", or "cpu" for a run that only shows that the section works: there everything is tiny.
        deadline: by ``time.monotonic``; what is not measured by then is lost.
    """

    name: str
    folder: Path
    arguments: tuple[str, ...] = ()
    device: str = "cuda"
    deadline: float = float("inf")

    @property
    def smoke(self) -> bool:
        """Whether this is no measurement."""
        return self.device == "cpu"

    def row(self, said: str = "", **figures: object) -> None:
        """Append a row to the results at once: a run that is killed keeps it.

        Args:
            said: the row in a line, which the driver prints; most rows have none.
            **figures: what JSON can hold.
        """
        head = {
            "section": self.name,
            "commit": os.environ.get(COMMIT, ""),
            "gpu": card(self.device),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "said": said,
        }
        if taken := sorted(head.keys() & figures.keys()):
            raise ValueError(f"`figures`: expected names other than those of every row, got {', '.join(taken)}")
        line = json.dumps(head | figures)
        with (self.folder / RESULTS).open("a", encoding="utf-8") as file:
            file.write(line + "\n")  # closed, and so flushed, row by row


def card(device: str) -> str:
    """Return the GPU's name; empty on a CPU."""
    if device == "cpu":
        return ""
    import torch  # noqa: PLC0415 - sections that fail to import it still have rows

    return torch.cuda.get_device_name(0)


def main(folder: str, name: str, module: str, *arguments: str) -> None:
    """Run a section."""
    place, _, function = module.partition(":")
    section = importlib.import_module(place)
    getattr(section, "imports", lambda _: None)(arguments)
    seconds = float(sys.stdin.readline())
    signal.alarm(math.ceil(seconds + _LATE))  # ends it where the driver was killed and can no longer do so
    deadline = seconds + time.monotonic()
    device = "cpu" if os.environ.get(SMOKE) == "1" else "cuda"
    getattr(section, function or "run")(Run(name, Path(folder), arguments, device, deadline))


if __name__ == "__main__":
    main(*sys.argv[1:])
