"""The distribution pass's launch configuration, a pure function. Nothing here was timed on a GPU yet."""

import torch

from efface_kernels.triton_launch import LaunchConfig

# Entries a thread and step: two running maxima and totals of each are alive in the first sweep. Compile-only
# (`python -m benchmarks.compile_only`, triton 3.7.1, 2026-11-21): 62 to 80 registers and no spills on sm_80, sm_90 and
# sm_100.
_PER_THREAD = 8
_BLOCK = 2048
_BLOCK_FP64 = 1024  # fp64 serves exact comparisons, not speed


def launch_config(vocabulary: int, dtype: torch.dtype, warp_size: int = 32) -> LaunchConfig:
    """Return the configuration for two rows of ``vocabulary`` logits, the policy's of ``dtype``."""
    block = min(_BLOCK_FP64 if dtype == torch.float64 else _BLOCK, 1 << max(vocabulary - 1, 0).bit_length())
    block = max(block, 64)
    return LaunchConfig(block, max(1, block // (_PER_THREAD * warp_size)))
