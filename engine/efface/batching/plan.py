"""The plan of an epoch: which sequences share a micro-batch, as a pure function of seed and epoch."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from efface.batching.roles import StepTotals
from efface.batching.store import TokenStore


@dataclass(frozen=True)
class MicroBatch:
    """The sequences of one forward pass, and the totals of the optimizer step that it belongs to."""

    forget: NDArray[np.int64]
    retain: NDArray[np.int64]
    totals: StepTotals


def _cycled(count: int, sequences: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw ``count`` indices: as many shuffled rounds over 0 .. sequences − 1 as it takes."""
    if not count:
        return np.empty(0, np.int64)
    rounds = -(-count // sequences)
    return np.concatenate([rng.permutation(sequences) for _ in range(rounds)])[:count].astype(np.int64)


def plan_epoch(
    forget: TokenStore,
    retain: TokenStore,
    *,
    pairs_per_batch: int,
    batches_per_step: int,
    seed: int,
    epoch: int,
) -> list[MicroBatch]:
    """Return the micro-batches of an epoch, in order.

    Every forget sequence comes exactly once, each with one retain sequence drawn without repetition until all have
    been drawn. Where one store is empty the epoch runs over the other alone. A step is ``batches_per_step``
    micro-batches; the last step of an epoch may be smaller.

    Raises:
        ValueError: both stores empty, or a count below 1.
    """
    if pairs_per_batch < 1 or batches_per_step < 1:
        raise ValueError(
            f"`pairs_per_batch` and `batches_per_step`: expected at least 1, got {pairs_per_batch}, {batches_per_step}"
        )
    pairs = len(forget) or len(retain)
    if not pairs:
        raise ValueError("the forget and the retain set are empty; nothing to plan")
    # Philox is counter-based: an epoch's draws depend on (seed, epoch) and on nothing that ran before.
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64)))
    forget_order = _cycled(pairs if len(forget) else 0, len(forget), rng)
    retain_order = _cycled(pairs if len(retain) else 0, len(retain), rng)

    batches = []
    pairs_per_step = pairs_per_batch * batches_per_step
    for step in range(0, pairs, pairs_per_step):
        stop = min(step + pairs_per_step, pairs)
        totals = StepTotals(
            forget_sequences=len(forget_order[step:stop]),
            forget_tokens=int(forget.label_counts[forget_order[step:stop]].sum()),
            retain_sequences=len(retain_order[step:stop]),
            retain_tokens=int(retain.label_counts[retain_order[step:stop]].sum()),
        )
        for start in range(step, stop, pairs_per_batch):
            batch = slice(start, min(start + pairs_per_batch, stop))
            batches.append(MicroBatch(forget_order[batch], retain_order[batch], totals))
    return batches
