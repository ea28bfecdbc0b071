"""What a compiled kernel takes of an NVIDIA GPU, by the instructions that it will run there (SASS).

``cuobjdump``, which comes with Triton's wheel, prints them; no GPU is needed.
"""

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import triton

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?);\s")
_BRANCH = re.compile(r"\bBRA\b.*?0x([0-9a-f]+)")
_LOAD = re.compile(r"\bLDG\.\S+")
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}  # bytes of a load; else 4


@dataclass(frozen=True)
class Sweep:
    """The innermost loop of a pass over rows: what it costs to read an element of them."""

    instructions: float  # an element
    load: int  # bytes of its narrowest load


@dataclass(frozen=True)
class Binary:
    """A kernel as the GPU will run it."""

    registers: int
    spills: int  # bytes of stack and local memory, which a kernel without arrays of its own has for spills only
    loops: tuple[tuple[str, ...], ...]  # instructions of the innermost loops that load, in order

    def sweeps(self, element_bytes: Sequence[int]) -> tuple[Sweep, ...]:
        """Return the cost of each loop, given the bytes that each reads for an element.

        The compiler unrolls as it likes: a loop's elements are counted by the bytes that it loads.

        Raises:
            ValueError: other loops than that.
        """
        if len(self.loops) != len(element_bytes):
            raise ValueError(f"expected {len(element_bytes)} loops that load, got {len(self.loops)}")
        sweeps = []
        for loop, size in zip(self.loops, element_bytes, strict=True):
            loads = [_width(load) for each in loop for load in _LOAD.findall(each)]
            sweeps.append(Sweep(len(loop) * size / sum(loads), min(loads)))
        return tuple(sweeps)


def read(cubin: bytes) -> Binary:
    """Return what ``cuobjdump`` says of a binary."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(cubin)
        usage, code = (
            subprocess.run([tool, option, binary], check=True, capture_output=True, text=True).stdout
            for option in ("-res-usage", "-sass")
        )
    registers, stack, local = (int(re.findall(rf"\b{name}:(\d+)", usage)[-1]) for name in ("REG", "STACK", "LOCAL"))
    return Binary(registers, stack + local, _loops(code))


def _loops(code: str) -> tuple[tuple[str, ...], ...]:
    """Return the bodies of the loops that load and hold no other loop: from a branch backwards to where it leads."""
    places = [(int(at, 16), text) for at, text in _INSTRUCTION.findall(code)]
    spans = [
        (int(branch[1], 16), at)
        for at, text in places
        if (branch := _BRANCH.search(text)) is not None and int(branch[1], 16) < at
    ]
    inner = [
        (start, end)
        for start, end in spans
        if not any((start, end) != other and start <= other[0] and other[1] <= end for other in spans)
    ]
    bodies = [tuple(text for at, text in places if start <= at <= end) for start, end in inner]
    return tuple(body for body in bodies if any(_LOAD.search(text) for text in body))


def _width(load: str) -> int:
    return next((_WIDTHS[part] for part in load.split(".") if part in _WIDTHS), 4)
