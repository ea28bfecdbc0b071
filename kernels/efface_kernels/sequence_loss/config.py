"""The sequence loss's launch configuration. Nothing here was timed on a GPU yet."""

from efface_kernels.triton_launch import LaunchConfig

# One for all shapes: the block decides the order of addition, and a sequence's bits shall not depend on the lengths of
# the others. Label rows of TOFU's answers number 33 on average: one warp, most of its lanes busy for one step.
LAUNCH = LaunchConfig(block=128, num_warps=1)
