"""The scale pass's launch and its configuration. Nothing here was timed on a GPU yet."""

import torch
from torch import Tensor

from efface_kernels.triton_launch import LaunchConfig, on_device, warp_size_of

# Eight entries a thread and step: two 16-byte loads of fp32, one of half precision.
_THREADS, _BLOCK = 256, 2048
# Eight programs of 256 threads fill a multiprocessor. Where the factor is 1, one wave of them reads it and returns;
# with one program a block, (128256, 2048) would be 128256 of them.
_RESIDENT = 8


def launch_config(warp_size: int = 32) -> LaunchConfig:
    """Return the configuration, for any number of entries."""
    return LaunchConfig(_BLOCK, _THREADS // warp_size, _RESIDENT)


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
        launch = config or launch_config(warp_size_of(values.device))
        blocks = -(-out.numel() // launch.block)
        with on_device(values):
            scale_kernel[(launch.programs(blocks, values.device),)](
                values, factor, out, out.numel(), IN_PLACE=in_place, BLOCK=launch.block, num_warps=launch.num_warps
            )
    return out
