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
    """How one program reads its row: entries a step, and the warps that share them."""

    block: int
    num_warps: int


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
