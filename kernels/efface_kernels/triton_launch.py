"""The border to the Triton passes: is Triton here, and what a launch needs to know. Never imports Triton itself."""

import contextlib
import functools
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
    """How one program reads its entries: how many a step, and the warps that share them.

    ``resident``: programs a multiprocessor, which stay there and take one piece of work after the other; 0 launches one
    for each piece. ``hold``: ask the L2 cache to hold a row until its last sweep.
    """

    block: int
    num_warps: int
    resident: int = 0
    hold: bool = False

    def programs(self, pieces: int, device: torch.device) -> int:
        """Return the programs to launch for so many pieces of work."""
        return min(pieces, self.resident * multiprocessors(device)) if self.resident else pieces


def streaming_config(vocabulary: int, widest: int, threads: int, warp_size: int = 32) -> LaunchConfig:
    """Return the configuration of a pass over rows of ``vocabulary`` entries, the widest of ``widest`` bytes.

    A thread loads 16 bytes twice a step. Once where 16 does not divide the vocabulary: the end of such a row is loaded
    entry by entry, which takes 48 to 60 registers of a thread for two loads, 32 to 40 for one, and KL's spills some
    on sm_80 (compiled by triton 3.7.1, 2026-11-27).
    """
    entries = (16 if vocabulary % 16 else 32) // widest
    block = max(64, min(threads * entries, 1 << max(vocabulary - 1, 0).bit_length()))
    return LaunchConfig(block, max(1, block // (entries * warp_size)))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return the multiprocessors of a GPU (compute units, Xe cores); 2 in the interpreter."""
    if device.type == "cpu":
        return 2
    properties = torch.get_device_module(device).get_device_properties(device)
    return int(getattr(properties, "multi_processor_count", None) or properties.gpu_subslice_count)


def warp_size_of(device: torch.device) -> int:
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
