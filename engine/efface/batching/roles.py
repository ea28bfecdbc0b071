"""What the sequences of an optimizer step are there for, and how many there are."""

from dataclasses import dataclass
from enum import IntEnum


class Role(IntEnum):
    """What a sequence of a batch is there for; the numbers are those of the C++ packer."""

    FORGET = 0
    RETAIN = 1


@dataclass(frozen=True)
class StepTotals:
    """What the means of one optimizer step run over: all of its micro-batches."""

    forget_sequences: int = 0
    forget_tokens: int = 0  # label tokens
    retain_sequences: int = 0
    retain_tokens: int = 0  # label tokens
