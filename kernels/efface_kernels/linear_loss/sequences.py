"""What an objective sees: the log-probabilities of some whole sequences."""

from dataclasses import dataclass

import torch
from torch import Tensor


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
