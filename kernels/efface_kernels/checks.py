"""Checks of arguments. All messages have the form "`name`: expected X, got Y; remedy"."""

from collections.abc import Sequence

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (*HALVES, torch.float32, torch.float64)


def check_dtype(name: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    """Raise TypeError unless ``tensor`` has one of the ``allowed`` dtypes."""
    if tensor.dtype not in allowed:
        names = ", ".join(str(dtype) for dtype in allowed)
        raise TypeError(f"`{name}`: expected dtype {names}, got {tensor.dtype}; convert it first")


def check_shape(name: str, tensor: Tensor, expected: Sequence[int | str], remedy: str = "") -> None:
    """Raise ValueError unless ``tensor`` has the ``expected`` shape. A string, such as "N", matches any size."""
    shape = tuple(tensor.shape)
    fits = len(shape) == len(expected) and all(
        isinstance(want, str) or want == got for want, got in zip(expected, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(str(extent) for extent in expected)
        raise ValueError(f"`{name}`: expected shape ({wanted}), got {shape}" + (f"; {remedy}" if remedy else ""))


def check_same_device(**tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors that are not None are on one device."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        listed = ", ".join(f"`{name}` on {device}" for name, device in devices.items())
        raise ValueError(f"expected all tensors on one device, got {listed}; move them to one device")


def check_targets(targets: Tensor, rows: int, vocabulary: int) -> None:
    """Raise unless ``targets`` is an int64 vector of ``rows`` entries, each in 0 .. vocabulary - 1.

    The range is checked on the CPU only, because elsewhere reading it would synchronise the device. There, an index out
    of range triggers a device-side assertion in the gather of the torch passes; the Triton kernels make the row NaN.
    """
    check_dtype("targets", targets, (torch.int64,))
    check_shape("targets", targets, (rows,), "one target for each row of `hidden`")
    if targets.device.type == "cpu" and rows:
        low, high = (int(bound) for bound in torch.aminmax(targets))
        if low < 0 or high >= vocabulary:
            wrong = low if low < 0 else high
            raise ValueError(
                f"`targets`: expected token ids in 0 .. {vocabulary - 1} (the rows of `weight`), got {wrong}; "
                "drop ignored positions (-100) first, and check that the head fits the tokenizer"
            )


def check_softcap(softcap: float | None) -> None:
    """Raise ValueError unless ``softcap`` is None or a positive finite number."""
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"`softcap`: expected a positive finite number or None, got {softcap}")


def check_chunk_rows(chunk_rows: int) -> None:
    """Raise TypeError or ValueError unless ``chunk_rows`` is an int of at least 1."""
    if not isinstance(chunk_rows, int):
        raise TypeError(f"`chunk_rows`: expected an int, got {chunk_rows!r}")
    if chunk_rows < 1:
        raise ValueError(f"`chunk_rows`: expected at least 1, got {chunk_rows}")
