"""Launch of the row pass in Triton, and its launch configuration, a pure function.

The configuration has not been timed on a GPU yet. `python -m benchmarks.compile_only` prints the registers and the
instructions per element of the compiled kernel.
"""

import dataclasses

import torch
from torch import Tensor

from efface_kernels.logits import Logits, run_dense
from efface_kernels.triton_launch import LaunchConfig, on_device, streaming_config, warp_size_of

_THREADS = 256
# In persistent mode each multiprocessor works on one row at a time. 132 rows of V = 128256 in bf16 are 34 MB, which can
# stay in the 50 MB of an H100's L2 cache between the two sweeps. If the cache follows the hints, this moves 4 instead
# of 6 bytes per element from and to memory. A block has the maximum of 1024 threads, because no second block is
# resident to hide latency.
_THREADS_PERSISTENT = 1024


def launch_config(
    vocabulary: int,
    dtype: torch.dtype,
    reference_dtype: torch.dtype | None = None,
    warp_size: int = 32,
    *,
    persistent: bool = False,
) -> LaunchConfig:
    """Return the configuration for rows of ``vocabulary`` logits of ``dtype``, with optional reference rows.

    The policy's and the reference's rows are read one after the other, so only the wider dtype matters. ``persistent``
    is off by default until it has been timed on a GPU.
    """
    widest = max(dtype.itemsize, 0 if reference_dtype is None else reference_dtype.itemsize)
    threads = _THREADS_PERSISTENT if persistent else _THREADS
    config = streaming_config(vocabulary, widest, threads, warp_size)
    return dataclasses.replace(config, resident=1, hold=True) if persistent else config


def row_pass_triton(
    logits: Logits,
    targets: Tensor,
    reference: Logits | None,
    gradient: bool,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, ...]:
    """Run ``row_pass_torch`` as a Triton kernel; ``config`` None uses ``launch_config``."""
    from efface_kernels.row_pass.kernel import row_pass_kernel  # Triton is imported when a kernel first runs

    frozen = None if reference is None else reference.unit_stride()
    outputs = [each.row_vector() for each in (logits, frozen) if each is not None]

    def run(dense: Logits) -> None:
        rows, vocabulary = dense.values.shape
        if rows == 0:  # an empty grid is a launch error
            return
        other, device = None if frozen is None else frozen.values.dtype, dense.values.device
        launch = config or launch_config(vocabulary, dense.values.dtype, other, warp_size_of(device))
        with on_device(dense.values):
            row_pass_kernel[(launch.programs(rows, device),)](
                dense.values,
                targets.contiguous(),
                outputs[0],
                None if frozen is None else frozen.values,
                None if frozen is None else outputs[1],
                rows,
                dense.values.stride(0),
                vocabulary,
                0 if frozen is None else frozen.values.shape[0],
                0 if frozen is None else frozen.values.stride(0),
                0 if frozen is None else frozen.values.shape[1],
                SOFTCAP=dense.softcap or 0.0,
                REFERENCE_SOFTCAP=0.0 if frozen is None else frozen.softcap or 0.0,
                GRADIENT=gradient,
                BLOCK=launch.block,
                PERSISTENT=launch.resident > 0,
                HOLD=launch.hold,
                num_warps=launch.num_warps,
            )

    run_dense(logits, run, writes=gradient)
    return tuple(outputs)
