"""The distribution pass: one look at two chunks of logits, for losses that compare full distributions."""

from efface_kernels.distribution_pass.op import DistributionPassOutput, distribution_pass

__all__ = ["DistributionPassOutput", "distribution_pass"]
