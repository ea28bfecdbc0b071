"""Resident memory of one provider on the CPU: ``python -m benchmarks.loss.peak SHAPE PROVIDER``, a process for each.

Prints the peak above inputs and gradients, in GiB. A small batch comes first: libraries, thread stacks, compilation.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.loss.inputs import make_inputs
from benchmarks.loss.providers import providers
from benchmarks.loss.suite import SHAPES


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def peak(shape_name: str, provider_name: str) -> float:
    """Return it."""
    shape = SHAPES[shape_name]
    provider = next(each for each in providers(shape)[0] if each.name == provider_name)
    provider.run(make_inputs(replace(shape, n=64, d=64, v=512)).of(provider.mode))
    inputs = make_inputs(shape).of(provider.mode)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts anew
    before = _status("VmRSS")
    gradients = provider.run(inputs)
    kept = sum(each.nbytes for each in gradients)
    return (_status("VmHWM") - before - kept) / (1 << 30)


if __name__ == "__main__":
    torch.set_num_threads(2)
    print(peak(*sys.argv[1:]))
