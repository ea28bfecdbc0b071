"""``Sequences``, the log-probabilities of label rows grouped by sequence, and ``RowOffsets``, the group boundaries."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from efface_kernels.checks import check_dtype, check_same_device, check_shape
from efface_kernels.memory import to_device


def segment_sums(values: Tensor, offsets: Tensor) -> Tensor:
    """Return the sums (s,) of ``values[offsets[i]:offsets[i + 1]]``, added in order; differentiable."""
    # unsafe=True skips a check that reads the offsets on the host: it would synchronise the device.
    return torch.segment_reduce(values, "sum", offsets=offsets, unsafe=True)


@dataclass(frozen=True)
class Sequences:
    """Log-probabilities of the labels of sequences ``first`` .. ``first + s − 1`` of a batch.

    Attributes:
        logprobs: (n,) ℓ_i of the label rows, in nats. They require a gradient while autograd computes coefficients.
        row_offsets: (s + 1,) int64, from 0 to n, on the device.
        first: index of the first sequence within the batch.
        reference_sums: (s,) L_ref, the reference model's sequence log-probabilities, or None. The entry of a sequence
            without a reference is 0.
    """

    logprobs: Tensor
    row_offsets: Tensor
    first: int = 0
    reference_sums: Tensor | None = None

    def __len__(self) -> int:
        """Return the number of sequences s."""
        return self.row_offsets.shape[0] - 1

    @property
    def sums(self) -> Tensor:
        """(s,) L_s = Σ ℓ_i."""
        return self.sums_of(self.logprobs)

    @property
    def lengths(self) -> Tensor:
        """(s,) n_s, the number of label tokens, in the dtype of ``logprobs``."""
        return self.row_offsets.diff().to(self.logprobs.dtype)

    @property
    def places(self) -> Tensor:
        """(n,) int64, the index of each label row within its sequence, from 0."""
        starts = self.of_rows(self.row_offsets[:-1])
        return torch.arange(starts.shape[0], device=starts.device) - starts

    def own(self, values: Tensor) -> Tensor:
        """Return the entries for these sequences, (s,), of a vector with one entry per sequence of the batch, (S,)."""
        return values[self.first : self.first + len(self)]

    def of_rows(self, values: Tensor) -> Tensor:
        """Expand ``values`` (s,) to label rows: return (n,) with the value of each row's sequence."""
        # With an explicit output size, repeat_interleave does not read the lengths on the host.
        return values.repeat_interleave(self.row_offsets.diff(), output_size=self.logprobs.shape[0])

    def sums_of(self, values: Tensor) -> Tensor:
        """Return the sum over each sequence, (s,), of ``values`` (n,), one value per row; differentiable."""
        return segment_sums(values, self.row_offsets)

    def following(self, values: Tensor) -> Tensor:
        """Return, for each sequence, the entry of ``values`` (s,) of the next sequence; differentiable.

        For the first sequence of a pair this is the entry of the second. The result for the last sequence is the entry
        of the first one; do not use it.
        """
        return values.roll(-1)


@dataclass(frozen=True)
class RowOffsets:
    """(S + 1) ascending offsets from 0 to N, on the host and on the device, so that no copy is needed.

    Capturing a CUDA graph requires this type. The two copies are not compared, because that would synchronise the
    device; they must be equal.

    Attributes:
        host: (S + 1) int64 on the CPU, for the planning of chunks.
        device: the same offsets on the device of the batch.
    """

    host: Tensor
    device: Tensor


AnyOffsets: TypeAlias = Tensor | Sequence[int] | RowOffsets


def checked_offsets(row_offsets: AnyOffsets, hidden: Tensor) -> RowOffsets:
    """Return the offsets of the rows of ``hidden``, on the host and on its device.

    Raises:
        TypeError: if the device copy is not int64.
        ValueError: if the offsets do not ascend from 0 to N, a sequence has no row, or the two copies differ in length.
    """
    rows, given = hidden.shape[0], row_offsets.host if isinstance(row_offsets, RowOffsets) else row_offsets
    host = given.tolist() if isinstance(given, Tensor) else list(given)
    if not host or host[0] != 0 or host[-1] != rows:
        ends = f"{host[0]} to {host[-1]}" if host else "no entries"
        raise ValueError(f"`row_offsets`: expected offsets from 0 to {rows} (the rows of `hidden`), got {ends}")
    for sequence, (start, stop) in enumerate(itertools.pairwise(host)):
        if stop <= start:
            raise ValueError(
                f"`row_offsets`: expected at least one label row in every sequence, got rows {start} .. {stop} for "
                f"sequence {sequence}; drop sequences without a label"
            )
    if not isinstance(row_offsets, RowOffsets):
        on_host = torch.tensor(host, dtype=torch.int64, device="cpu")
        return RowOffsets(on_host, to_device(on_host, hidden.device))
    check_dtype("row_offsets.device", row_offsets.device, (torch.int64,))
    check_shape("row_offsets.device", row_offsets.device, (len(host),), "use the length of `row_offsets.host`")
    check_same_device(**{"hidden": hidden, "row_offsets.device": row_offsets.device})
    return row_offsets
