"""The assembler: the batches of a rank's optimizer steps, made ahead of their use on background threads."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch

from efface.batching.pack import PackedBatch, pack_items
from efface.batching.plan import EpochPlan, MicroBatch, Role, StepTotals
from efface.batching.store import TokenStore


@dataclass(frozen=True)
class Step:
    """What one rank does in one optimizer step.

    Attributes:
        batches: its micro-batches, at least one.
        totals: of the whole step, on all ranks.
    """

    batches: tuple[PackedBatch, ...]
    totals: StepTotals

    @property
    def tokens(self) -> int:
        """Tokens of this rank's micro-batches."""
        return sum(batch.tokens for batch in self.batches)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Step":
        """Return the step with its batches on ``device``."""
        return replace(self, batches=tuple(batch.to(device, non_blocking) for batch in self.batches))


class Assembler:
    """The steps of a plan, as a sequence: ``assembler[k]`` is a rank's step k.

    Asking for a step starts the assembly of the next ones in the background, where the C++ core works without Python's
    lock. What comes out depends on the plan and k alone, so neither threads nor where a run resumes change a batch.

    Args:
        plan: of the epoch.
        stores: the forget, the retain and, where there are any, the alternate store.
        rank: whose micro-batches.
        workers: threads.
        ahead: steps assembled before they are asked for; 0 assembles on demand.
        pin_memory: assemble into memory that an accelerator copies from without waiting.
    """

    def __init__(
        self,
        plan: EpochPlan,
        stores: Sequence[TokenStore],
        *,
        rank: int = 0,
        workers: int = 1,
        ahead: int = 2,
        pin_memory: bool = False,
    ) -> None:
        if workers < 1 or ahead < 0:
            raise ValueError(f"`workers`, `ahead`: expected at least 1 and 0, got {workers}, {ahead}")
        self.plan = plan
        self._stores = tuple(stores)
        self._rank = rank
        self._pin_memory = pin_memory
        self._ahead = ahead
        self._pool = ThreadPoolExecutor(workers, "efface-assembler") if ahead else None
        self._pending: dict[int, Future[Step]] = {}
        self._label_counts = [store.label_counts for store in self._stores[:2]]

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self.plan)

    def __getitem__(self, step: int) -> Step:
        """Return a step, and start on those after it.

        Raises:
            IndexError: a step that the plan has not.
        """
        if self._pool is None:
            return self.assemble(step)
        wanted = range(step, min(step + 1 + self._ahead, len(self)))
        for key in set(self._pending).difference(wanted):  # somebody jumped
            self._pending.pop(key).cancel()
        for key in wanted:
            if key not in self._pending:
                self._pending[key] = self._pool.submit(self.assemble, key)
        future = self._pending.pop(step, None)
        return self.assemble(step) if future is None else future.result()

    def close(self) -> None:
        """Stop the threads; what they have not begun is dropped."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()

    def assemble(self, step: int) -> Step:
        """Assemble a step here and now."""
        batches = tuple(self._pack(planned) for planned in self.plan.micro_batches(step, self._rank))
        return Step(batches, self.totals(step))

    def totals(self, step: int) -> StepTotals:
        """Return what the means of a step run over."""
        (forget, retain), (forget_counts, retain_counts) = self.plan.pairs(step), self._label_counts
        counts = forget_counts[forget]
        return StepTotals(
            forget_sequences=len(forget),
            forget_tokens=int(counts.sum()),
            retain_sequences=len(retain),
            retain_tokens=int(retain_counts[retain].sum()),
            forget_label_counts=tuple(counts.tolist()),
        )

    def _pack(self, planned: MicroBatch) -> PackedBatch:
        if planned.roles.size:
            return pack_items(self._stores, planned.roles, planned.sequences, pin_memory=self._pin_memory)
        # Every rank has to run a forward and a backward pass, or the others would wait for its gradients for ever. The
        # shortest sequence of the run is the cheapest to run; as an idle one it weighs nothing.
        role = min((Role.FORGET, Role.RETAIN), key=lambda role: self._stores[role].lengths.min(initial=2**62))
        shortest = np.array([self._stores[role].lengths.argmin()], np.int64)
        batch = pack_items(self._stores, np.array([role], np.int8), shortest, pin_memory=self._pin_memory)
        batch.roles.fill_(Role.IDLE)
        return replace(batch, forget_sequences=0)
