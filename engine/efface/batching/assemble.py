"""The assembler, which prefetches the batches of a rank's optimizer steps on background threads."""

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
    """The micro-batches of one rank for one optimizer step.

    Attributes:
        batches: the rank's micro-batches, at least one.
        totals: totals of the whole step, on all ranks.
    """

    batches: tuple[PackedBatch, ...]
    totals: StepTotals

    @property
    def tokens(self) -> int:
        """Number of tokens of the sequences in this rank's micro-batches; shared tokens count for each sequence."""
        return sum(batch.sequence_tokens for batch in self.batches)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Step":
        """Return the step with its batches on ``device``."""
        return replace(self, batches=tuple(batch.to(device, non_blocking) for batch in self.batches))


class Assembler:
    """A sequence of the steps of a plan: ``assembler[k]`` is step k of one rank.

    Indexing a step starts the assembly of the next ones on background threads, where the C++ core releases the GIL. A
    step depends only on the plan, the stores and k. So neither the number of threads nor the step at which a run
    resumes changes a batch.

    Args:
        plan: the plan of the epoch.
        stores: the forget store, the retain store and, if the objective uses alternate answers, the alternate store.
        rank: rank whose micro-batches are assembled.
        workers: number of threads.
        ahead: number of steps to prefetch; 0 assembles each step when it is indexed.
        share: store tokens that sequences of a micro-batch share, from the first token on, only once.
        last_tokens: include the last token of each sequence, which predicts nothing.
        pin_memory: assemble into pinned memory, from which an accelerator can copy asynchronously.

    Raises:
        ValueError: if ``workers`` is below 1 or ``ahead`` below 0.
    """

    def __init__(
        self,
        plan: EpochPlan,
        stores: Sequence[TokenStore],
        *,
        rank: int = 0,
        workers: int = 1,
        ahead: int = 2,
        share: bool = False,
        last_tokens: bool = True,
        pin_memory: bool = False,
    ) -> None:
        if workers < 1 or ahead < 0:
            raise ValueError(f"`workers`, `ahead`: expected at least 1 and at least 0, got {workers} and {ahead}")
        self.plan = plan
        self._stores = tuple(stores)
        self._rank = rank
        self._options = {"share": share, "last_tokens": last_tokens, "pin_memory": pin_memory}
        self._ahead = ahead
        self._pool = ThreadPoolExecutor(workers, "efface-assembler") if ahead else None
        self._pending: dict[int, Future[Step]] = {}
        self._label_counts = [store.label_counts for store in self._stores[:2]]

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self.plan)

    def __getitem__(self, step: int) -> Step:
        """Return a step, and start to assemble the next ones.

        Raises:
            IndexError: if the plan has no such step.
        """
        if self._pool is None:
            return self.assemble(step)
        wanted = range(step, min(step + 1 + self._ahead, len(self)))
        for key in set(self._pending).difference(wanted):  # prefetched for another position; the caller has jumped
            self._pending.pop(key).cancel()
        for key in wanted:
            if key not in self._pending:
                self._pending[key] = self._pool.submit(self.assemble, key)
        future = self._pending.pop(step, None)
        return self.assemble(step) if future is None else future.result()

    def close(self) -> None:
        """Stop the threads; steps that they have not started are cancelled."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()

    def assemble(self, step: int) -> Step:
        """Assemble a step on the calling thread."""
        batches = tuple(self._pack(planned) for planned in self.plan.micro_batches(step, self._rank))
        return Step(batches, self.totals(step))

    def totals(self, step: int) -> StepTotals:
        """Return the numbers of sequences and label tokens over which the means of a step are taken."""
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
            return pack_items(self._stores, planned.roles, planned.sequences, **self._options)
        # Every rank must run a forward and a backward pass, or the other ranks would wait for its gradients forever.
        # This one runs the shortest sequence of the run, because it is the cheapest. With role IDLE its weight is 0.
        role = min((Role.FORGET, Role.RETAIN), key=lambda role: self._stores[role].lengths.min(initial=2**62))
        shortest = np.array([self._stores[role].lengths.argmin()], np.int64)
        batch = pack_items(self._stores, np.array([role], np.int8), shortest, **self._options)
        batch.roles.fill_(Role.IDLE)
        return replace(batch, forget_sequences=0)
