"""The scale pass's launch configuration. Nothing here was timed on a GPU yet."""

from efface_kernels.triton_launch import LaunchConfig

# Eight entries a thread and step: two 16-byte loads of fp32, one of half precision.
_THREADS, _BLOCK = 256, 2048
# Eight programs of 256 threads fill a multiprocessor. Where the factor is 1, one wave of them reads it and returns;
# with one program a block, (128256, 2048) would be 128256 of them.
_RESIDENT = 8


def launch_config(warp_size: int = 32) -> LaunchConfig:
    """Return the configuration, for any number of entries."""
    return LaunchConfig(_BLOCK, _THREADS // warp_size, _RESIDENT)
