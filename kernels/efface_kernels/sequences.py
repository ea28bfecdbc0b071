"""Sequences of label rows: the log-probabilities that an objective sees, and where each sequence begins."""

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
    """Sequences ``first`` .. ``first + s − 1`` of a batch, by the log-probabilities of their labels.

    Attributes:
        logprobs: (n,) ℓ_i of their label rows, in nats; require a gradient while coefficients are formed.
        row_offsets: (s + 1,) int64, from 0 to n, on the device.
        first: index of the first sequence within the batch.
        reference_sums: (s,) L_ref, the reference model's sequence log-probabilities, or None. Sequences without
            a reference hold 0.
    """

    logprobs: Tensor
    row_offsets: Tensor
    first: int = 0
    reference_sums: Tensor | None = None

    def __len__(self) -> int:
        """S."""
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
        """(n,) int64, the place of each label row within its sequence, from 0."""
        starts = self.of_rows(self.row_offsets[:-1])
        return torch.arange(starts.shape[0], device=starts.device) - starts

    def own(self, values: Tensor) -> Tensor:
        """Return the entries of a per-sequence vector of the batch, (S,), that belong to these sequences, (s,)."""
        return values[self.first : self.first + len(self)]

    def of_rows(self, values: Tensor) -> Tensor:
        """Return (n,) what each label row's sequence has in ``values``, (s,)."""
        # The output's size is known: without it, repeating would read the lengths on the host.
        return values.repeat_interleave(self.row_offsets.diff(), output_size=self.logprobs.shape[0])

    def sums_of(self, values: Tensor) -> Tensor:
        """Return the sums, (s,), of one value a row, (n,), over each sequence; differentiable."""
        return segment_sums(values, self.row_offsets)

    def following(self, values: Tensor) -> Tensor:
        """Return for each sequence the entry of ``values`` (s,) that belongs to the next one; differentiable.

        The first of a pair sees its second. The last sequence sees the first, which means nothing: leave it out.
        """
        return values.roll(-1)


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


def checked_offsets(row_offsets: AnyOffsets, hidden: Tensor) -> RowOffsets:
    """Return the offsets of the rows of ``hidden``, on the host and on its device.

    Raises:
        TypeError: a device copy that is not int64.
        ValueError: offsets that do not ascend from 0 to N, a sequence without rows, copies of two lengths.
    """
    rows, given = hidden.shape[0], row_offsets.host if isinstance(row_offsets, RowOffsets) else row_offsets
    host = given.tolist() if isinstance(given, Tensor) else list(given)
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
        on_host = torch.tensor(host, dtype=torch.int64, device="cpu")
        return RowOffsets(on_host, to_device(on_host, hidden.device))
    check_dtype("row_offsets.device", row_offsets.device, (torch.int64,))
    check_shape("row_offsets.device", row_offsets.device, (len(host),), "as many as `row_offsets.host`")
    check_same_device(**{"hidden": hidden, "row_offsets.device": row_offsets.device})
    return row_offsets
