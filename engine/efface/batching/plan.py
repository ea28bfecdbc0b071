"""Epoch plans: the assignment of pairs to optimizer steps, and of sequences to ranks and micro-batches."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import efface_native
import numpy as np
from numpy.typing import NDArray


class Role(IntEnum):
    """The role of a sequence in a batch; the first three values are the same as in the C++ core."""

    FORGET = 0
    RETAIN = 1
    ALTERNATE = 2  # the preferred answer to a forget sequence's question (DPO); directly follows that sequence
    IDLE = 3  # weight 0; run by a rank that has no sequences in a step


@dataclass(frozen=True)
class StepTotals:
    """The numbers over which the means of one optimizer step are taken: totals of all micro-batches on all ranks."""

    forget_sequences: int = 0
    forget_tokens: int = 0  # label tokens
    retain_sequences: int = 0
    retain_tokens: int = 0  # label tokens
    forget_label_counts: tuple[int, ...] = ()  # label tokens of each forget sequence

    def forget_tokens_after(self, first: int) -> int:
        """Return the number of forget label tokens, without the first ``first`` label tokens of each sequence."""
        return sum(max(count - first, 0) for count in self.forget_label_counts)


RetainSampling = Literal["random", "cycle", "paired"]
Lengths = Sequence[int] | NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """The sequences of one forward pass, in packed order; empty for a rank that has no sequences in the step.

    Attributes:
        roles: (S,) int8, ``Role`` of each sequence.
        sequences: (S,) int64, index of each sequence in the store of its role.
    """

    roles: NDArray[np.int8]
    sequences: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """The optimizer steps of an epoch, as returned by ``plan_epoch``.

    Attributes:
        forget: (P,) int64, the forget sequence of each pair; empty if the forget set is empty.
        retain: (P,) int64, the retain sequence of each pair; empty if the retain set is empty.
        pairs_per_step: number of pairs per step, on all ranks together; the last step can have fewer.
        token_budget: maximum number of tokens of a micro-batch; a single longer sequence can exceed it.
        world_size: number of ranks over which each step is split.
        roles: (items,) int8, roles of the sequences of all micro-batches, concatenated.
        sequences: (items,) int64, index of each of these sequences in the store of its role.
        batch_offsets: (micro-batches + 1,) int64, start of each micro-batch in ``roles`` and ``sequences``.
        batch_tokens: (micro-batches,) int64, number of tokens of each micro-batch; an upper bound if tokens are shared.
        step_offsets: (steps + 1,) int64, first micro-batch of each step. Within a step, rank r runs every
            ``world_size``-th micro-batch, starting with the r-th.
    """

    forget: NDArray[np.int64]
    retain: NDArray[np.int64]
    pairs_per_step: int
    token_budget: int
    world_size: int
    roles: NDArray[np.int8]
    sequences: NDArray[np.int64]
    batch_offsets: NDArray[np.int64]
    batch_tokens: NDArray[np.int64]
    step_offsets: NDArray[np.int64]

    def __len__(self) -> int:
        """Return the number of optimizer steps."""
        return len(self.step_offsets) - 1

    def pairs(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the indices of a step's forget and retain sequences, on all ranks together."""
        own = slice(step * self.pairs_per_step, (step + 1) * self.pairs_per_step)
        return self.forget[own], self.retain[own]

    def micro_batches(self, step: int, rank: int = 0) -> list[MicroBatch]:
        """Return the micro-batches of a rank in a step; all ranks have the same number of micro-batches.

        Raises:
            IndexError: if ``step`` is out of range.
            ValueError: if ``rank`` is out of range.
        """
        if not 0 <= step < len(self):
            raise IndexError(f"`step`: expected 0 .. {len(self) - 1}, got {step}")
        if not 0 <= rank < self.world_size:
            raise ValueError(f"`rank`: expected 0 .. {self.world_size - 1}, got {rank}")
        batches = range(int(self.step_offsets[step]) + rank, int(self.step_offsets[step + 1]), self.world_size)
        owned = [slice(self.batch_offsets[b], self.batch_offsets[b + 1]) for b in batches]
        return [MicroBatch(self.roles[items], self.sequences[items]) for items in owned]

    def efficiency(self, *, last: bool = False) -> float:
        """Return the mean share of the token budget that micro-batches fill, 0 .. 1; NaN if no micro-batch is counted.

        Args:
            last: whether to count each rank's last micro-batch of each step, which contains the remainder.
        """
        counted = np.ones(len(self.batch_tokens), dtype=bool)
        if not last:
            for rank in range(self.world_size):
                counted[self.step_offsets[1:] - 1 - rank] = False
        filled = np.minimum(self.batch_tokens[counted], self.token_budget)
        return float(filled.mean() / self.token_budget) if filled.size else float("nan")


