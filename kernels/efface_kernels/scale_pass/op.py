"""The scale pass: what a loss's gradients go through in the backward call."""

import torch
from torch import Tensor

from efface_kernels.scale_pass.config import launch_config
from efface_kernels.scale_pass.reference import scale_pass_torch
from efface_kernels.triton_launch import LaunchConfig, on_device, warp_size


def scale_pass_triton(
    values: Tensor, factor: Tensor, dtype: torch.dtype, keep: bool, config: LaunchConfig | None = None
) -> Tensor:
    """``scale_pass_torch`` in Triton; in place it moves nothing where the factor is 1, which the kernel finds out.

    None lets ``launch_config`` choose.
    """
    from efface_kernels.scale_pass.kernel import scale_kernel  # Triton is imported when a kernel first runs

    values = values.contiguous()
    in_place = values.dtype == dtype and not keep
    out = values if in_place else torch.empty_like(values, dtype=dtype)
    if out.numel():  # an empty grid is a launch error
        launch = config or launch_config(warp_size(values.device))
        blocks = -(-out.numel() // launch.block)
        with on_device(values):
            scale_kernel[(launch.programs(blocks, values.device),)](
                values, factor, out, out.numel(), IN_PLACE=in_place, BLOCK=launch.block, num_warps=launch.num_warps
            )
    return out


def scale_pass(values: Tensor, factor: Tensor, *, dtype: torch.dtype, keep: bool, backend: str) -> Tensor:
    """A gradient times a scalar that is on its device.

    Equal to::

        (values * factor).to(dtype)

    rounded once. Where the values need not be kept and have that dtype, they are scaled in place and returned.

    Args:
        values: any shape and floating dtype.
        factor: (), float32 (float64 for float64 values).
        dtype: of the result.
        keep: whether ``values`` must stay as they are, and the result be other memory.
        backend: a resolved one; "native" is plain torch.
    """
    run = scale_pass_triton if backend == "triton" else scale_pass_torch
    return run(values, factor, dtype, keep)
