"""The distribution pass's launch, and its configuration, a pure function. Nothing here was timed on a GPU yet.

`python -m benchmarks.compile_only` prints what it takes of a GPU: registers, instructions an element.
"""

import torch
from torch import Tensor

from efface_kernels.logits import Logits
from efface_kernels.triton_launch import LaunchConfig, on_device, streaming_config, warp_size_of

_THREADS = 256


def launch_config(
    vocabulary: int, dtype: torch.dtype, reference_dtype: torch.dtype, warp_size: int = 32
) -> LaunchConfig:
    """Return the configuration for two rows of ``vocabulary`` logits, of these dtypes."""
    return streaming_config(vocabulary, max(dtype.itemsize, reference_dtype.itemsize), _THREADS, warp_size)


def distribution_pass_triton(
    logits: Logits,
    reference: Logits,
    targets: Tensor,
    shift: float,
    into: Tensor | None,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """``distribution_pass_torch`` in Triton; None lets ``launch_config`` choose."""
    from efface_kernels.distribution_pass.kernel import (  # Triton is imported when a kernel first runs
        distribution_pass_kernel,
    )

    if logits.residual is not None or reference.residual is not None:
        raise ValueError("`logits`: expected no residual, which this pass does not read; give wider logits")
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
