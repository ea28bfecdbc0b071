"""The distribution pass's launch configuration, a pure function. Nothing here was timed on a GPU yet.

`python -m benchmarks.compile_only` prints what it takes of a GPU: registers, instructions an element.
"""

import torch

from efface_kernels.triton_launch import LaunchConfig, streaming_config

_THREADS = 256


def launch_config(
    vocabulary: int, dtype: torch.dtype, reference_dtype: torch.dtype, warp_size: int = 32
) -> LaunchConfig:
    """Return the configuration for two rows of ``vocabulary`` logits, of these dtypes."""
    return streaming_config(vocabulary, max(dtype.itemsize, reference_dtype.itemsize), _THREADS, warp_size)
