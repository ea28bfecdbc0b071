"""Which micro-batches an optimizer step adds up in transformers 4.45's loop, the one that open-unlearning pins."""

import bisect
import math
from dataclasses import dataclass


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
