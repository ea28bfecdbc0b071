"""The plan of an epoch: which pairs share an optimizer step, and which rank and micro-batch each sequence goes to."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import efface_native
import numpy as np
from numpy.typing import NDArray


class Role(IntEnum):
    """What a sequence of a batch is there for; the first three numbers are those of the C++ core."""

    FORGET = 0
    RETAIN = 1
    ALTERNATE = 2  # the answer that a forget sequence should have had (DPO); stands right behind it
    IDLE = 3  # weighs nothing; keeps a rank busy that has no share of a step


@dataclass(frozen=True)
class StepTotals:
    """What the means of one optimizer step run over: all of its micro-batches, on all ranks."""

    forget_sequences: int = 0
    forget_tokens: int = 0  # label tokens
    retain_sequences: int = 0
    retain_tokens: int = 0  # label tokens
    forget_label_counts: tuple[int, ...] = ()  # of each forget sequence

    def forget_tokens_after(self, first: int) -> int:
        """Return the label tokens of forget sequences without the ``first`` ones of each."""
        return sum(max(count - first, 0) for count in self.forget_label_counts)


RetainSampling = Literal["random", "cycle", "paired"]
Lengths = Sequence[int] | NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """The sequences of one forward pass, in packed order; none for a rank that has no share of the step.

    Attributes:
        roles: (S,) int8, a ``Role`` each.
        sequences: (S,) int64, indices into the store of the role.
    """

    roles: NDArray[np.int8]
    sequences: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """The optimizer steps of an epoch; made by ``plan_epoch``.

    Attributes:
        forget: (P,) int64, the forget sequence of each pair; empty where the forget set is.
        retain: (P,) int64, the retain sequence of each pair; empty where the retain set is.
        pairs_per_step: pairs of a step, on all ranks together; the last step may hold fewer.
        token_budget: most tokens of a micro-batch, unless a single sequence has more.
        world_size: ranks that the steps are split over.
        roles: (items,) int8, the sequences of all micro-batches one behind another.
        sequences: (items,) int64.
        batch_offsets: (micro-batches + 1,) int64 into ``roles`` and ``sequences``.
        batch_tokens: (micro-batches,) int64.
        step_offsets: (steps + 1,) int64 into the micro-batches; rank r's are every ``world_size``-th from r on.
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
        """Return the forget and the retain sequences of a step, on all ranks together."""
        own = slice(step * self.pairs_per_step, (step + 1) * self.pairs_per_step)
        return self.forget[own], self.retain[own]

    def micro_batches(self, step: int, rank: int = 0) -> list[MicroBatch]:
        """Return a rank's micro-batches of a step; every rank has equally many."""
        if not 0 <= step < len(self):
            raise IndexError(f"`step`: expected 0 .. {len(self) - 1}, got {step}")
        if not 0 <= rank < self.world_size:
            raise ValueError(f"`rank`: expected 0 .. {self.world_size - 1}, got {rank}")
        batches = range(int(self.step_offsets[step]) + rank, int(self.step_offsets[step + 1]), self.world_size)
        owned = [slice(self.batch_offsets[b], self.batch_offsets[b + 1]) for b in batches]
        return [MicroBatch(self.roles[items], self.sequences[items]) for items in owned]

    def efficiency(self, *, last: bool = False) -> float:
        """Return the share of the token budget that micro-batches fill, 0 .. 1; NaN if there are none.

        Without ``last``, each rank's last micro-batch of each step is left out: it holds what is left over.
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
    drop_last: bool = False,
) -> EpochPlan:
    """Plan an epoch: a pure function of its arguments, the same on every platform.

    Every forget sequence comes exactly once (but for a dropped last step), paired with a retain sequence. A step's
    pairs depend on neither ``world_size`` nor ``token_budget``; those decide how its sequences are arranged: ranks'
    tokens differ by at most the longest sequence, micro-batches are filled best-fit decreasing. Draws are Philox4x64-10
    with the seed as key and epoch and position as counter, so any step can be planned without those before it.
    Where one of the sets is empty, the epoch runs over the other alone.

    Args:
        forget_lengths: (F,) tokens of each forget sequence.
        retain_lengths: (R,) tokens of each retain sequence.
        pairs_per_step: pairs of an optimizer step, on all ranks together.
        token_budget: most tokens of a micro-batch. A longer sequence is never cut: it has a micro-batch of its own,
            with a warning.
        world_size: ranks to split each step over.
        seed: 0 .. 2^64 − 1.
        epoch: from 0.
        retain_sampling: "random": each pair draws from the whole retain set; "cycle": shuffled rounds over the retain
            set, going on from epoch to epoch; "paired": retain sequence i goes with forget sequence i.
        alternates: (F,) tokens of the alternate answer of each forget sequence, which it follows in the micro-batch.
        drop_last: leave out a last step of fewer pairs.

    Raises:
        ValueError: both sets empty, lengths or counts below 1, alternates or paired retain sequences that do not fit
            the forget set, a ``drop_last`` that leaves nothing.
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
        drop_last=drop_last,
    )
    if over := planned.pop("over_budget"):
        warnings.warn(
            f"{over} sequences are longer than the token budget of {token_budget}; each has a micro-batch of its own. "
            "Raise the token budget, or cut sequences on purpose with a maximum length",
            stacklevel=2,
        )
    return EpochPlan(**planned, pairs_per_step=pairs_per_step, token_budget=token_budget, world_size=world_size)


def _int64(lengths: Lengths) -> NDArray[np.int64]:
    return np.ascontiguousarray(lengths, dtype=np.int64)
