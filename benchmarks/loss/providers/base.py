"""What a provider is, and providers made of a cross entropy."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.loss.inputs import LossInputs, Shape
from benchmarks.loss.objectives import FLOOR, FUNCTIONS, KL
from efface_kernels import segment_sums

Gradients = tuple[Tensor, ...]  # of ``LossInputs.wanted``
Found = tuple[list["Provider"], list[str]]  # providers of a shape, and why others are missing


@dataclass(frozen=True)
class Provider:
    """A way to compute an objective's gradients; ``gemms`` counts products of 2 N D V floating-point operations."""

    who: str
    mode: str  # of ``objectives.FLOOR``
    gemms: int
    computes: str
    run: Callable[[LossInputs], Gradients]  # given ``LossInputs.of(mode)``

    @property
    def name(self) -> str:
        """Who, in which mode."""
        return f"{self.who}, {self.mode}"


@dataclass(frozen=True)
class Head:
    """What a cross entropy is given beside hidden states (N, D) and targets (N,)."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None


Nll = Callable[[Tensor, Head, Tensor], Tensor]


def gradients(loss: Tensor, inputs: LossInputs) -> Gradients:
    """Return those of what wants one."""
    return torch.autograd.grad(loss, inputs.wanted)


def from_nll(who: str, again: int, computes: str, nll: Nll, shape: Shape) -> list[Provider]:
    """Providers whose ``nll`` gives each row's −ℓ: objectives as open-unlearning writes them.

    ``again``: products beyond the floor, 1 where the backward pass makes the logits anew.
    """
    if shape.objective == KL:
        return []

    def run(inputs: LossInputs, mode: str) -> Gradients:
        offsets, reference = inputs.row_offsets.device, inputs.reference_sums
        if mode == "live":
            frozen = Head(inputs.reference_weight, detached(inputs.bias), inputs.softcap)
            with torch.no_grad():
                reference = -segment_sums(nll(inputs.reference_hidden, frozen, inputs.targets).float(), offsets)
        logprobs = -nll(inputs.hidden, Head(inputs.weight, inputs.bias, inputs.softcap), inputs.targets).float()
        return gradients(FUNCTIONS[inputs.objective](logprobs, offsets, reference), inputs)

    return of_modes(who, again, computes, run, shape)


def from_mean(who: str, again: int, computes: str, mean: Nll, shape: Shape) -> list[Provider]:
    """Providers whose ``mean`` gives the mean of −ℓ: NLL in one call, GradDiff in two, one of each half."""

    def run(inputs: LossInputs, _mode: str) -> Gradients:
        head = Head(inputs.weight, inputs.bias, inputs.softcap)
        if inputs.objective == "NLL":
            return gradients(mean(inputs.hidden, head, inputs.targets), inputs)
        half = len(inputs.targets) // 2
        forget = mean(inputs.hidden[:half], head, inputs.targets[:half])
        return gradients(mean(inputs.hidden[half:], head, inputs.targets[half:]) - forget, inputs)

    return of_modes(who, again, computes, run, shape) if shape.objective in ("NLL", "GradDiff") else []


def of_modes(
    who: str,
    again: int,
    computes: str,
    run: Callable[[LossInputs, str], Gradients],
    shape: Shape,
    modes: Iterable[str] | None = None,
) -> list[Provider]:
    """Return a provider for each mode, by default of the shape's."""
    chosen = shape.modes if modes is None else [mode for mode in modes if mode in shape.modes]
    return [
        Provider(who, mode, FLOOR[mode] + again, computes, lambda inputs, mode=mode: run(inputs, mode))
        for mode in chosen
    ]


def detached(tensor: Tensor | None) -> Tensor | None:
    """Return it without its gradient."""
    return None if tensor is None else tensor.detach()
