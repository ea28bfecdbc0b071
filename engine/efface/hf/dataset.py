"""The optimizer steps of a run as a map-style data set, so that the trainer's own loop and its resuming carry it."""

from abc import ABC, abstractmethod
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
