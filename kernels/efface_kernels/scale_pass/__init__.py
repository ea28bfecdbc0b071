"""The scale pass: a gradient times the upstream scalar, rounded to its dtype; nothing where there is nothing to do."""

from efface_kernels.scale_pass.op import scale_pass

__all__ = ["scale_pass"]
