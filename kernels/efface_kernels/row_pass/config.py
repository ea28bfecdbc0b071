"""The row pass's launch configuration, a pure function. Nothing here was timed on a GPU yet."""

import torch

from efface_kernels.triton_launch import LaunchConfig

# Two 16-byte loads a thread and step in the widest dtype, eight warps of 32: blocks of 4096 entries in 2-byte dtypes,
# 2048 in fp32. `python -m benchmarks.compile_only` prints what that takes of a GPU: registers, instructions an element.
_BYTES_PER_THREAD = 32
_THREADS = 256
# One row a multiprocessor is alive at a time, so that 132 rows of V = 128256 in bf16, 34 MB, may stay in an H100's 50 MB
# of L2 between the two sweeps: 4 instead of 6 bytes an element from memory, if the cache does as it is asked. All warps
# that a block may have hide the latency then, since no second block does.
_THREADS_PERSISTENT = 1024


def launch_config(
    vocabulary: int,
    dtype: torch.dtype,
    reference_dtype: torch.dtype | None = None,
    warp_size: int = 32,
    *,
    persistent: bool = False,
) -> LaunchConfig:
    """Return the configuration for rows of ``vocabulary`` logits of ``dtype`` and reference rows of another.

    The rows are read one after the other, so that only the wider dtype counts, not that there are two. ``persistent``
    is off until a GPU has timed it.
    """
    widest = max(dtype.itemsize, 0 if reference_dtype is None else reference_dtype.itemsize)
    entries = _BYTES_PER_THREAD // widest
    threads = _THREADS_PERSISTENT if persistent else _THREADS
    block = max(64, min(threads * entries, 1 << max(vocabulary - 1, 0).bit_length()))
    return LaunchConfig(block, max(1, block // (entries * warp_size)), persistent)
