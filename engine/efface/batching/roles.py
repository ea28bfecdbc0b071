"""What the sequences of an optimizer step are there for, and how many there are."""

from dataclasses import dataclass
from enum import IntEnum


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
