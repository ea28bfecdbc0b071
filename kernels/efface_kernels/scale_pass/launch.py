"""Launch of the scale pass in Triton, and its launch configuration, which has not been timed on a GPU yet."""

import torch
from torch import Tensor

from efface_kernels.triton_launch import LaunchConfig, on_device, warp_size_of

# Eight entries per thread and step: two 16-byte loads in fp32, one in half precision.
_THREADS, _BLOCK = 256, 2048
# Eight programs of 256 threads fill a multiprocessor. If the factor is 1, a single wave of programs reads it and
# returns. With one program per block, (128256, 2048) would need 128256 programs.
_RESIDENT = 8


def launch_config(warp_size: int = 32) -> LaunchConfig:
    """Return the configuration, which is the same for every number of entries."""
    return LaunchConfig(_BLOCK, _THREADS // warp_size, _RESIDENT)


def scale_pass_triton(
    values: Tensor, factor: Tensor, dtype: torch.dtype, keep: bool, config: LaunchConfig | None = None
) -> Tensor:
    """Run ``scale_pass_torch`` as a Triton kernel; ``config`` None uses ``launch_config``.

    In place, the kernel reads the factor and moves no values if it is 1.
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
