"""Before anything is timed: everybody's loss and gradients against the eager step in a wider dtype."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.step.data import Step
from benchmarks.step.providers import Eager, Provider


@dataclass(frozen=True)
class Tolerance:
    """How far a provider may be from the eager step in the next wider dtype, relative, before it is not timed."""

    wider: torch.dtype
    loss: float
    gradient: float  # of the worst parameter's gradient, rms


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


def check(provider: Provider, steps: Sequence[Step], gold: Gold, tolerance: Tolerance) -> tuple[float, float]:
    """Compare the steps' losses and the first step's gradients with ``gold``; return the two errors.

    Raises:
        ArithmeticError: an error beyond the tolerance. Providers that compute different things are not compared.
    """
    losses = [provider.gradients(step).item() for step in reversed(steps)][::-1]  # ends with the first's gradients
    loss = max(abs(got - want) / abs(want) for got, want in zip(losses, gold.losses, strict=True))
    grads = [weight.grad for weight in provider.trained]
    gradient = max(_relative(own, wanted) for own, wanted in zip(grads, gold.gradients, strict=True))
    if not (loss <= tolerance.loss and gradient <= tolerance.gradient):
        raise ArithmeticError(
            f"{provider.name!r} is not timed: expected the eager step's loss within {tolerance.loss:.1e} and "
            f"gradients within {tolerance.gradient:.1e}, got {loss:.1e} and {gradient:.1e}"
        )
    return loss, gradient


def _relative(got: Tensor | None, exact: Tensor | None) -> float:
    if got is None or exact is None:
        return float("inf")
    return float((got.to(exact.dtype) - exact).norm() / exact.norm())
