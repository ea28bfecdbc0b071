"""The scale pass: what a loss's gradients go through in the backward call."""

import torch
from torch import Tensor

from efface_kernels.scale_pass.launch import scale_pass_triton
from efface_kernels.scale_pass.reference import scale_pass_torch


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
