"""The row pass's launch configuration, a pure function. Nothing here was timed on a GPU yet."""

import torch

from efface_kernels.triton_launch import LaunchConfig

# Two 16-byte loads a thread and step in the widest dtype, eight warps of 32: blocks of 4096 entries in 2-byte dtypes,
# 2048 in fp32. Compile-only (`python -m benchmarks.compile_only`, triton 3.7.1, 2026-11-21): 20 to 99 registers and no
# spills on sm_80, sm_90 and sm_100; a bf16 row with an fp32 reference uses 16 bytes of stack on sm_80 at 4096.
_BYTES_PER_THREAD = 32
_THREADS = 256


def launch_config(
    vocabulary: int, dtype: torch.dtype, reference_dtype: torch.dtype | None = None, warp_size: int = 32
) -> LaunchConfig:
    """Return the configuration for rows of ``vocabulary`` logits of ``dtype`` and reference rows of another.

    The rows are read one after the other, so that only the wider dtype counts, not that there are two.
    """
    widest = max(dtype.itemsize, 0 if reference_dtype is None else reference_dtype.itemsize)
    entries = _BYTES_PER_THREAD // widest
    block = max(64, min(_THREADS * entries, 1 << max(vocabulary - 1, 0).bit_length()))
    return LaunchConfig(block, max(1, block // (entries * warp_size)))
