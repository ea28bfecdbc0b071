"""Where the label rows of each sequence begin: known to the host, which plans, and to the device, which sums."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from efface_kernels.checks import check_dtype, check_same_device, check_shape
from efface_kernels.transfer import to_device


@dataclass(frozen=True)
class RowOffsets:
    """(S + 1) ascending offsets from 0 to N in both places, so that nothing is copied any more.

    A CUDA graph can only be captured with these. The two are taken to be equal: comparing them would synchronise.

    Attributes:
        host: (S + 1) int64 on the CPU, for the plan of chunks.
        device: the same on the device of the batch.
    """

    host: Tensor
    device: Tensor


AnyOffsets: TypeAlias = Tensor | Sequence[int] | RowOffsets


def checked_offsets(row_offsets: AnyOffsets, hidden: Tensor) -> tuple[tuple[int, ...], Tensor]:
    """Return the offsets of the rows of ``hidden`` on the host, and on its device.

    Raises:
        TypeError: a device copy that is not int64.
        ValueError: offsets that do not ascend from 0 to N, a sequence without rows, copies of two lengths.
    """
    rows, given = hidden.shape[0], row_offsets.host if isinstance(row_offsets, RowOffsets) else row_offsets
    host = tuple(given.tolist() if isinstance(given, Tensor) else given)
    if not host or host[0] != 0 or host[-1] != rows:
        ends = f"{host[0]} to {host[-1]}" if host else "no entries"
        raise ValueError(f"`row_offsets`: expected to run from 0 to {rows} (the rows of `hidden`), got {ends}")
    for sequence, (start, stop) in enumerate(itertools.pairwise(host)):
        if stop <= start:
            raise ValueError(
                f"`row_offsets`: expected every sequence to have a label row, got rows {start} .. {stop} for sequence "
                f"{sequence}; drop sequences without a label"
            )
    if not isinstance(row_offsets, RowOffsets):
        return host, to_device(torch.tensor(host, dtype=torch.int64), hidden.device)
    check_dtype("row_offsets.device", row_offsets.device, (torch.int64,))
    check_shape("row_offsets.device", row_offsets.device, (len(host),), "as many as `row_offsets.host`")
    check_same_device(**{"hidden": hidden, "row_offsets.device": row_offsets.device})
    return host, row_offsets.device
