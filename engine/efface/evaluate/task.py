"""What evaluations are made of: rows to compute with a model, in batches that data and settings alone decide."""

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

RowResult: TypeAlias = dict[str, Any]
"""What a task found out about a row, as JSON: it is stored, gathered from processes and read again as it is."""


class NotFiniteError(FloatingPointError, ValueError):
    """Numbers of a model that are none: the model is broken, not what it was asked."""


class Task(Protocol):
    """Results of a model, one for each row.

    Attributes:
        name: for messages and progress.
        keys: (rows,) what a row's result depends on beside the model: its text or tokens and every setting, hashed.
            Rows with equal keys have equal results.
        batches: every row in exactly one; a function of data and settings, not of processes or of what is known, so
            that the same rows always share a forward pass and give the same bits.
    """

    name: str
    keys: Sequence[bytes]
    batches: Sequence[NDArray[np.int64]]

    def run(self, model: PreTrainedModel, rows: NDArray[np.int64]) -> list[RowResult]:
        """Compute one batch: a result for each of its rows, in order."""
