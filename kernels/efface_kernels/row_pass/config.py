"""The row pass's launch configuration, a pure function. Nothing here was timed on a GPU yet.

`python -m benchmarks.compile_only` prints what it takes of a GPU: registers, instructions an element.
"""

import dataclasses

import torch

from efface_kernels.triton_launch import LaunchConfig, streaming_config

_THREADS = 256
# One row a multiprocessor is alive at a time: 132 rows of V = 128256 in bf16 are 34 MB, and may stay in an H100's 50 MB
# of L2 between the two sweeps: 4 instead of 6 bytes an element from memory, if the cache does as it is asked. All
# threads that a block may have hide the latency then, since there is no second block.
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
    threads = _THREADS_PERSISTENT if persistent else _THREADS
    config = streaming_config(vocabulary, widest, threads, warp_size)
    return dataclasses.replace(config, resident=1, hold=True) if persistent else config
