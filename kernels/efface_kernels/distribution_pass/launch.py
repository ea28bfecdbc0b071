"""Launch of the distribution pass in Triton, and its launch configuration, a pure function.

The configuration has not been timed on a GPU yet. `python -m benchmarks.compile_only` prints the registers and the
instructions per element of the compiled kernel.
"""

import torch
from torch import Tensor

from efface_kernels.logits import Logits
from efface_kernels.triton_launch import LaunchConfig, on_device, streaming_config, warp_size_of

_THREADS = 256


def launch_config(
    vocabulary: int, dtype: torch.dtype, reference_dtype: torch.dtype, warp_size: int = 32
) -> LaunchConfig:
    """Return the configuration for pairs of rows of ``vocabulary`` logits with these dtypes."""
    return streaming_config(vocabulary, max(dtype.itemsize, reference_dtype.itemsize), _THREADS, warp_size)


def distribution_pass_triton(
    logits: Logits,
    reference: Logits,
    targets: Tensor,
    shift: float,
    into: Tensor | None,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Run ``distribution_pass_torch`` as a Triton kernel; ``config`` None uses ``launch_config``."""
    from efface_kernels.distribution_pass.kernel import (  # Triton is imported when a kernel first runs
        distribution_pass_kernel,
    )

    if logits.residual is not None or reference.residual is not None:
        raise ValueError("`logits`: expected no residual, which this pass cannot read, got one; pass wider logits")
    policy, frozen = logits.unit_stride().values, reference.unit_stride().values
    divergence, entropy = logits.row_vector(), logits.row_vector()
    out = into
    if into is logits.values:
        out = policy
    elif into is not None and into.stride(1) != 1:
        out = into.contiguous()
    rows, vocabulary = policy.shape
    if rows:  # an empty grid is a launch error
        launch = config or launch_config(vocabulary, policy.dtype, frozen.dtype, warp_size_of(policy.device))
        with on_device(policy):
            distribution_pass_kernel[(rows,)](
                policy,
                frozen,
                targets.contiguous(),
                out,
                divergence,
                entropy,
                policy.stride(0),
                frozen.stride(0),
                0 if out is None else out.stride(0),
                vocabulary,
                SHIFT=float(shift),
                SOFTCAP=logits.softcap or 0.0,
                REFERENCE_SOFTCAP=reference.softcap or 0.0,
                BLOCK=launch.block,
                num_warps=launch.num_warps,
            )
    if into is not None and out is not None and out is not into:
        into.copy_(out)
    return divergence, entropy
