"""The vendor's products alone, into a matrix of logits that is made once: what no implementation can undercut."""

import torch
from torch import Tensor

from benchmarks.loss.inputs import LossInputs, Shape
from benchmarks.loss.providers.base import Found, Gradients, of_modes

NAME = "bare GEMMs"


class _Products:
    def __init__(self) -> None:
        self._logits: Tensor | None = None

    def __call__(self, inputs: LossInputs, mode: str) -> Gradients:
        hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
        shape = (hidden.shape[0], weight.shape[0])
        if self._logits is None or self._logits.shape != shape:
            self._logits = hidden.new_empty(shape)
        if mode == "live":
            torch.mm(inputs.reference_hidden, inputs.reference_weight.t(), out=self._logits)
        torch.mm(hidden, weight.t(), out=self._logits)
        if mode.startswith("frozen"):
            return (torch.mm(self._logits, weight),)
        return torch.mm(self._logits, weight), torch.mm(self._logits.t(), hidden)


def providers(shape: Shape) -> Found:
    """The products of each mode."""
    return of_modes(NAME, 0, "the products alone", _Products(), shape), []
