"""The optimizer steps of a run as a map-style data set, so that the trainer's own loop and its resuming carry it."""

import bisect
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TypeVar

from torch.utils.data import Dataset

from efface.batching import Assembler, EpochPlan, RetainSampling, Step, TokenStore, plan_epoch

S_co = TypeVar("S_co", covariant=True)


class Steps(Dataset[S_co], ABC):
    """Item k is this rank's part of optimizer step k of the current epoch.

    Attributes:
        stores: the forget, the retain and, where the plan knows them, the alternate sequences.
    """

    stores: tuple[TokenStore, ...]

    @abstractmethod
    def __len__(self) -> int:
        """Return the optimizer steps of an epoch."""

    @property
    @abstractmethod
    def pairs(self) -> int:
        """Pairs of an epoch."""

    # Not called set_epoch: a data loader that accelerate makes to resume in an epoch's middle calls that with epoch 0.
    @abstractmethod
    def begin_epoch(self, epoch: int) -> None:
        """Let the items be those of ``epoch``; every epoch has the same number of steps."""


class PackedSteps(Steps[Step]):
    """Steps of packed micro-batches.

    Args:
        forget: may be empty.
        retain: may be empty.
        alternate: the alternate answer of every forget sequence, or None.
        pairs_per_step: forget/retain pairs of a step, on all ranks together.
        token_budget: most tokens of a micro-batch.
        seed: of the plan.
        rank: this process.
        world_size: of how many.
        retain_sampling: see ``efface.batching.plan_epoch``.
        drop_last: leave out a last step of fewer pairs.
        workers: threads that assemble ahead.
        pin_memory: assemble into pinned memory.
    """

    def __init__(
        self,
        forget: TokenStore,
        retain: TokenStore,
        alternate: TokenStore | None = None,
        *,
        pairs_per_step: int,
        token_budget: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        retain_sampling: RetainSampling = "random",
        drop_last: bool = False,
        workers: int = 1,
        pin_memory: bool = False,
    ) -> None:
        self.stores = (forget, retain) if alternate is None else (forget, retain, alternate)
        self._plan_options = {
            "pairs_per_step": pairs_per_step,
            "token_budget": token_budget,
            "seed": seed,
            "world_size": world_size,
            "retain_sampling": retain_sampling,
            "drop_last": drop_last,
        }
        self._assembler_options = {"rank": rank, "workers": workers, "pin_memory": pin_memory}
        self._epoch = -1
        self._assembler: Assembler | None = None
        self.begin_epoch(0)

    def begin_epoch(self, epoch: int) -> None:
        """Plan ``epoch``."""
        if epoch == self._epoch:
            return
        if self._assembler is not None:
            self._assembler.close()
        self._assembler = Assembler(self.plan(epoch), self.stores, **self._assembler_options)  # type: ignore[arg-type]
        self._epoch = epoch

    def plan(self, epoch: int) -> EpochPlan:
        """Return the plan of any epoch."""
        forget, retain, *alternates = (store.lengths for store in self.stores)
        return plan_epoch(
            forget,
            retain,
            alternates=alternates[0] if alternates else None,
            epoch=epoch,
            **self._plan_options,  # type: ignore[arg-type]
        )

    @property
    def assembler(self) -> Assembler:
        """The steps of the current epoch."""
        if self._assembler is None:
            raise RuntimeError("no epoch was planned")
        return self._assembler

    @property
    def pairs(self) -> int:
        """Pairs of an epoch."""
        plan = self.assembler.plan
        return max(len(plan.forget), len(plan.retain))

    def __len__(self) -> int:
        """Return the optimizer steps of an epoch."""
        return len(self.assembler)

    def __getitem__(self, step: int) -> Step:
        """Return this rank's part of a step."""
        return self.assembler[step]


@dataclass(frozen=True)
class Accumulation:
    """Micro-batches, numbered through the whole run from 0, and the optimizer steps that they make.

    A step is taken after every ``accumulate``-th micro-batch of the run, not of the epoch: what an epoch leaves over is
    carried into the next one. An epoch counts as ``batches // accumulate`` steps, at least one, and the run ends after
    so many for each epoch, whatever rows are then left. In an epoch shorter than a step its last micro-batch takes one
    too. Every micro-batch's loss is divided by ``accumulate``, also in a step of fewer.

    Attributes:
        batches: micro-batches of an epoch.
        accumulate: gradient accumulation steps.
    """

    batches: int
    accumulate: int

    @classmethod
    def of(cls, rows: int, size: int, accumulate: int, *, drop_last: bool = False) -> "Accumulation":
        """Return that of an epoch of ``rows`` in micro-batches of ``size``.

        Raises:
            ValueError: no micro-batch.
        """
        batches = rows // size if drop_last else math.ceil(rows / size)
        if not batches:
            raise ValueError(
                f"`dataloader_drop_last`: expected at least {size} pairs, one whole batch, got {rows}; drop it, or "
                "make batches smaller"
            )
        return cls(batches, accumulate)

    @property
    def steps(self) -> int:
        """Optimizer steps that an epoch counts as."""
        return max(self.batches // self.accumulate, 1)

    def taken(self, read: int) -> int:
        """Return the optimizer steps taken when so many micro-batches have been read."""
        steps = read // self.accumulate
        if self.batches <= self.accumulate:
            steps += read // self.batches - read // math.lcm(self.batches, self.accumulate)
        return steps

    def read(self, steps: int) -> int:
        """Return the micro-batches read when optimizer step number ``steps``, from 1, is taken; 0 before the first."""
        return bisect.bisect_left(range(steps * self.accumulate + 1), steps, key=self.taken)

    def epochs_at_border(self, read: int) -> float:
        """Return the epochs that the trainer's state shows at the last end of an epoch; −1 before the first.

        The state moves with the optimizer's steps, so at the end of an epoch that leaves micro-batches over it falls
        short of a whole number.
        """
        ended = read // self.batches
        if not ended:
            return -1.0
        epoch, batch = divmod(self.read(self.taken(ended * self.batches)) - 1, self.batches)
        return epoch + (batch + 1) / self.batches
