"""The border to the Triton passes: is Triton here, and what a launch needs to know. Never imports Triton itself."""

import contextlib
import importlib.util
import os
from dataclasses import dataclass

import torch
from torch import Tensor

DEVICES = ("cuda", "xpu")  # PyTorch calls ROCm "cuda" too

# Read once, as Triton does when it decorates the kernels.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
IMPORTABLE = importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class LaunchConfig:
    """How one program reads its row: entries a step, and the warps that share them.

    ``persistent``: as many programs as the device has multiprocessors, each with one row after the other.
    """

    block: int
    num_warps: int
    persistent: bool = False

    def programs(self, rows: int, device: torch.device) -> int:
        """Return the programs to launch for ``rows`` rows."""
        return min(rows, multiprocessors(device)) if self.persistent else rows


def multiprocessors(device: torch.device) -> int:
    """Return the multiprocessors of a GPU (compute units, Xe cores); 2 in the interpreter."""
    if device.type == "cpu":
        return 2
    properties = torch.get_device_module(device).get_device_properties(device)
    return int(getattr(properties, "multi_processor_count", None) or properties.gpu_subslice_count)


def warp_size(device: torch.device) -> int:
    """Return the threads of a warp: 64 on AMD's data-centre cards, 32 elsewhere."""
    if device.type == "cuda" and torch.version.hip is not None:
        return int(torch.cuda.get_device_properties(device).warp_size)
    return 32


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the tensor's device the current one, which Triton launches on; nothing to do for the interpreter."""
    if tensor.device.type == "cpu":
        return contextlib.nullcontext()
    manager: contextlib.AbstractContextManager[object] = torch.get_device_module(tensor.device).device(tensor.device)
    return manager
