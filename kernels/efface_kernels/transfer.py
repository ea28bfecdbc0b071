"""Numbers of the host on a device, without the host waiting for the device."""

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Return a small tensor of the host on ``device``.

    CUDA copies from pinned memory behind what its stream has yet to do. From other memory torch waits for the stream,
    or, with ``non_blocking``, for a copy into a buffer of the driver's.
    """
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