def plan_epoch(
    forget_lengths: Lengths,
    retain_lengths: Lengths,
    *,
    pairs_per_step: int,
    token_budget: int,
    world_size: int = 1,
    seed: int,
    epoch: int,
    retain_sampling: RetainSampling = "random",
    alternates: Lengths | None = None,
    shared_tokens: int = 0,
    drop_last: bool = False,
) -> EpochPlan:
    """Plan an epoch: a pure function of its arguments, the same on every platform.

    Every forget sequence occurs exactly once, except in a dropped last step, and is paired with a retain sequence. The
    pairs of a step depend on neither ``world_size`` nor ``token_budget``. These two only arrange the sequences of a
    step: the ranks' token counts differ by at most the longest sequence, and micro-batches are filled best-fit
    decreasing. Random draws use Philox4x64-10 with the seed as key and the epoch and position as counter, so any step
    can be planned without the steps before it. If one of the sets is empty, the epoch runs over the other set.

    Args:
        forget_lengths: (F,) number of tokens of each forget sequence.
        retain_lengths: (R,) number of tokens of each retain sequence.
        pairs_per_step: number of pairs per optimizer step, on all ranks together.
        token_budget: maximum number of tokens of a micro-batch. A longer sequence is not cut; it gets its own
            micro-batch, with a warning.
        world_size: number of ranks over which each step is split.
        seed: 0 .. 2^64 − 1.
        epoch: number of the epoch, from 0.
        retain_sampling: "random": each pair draws from the whole retain set. "cycle": shuffled rounds over the retain
            set, continued from epoch to epoch. "paired": retain sequence i is paired with forget sequence i.
        alternates: (F,) number of tokens of each forget sequence's alternate answer, which follows it in the
            micro-batch; None if there are no alternate answers.
        shared_tokens: number of tokens that every micro-batch contains once, because its sequences begin with them, and
            that the lengths do not include (see ``added_tokens``).
        drop_last: whether to leave out a last step with fewer pairs.

    Raises:
        ValueError: if both sets are empty, a length or count is below 1, ``shared_tokens`` is negative, the number of
            alternates or of paired retain sequences does not match the forget set, or ``drop_last`` leaves no step.
    """
    for name, value in (("seed", seed), ("epoch", epoch)):
        if not 0 <= value < 2**64:
            raise ValueError(f"`{name}`: expected 0 .. 2^64 - 1, got {value}")
    planned = efface_native.plan_epoch(
        _int64(forget_lengths),
        _int64(retain_lengths),
        _int64(() if alternates is None else alternates),
        pairs_per_step=pairs_per_step,
        token_budget=token_budget,
        world_size=world_size,
        seed=seed,
        epoch=epoch,
        retain_sampling=retain_sampling,
        shared_tokens=shared_tokens,
        drop_last=drop_last,
    )
    if over := planned.pop("over_budget"):
        what = (
            f"and the {shared_tokens} tokens that sequences share are together longer than the token budget"
            if shared_tokens
            else "are longer than the token budget"
        )
        warnings.warn(
            f"{over} sequences {what} of {token_budget}; each gets its own micro-batch. Raise the token budget, or set "
            "a maximum length to cut sequences",
            stacklevel=2,
        )
    return EpochPlan(**planned, pairs_per_step=pairs_per_step, token_budget=token_budget, world_size=world_size)


def _int64(lengths: Lengths) -> NDArray[np.int64]:
    return np.ascontiguousarray(lengths, dtype=np.int64)
