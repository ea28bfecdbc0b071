"""The scale pass's launch configuration. Nothing here was timed on a GPU yet."""

from efface_kernels.triton_launch import LaunchConfig

# Eight entries a thread and step, two 16-byte loads of fp32.
LAUNCH = LaunchConfig(block=2048, num_warps=8)
# Eight programs of 256 threads fill a multiprocessor, and an H100 or H200 has 132 of them: where the factor is 1, one
# wave of programs reads it and returns. With one program a block, (128256, 2048) would be 128256 of them.
_PROGRAMS = 8 * 132


def programs(count: int) -> int:
    """Return the number of programs for ``count`` entries, P; a program takes every P-th block."""
    return min(-(-count // LAUNCH.block), _PROGRAMS)
