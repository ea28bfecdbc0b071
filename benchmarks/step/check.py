"""Before anything is timed: everybody's loss and gradients against the eager step in a wider dtype.

The eager step itself comes first, in the dtype that is timed: what it rounds, others may round too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.step.data import Step
from benchmarks.step.providers import Eager, Provider

_TIMES = 3  # the eager step's own errors
_ABSURD = 0.25  # random weights and bf16 give a hundredth or two; of gradients that far off nothing can be said


@dataclass(frozen=True)
class Tolerance:
    """How far a provider may be from the eager step in the next wider dtype, relative, before it is not timed."""

    wider: torch.dtype
    loss: float
    gradient: float  # of the worst parameter's gradient, rms

    def widened(self, eager: "Errors") -> "Tolerance":
        """Return one that is no smaller, and allows three times the errors of the eager step itself."""
        return replace(
            self, loss=max(self.loss, _TIMES * eager.loss), gradient=max(self.gradient, _TIMES * eager.gradient)
        )


class Errors(NamedTuple):
    """Of a provider: as ``Tolerance`` has them."""

    loss: float
    gradient: float


TOLERANCES = {
    torch.float32: Tolerance(torch.float64, 1e-5, 1e-4),
    torch.bfloat16: Tolerance(torch.float32, torch.finfo(torch.bfloat16).eps, 4 * torch.finfo(torch.bfloat16).eps),
}


@dataclass(frozen=True)
class Gold:
    """The eager step's losses of all steps, and the gradients of the first one."""

    losses: list[float]
    gradients: list[Tensor | None]

    @classmethod
    def of(cls, eager: Eager, steps: Sequence[Step]) -> "Gold":
        """Run it; its models may go afterwards."""
        losses = [eager.loss(step).item() for step in steps]
        eager.gradients(steps[0])
        return cls(losses, [weight.grad for weight in eager.trained])


def errors_of(provider: Provider, steps: Sequence[Step], gold: Gold) -> Errors:
    """Compare the steps' losses and the first step's gradients with ``gold``."""
    losses = [provider.gradients(step).item() for step in reversed(steps)][::-1]  # ends with the first's gradients
    grads = [weight.grad for weight in provider.trained]
    return Errors(
        max(_known(abs(got - want) / abs(want)) for got, want in zip(losses, gold.losses, strict=True)),
        max(_relative(own, wanted) for own, wanted in zip(grads, gold.gradients, strict=True)),
    )


def check_eager(eager: Eager, steps: Sequence[Step], gold: Gold) -> Errors:
    """Return the errors of the eager step, which are what its dtype rounds.

    Raises:
        ArithmeticError: errors that no rounding explains.
    """
    found = errors_of(eager, steps, gold)
    if not (found.loss <= _ABSURD and found.gradient <= _ABSURD):
        raise ArithmeticError(
            f"{eager.name!r} is not timed: expected rounding alone, at most {_ABSURD}, between its step and the same "
            f"in a wider dtype, got {found.loss:.1e} of the loss and {found.gradient:.1e} of the gradients"
        )
    return found


def check(provider: Provider, steps: Sequence[Step], gold: Gold, tolerance: Tolerance) -> Errors:
    """Return the errors of a provider.

    Raises:
        ArithmeticError: an error beyond the tolerance. Providers that compute different things are not compared.
    """
    found = errors_of(provider, steps, gold)
    if not (found.loss <= tolerance.loss and found.gradient <= tolerance.gradient):
        raise ArithmeticError(
            f"{provider.name!r} is not timed: expected the eager step's loss within {tolerance.loss:.1e} and "
            f"gradients within {tolerance.gradient:.1e}, got {found.loss:.1e} and {found.gradient:.1e}"
        )
    return found


def _relative(got: Tensor | None, exact: Tensor | None) -> float:
    if got is None or exact is None:
        return float("inf")
    return _known(float((got.to(exact.dtype) - exact).norm() / exact.norm()))


def _known(error: float) -> float:
    """NaN, which ``max`` would pass over, is an infinite error."""
    return float("inf") if math.isnan(error) else error
