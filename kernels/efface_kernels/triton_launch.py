"""Launch parameters of the Triton passes, and the availability of Triton. This module never imports Triton itself."""

import contextlib
import functools
import importlib.util
import os
from dataclasses import dataclass

import torch
from torch import Tensor

DEVICES = ("cuda", "xpu")  # PyTorch calls ROCm "cuda" too

# Read once, like Triton, which reads the variable when it decorates the kernels.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
IMPORTABLE = importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class LaunchConfig:
    """Launch configuration of a kernel.

    Attributes:
        block: entries that one program reads per step.
        num_warps: warps of a program.
        resident: programs per multiprocessor in persistent mode, each of which processes several pieces of work. 0
            launches one program per piece.
        hold: whether to ask the L2 cache to keep a row until its last sweep.
    """

    block: int
    num_warps: int
    resident: int = 0
    hold: bool = False

    def programs(self, pieces: int, device: torch.device) -> int:
        """Return the number of programs to launch for ``pieces`` pieces of work."""
        return min(pieces, self.resident * multiprocessors(device)) if self.resident else pieces


def streaming_config(vocabulary: int, widest: int, threads: int, warp_size: int = 32) -> LaunchConfig:
    """Return the configuration of a pass over rows of ``vocabulary`` entries; the widest dtype has ``widest`` bytes.

    A thread loads 16 bytes twice per step, or once if the vocabulary is not a multiple of 16. The end of such a row is
    loaded entry by entry, which takes 48 to 60 registers per thread with two loads and 32 to 40 with one. With two
    loads, the distribution pass spills registers on sm_80 (compiled with triton 3.7.1, 2026-11-27).
    """
    entries = (16 if vocabulary % 16 else 32) // widest
    block = max(64, min(threads * entries, 1 << max(vocabulary - 1, 0).bit_length()))
    return LaunchConfig(block, max(1, block // (entries * warp_size)))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU (compute units, Xe cores); 2 in Triton's interpreter."""
    if device.type == "cpu":
        return 2
    properties = torch.get_device_module(device).get_device_properties(device)
    return int(getattr(properties, "multi_processor_count", None) or properties.gpu_subslice_count)


def warp_size_of(device: torch.device) -> int:
    """Return the number of threads of a warp: 64 on AMD's data-centre GPUs, 32 on other GPUs."""
    if device.type == "cuda" and torch.version.hip is not None:
        return int(torch.cuda.get_device_properties(device).warp_size)
    return 32


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a context manager that makes the tensor's device current, as Triton requires; a no-op on the CPU."""
    if tensor.device.type == "cpu":
        return contextlib.nullcontext()
    manager: contextlib.AbstractContextManager[object] = torch.get_device_module(tensor.device).device(tensor.device)
    return manager
