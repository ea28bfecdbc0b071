"""Optimizer steps as a map-style data set, so that the training loop of transformers can iterate and resume them."""

import bisect
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, TypeVar

from torch.utils.data import Dataset

from efface.batching import Assembler, EpochPlanner, RetainSampling, Step, TokenStore

S_co = TypeVar("S_co", covariant=True)


class Steps(Dataset[S_co], ABC):
    """Map-style data set whose item k is this rank's part of optimizer step k of the current epoch.

    Attributes:
        stores: the forget, the retain and, if the plan includes them, the alternate sequences.
    """

    stores: tuple[TokenStore, ...]

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of optimizer steps in an epoch."""

    @property
    @abstractmethod
    def pairs(self) -> int:
        """Number of pairs in an epoch."""

    @property
    def prefixes_saved(self) -> float:
        """Share of the tokens that are not run because sequences share them, estimated, 0 .. 1."""
        return 0.0

    def stop_sharing(self) -> None:
        """Run all tokens of every sequence from now on; the steps contain the same sequences."""

    # Not called set_epoch: the data loader with which accelerate resumes within an epoch calls set_epoch(0).
    @abstractmethod
    def begin_epoch(self, epoch: int) -> None:
        """Switch the items to those of ``epoch``; every epoch has the same number of steps."""


class PackedSteps(Steps[Step]):
    """Steps of packed micro-batches.

    Args:
        forget: forget sequences; can be empty.
        retain: retain sequences; can be empty.
        alternate: one alternate answer per forget sequence, or None.
        pairs_per_step: forget/retain pairs per step, in total over all ranks.
        token_budget: maximum tokens of a micro-batch.
        share: see ``efface.batching.EpochPlanner``.
        last_tokens: see ``efface.batching.EpochPlanner``.
        seed: seed of the plan.
        rank: rank of this process.
        world_size: number of processes.
        retain_sampling: see ``efface.batching.plan_epoch``.
        drop_last: drop an incomplete last step.
        workers: threads that assemble batches ahead.
        pin_memory: assemble into pinned memory.

    Attributes:
        planner: the planner of the epochs.
    """

    def __init__(
        self,
        forget: TokenStore,
        retain: TokenStore,
        alternate: TokenStore | None = None,
        *,
        pairs_per_step: int,
        token_budget: int,
        share: bool = False,
        last_tokens: bool = True,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        retain_sampling: RetainSampling = "random",
        drop_last: bool = False,
        workers: int = 1,
        pin_memory: bool = False,
    ) -> None:
        self.stores = (forget, retain) if alternate is None else (forget, retain, alternate)
        self.planner = EpochPlanner(
            self.stores,
            share=share,
            last_tokens=last_tokens,
            pairs_per_step=pairs_per_step,
            token_budget=token_budget,
            world_size=world_size,
            seed=seed,
            retain_sampling=retain_sampling,
            drop_last=drop_last,
        )
        self._assembler_options = {"rank": rank, "workers": workers, "pin_memory": pin_memory}
        self._epoch = -1
        self._assembler: Assembler | None = None
        self.begin_epoch(0)

    @property
    def prefixes_saved(self) -> float:
        """Share of the tokens that are not run because sequences share them, as measured by the planner."""
        return self.planner.saved

    def stop_sharing(self) -> None:
        """Run all tokens of every sequence from now on; the steps contain the same sequences."""
        if self.planner.shares:
            self.planner.stop_sharing()
            epoch, self._epoch = self._epoch, -1
            self.begin_epoch(epoch)

    def begin_epoch(self, epoch: int) -> None:
        """Plan ``epoch``, and start to assemble its steps; a no-op for the current epoch."""
        if epoch == self._epoch:
            return
        if self._assembler is not None:
            self._assembler.close()
        options: dict[str, Any] = {**self._assembler_options, **self.planner.packing}
        self._assembler = Assembler(self.planner.plan(epoch), self.stores, **options)
        self._epoch = epoch

    @property
    def assembler(self) -> Assembler:
        """The assembler of the current epoch's steps."""
        if self._assembler is None:
            raise RuntimeError("PackedSteps: no epoch was planned; call begin_epoch first")
        return self._assembler

    @property
    def pairs(self) -> int:
        """Number of pairs in an epoch."""
        plan = self.assembler.plan
        return max(len(plan.forget), len(plan.retain))

    def __len__(self) -> int:
        """Return the number of optimizer steps in an epoch."""
        return len(self.assembler)

    def __getitem__(self, step: int) -> Step:
        """Return this rank's part of a step."""
        return self.assembler[step]


@dataclass(frozen=True)
class Accumulation:
    """Gradient accumulation of open-unlearning: the mapping between micro-batches and optimizer steps.

    Micro-batches are numbered from 0 through the whole run. An optimizer step follows every ``accumulate``-th
    micro-batch of the run, so the left-over micro-batches of an epoch are carried into the next one. An epoch counts as
    ``batches // accumulate`` steps, at least one, and the run ends after that number of steps per epoch even if rows
    are left. If an epoch is shorter than a step, a step also follows its last micro-batch. The loss of every
    micro-batch is divided by ``accumulate``, even in a step with fewer micro-batches.

    Attributes:
        batches: micro-batches in an epoch.
        accumulate: gradient accumulation steps.
    """

    batches: int
    accumulate: int

    @classmethod
    def of(cls, rows: int, size: int, accumulate: int, *, drop_last: bool = False) -> "Accumulation":
        """Return the accumulation for epochs of ``rows`` pairs in micro-batches of ``size``.

        Raises:
            ValueError: an epoch has no micro-batch.
        """
        batches = rows // size if drop_last else math.ceil(rows / size)
        if not batches:
            raise ValueError(
                f"`dataloader_drop_last`: expected at least {size} pairs (one full micro-batch), got {rows}; drop it, "
                "or use smaller micro-batches"
            )
        return cls(batches, accumulate)

    @property
    def steps(self) -> int:
        """Number of optimizer steps that an epoch counts as."""
        return max(self.batches // self.accumulate, 1)

    def taken(self, read: int) -> int:
        """Return the number of optimizer steps taken after ``read`` micro-batches."""
        steps = read // self.accumulate
        if self.batches <= self.accumulate:
            steps += read // self.batches - read // math.lcm(self.batches, self.accumulate)
        return steps

    def read(self, steps: int) -> int:
        """Return the number of micro-batches read when ``steps`` optimizer steps have been taken."""
        return bisect.bisect_left(range(steps * self.accumulate + 1), steps, key=self.taken)

    def epochs_at_border(self, read: int) -> float:
        """Return the value of ``state.epoch`` in open-unlearning at the last end of an epoch; −1 before the first end.

        The state is updated with optimizer steps. If an epoch has left-over micro-batches, the value at its end is
        therefore less than a whole number.
        """
        ended = read // self.batches
        if not ended:
            return -1.0
        epoch, batch = divmod(self.read(self.taken(ended * self.batches)) - 1, self.batches)
        return epoch + (batch + 1) / self.batches
