"""An objective of one's own, from a function."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from efface.objectives.base import Objective
from efface_kernels import Sequences


@dataclass(frozen=True, kw_only=True)
class FunctionObjective(Objective):
    """gamma · mean over sequences of ``function(sequences)`` + alpha · retain loss.

    Attributes:
        function: maps ``efface_kernels.Sequences`` of s sequences to their loss terms (s,): plain torch, differentiable
            in their log-probabilities; called once a micro-batch or oftener, with whole sequences.
        reads_reference: whether it reads ``sequences.reference_sums``.
    """

    function: Callable[[Sequences], Tensor]
    reads_reference: bool = False

    name: ClassVar[str] = "function"

    @property
    def needs_reference(self) -> bool:  # type: ignore[override]
        """See ``reads_reference``."""
        return self.reads_reference

    def forget_terms(self, sequences: Sequences) -> Tensor:
        """Call the function."""
        return self.function(sequences)
