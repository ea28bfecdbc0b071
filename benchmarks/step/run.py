"""Checks and timing of the step providers: interleaved in rounds if all fit into memory, otherwise in blocks.

Before anything is timed, each provider's loss and gradients are compared with the eager step in a wider dtype. The
eager step in the timed dtype is checked first, because the others are allowed its rounding error as well.
"""

import gc
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.report import said
from benchmarks.harness.timing import interleaved
from benchmarks.step.inputs import Step, StepShape, make_model, make_steps, reference_seed, wider
from benchmarks.step.measures import Stopwatch, peak_mib
from benchmarks.step.providers import Eager, StepProvider, baseline

Kind = type[StepProvider]
_CHECKED_STEPS = 2  # all steps would take longer than the timing
_AGAIN = 3  # warm-up steps of a provider's second block
StepsOf = Mapping[bool, Sequence[Step]]  # by ``lora``, because LoRA has another reference model
_TIMES = 3  # times the eager step's own errors
_ABSURD = 0.25  # random weights in bf16 give an error of 0.01 to 0.02; beyond 0.25 gradients cannot be compared


@dataclass(frozen=True)
class Tolerance:
    """The largest relative error of a provider against the eager step in the next wider dtype; others are not timed."""

    wider: torch.dtype
    loss: float
    gradient: float  # rms of the worst parameter's gradient

    def widened(self, eager: "Errors") -> "Tolerance":
        """Return a tolerance at least as large that also allows three times the errors of the eager step itself."""
        return replace(
            self, loss=max(self.loss, _TIMES * eager.loss), gradient=max(self.gradient, _TIMES * eager.gradient)
        )


class Errors(NamedTuple):
    """A provider's relative errors, as in ``Tolerance``."""

    loss: float
    gradient: float


TOLERANCES = {
    torch.float32: Tolerance(torch.float64, 1e-5, 1e-4),
    torch.bfloat16: Tolerance(torch.float32, torch.finfo(torch.bfloat16).eps, 4 * torch.finfo(torch.bfloat16).eps),
}


@dataclass(frozen=True)
class Gold:
    """The eager step's losses of all steps, and its gradients of the first step."""

    losses: list[float]
    gradients: list[Tensor | None]

    @classmethod
    def of(cls, eager: Eager, steps: Sequence[Step]) -> "Gold":
        """Run the eager step. Its models are not needed afterwards."""
        losses = [eager.loss(step).item() for step in steps]
        eager.gradients(steps[0])
        return cls(losses, [weight.grad for weight in eager.trained])


def errors_of(provider: StepProvider, steps: Sequence[Step], gold: Gold) -> Errors:
    """Compare the losses of all steps and the gradients of the first step with ``gold``."""
    losses = [provider.gradients(step).item() for step in reversed(steps)][::-1]  # the first step's gradients remain
    grads = [weight.grad for weight in provider.trained]
    return Errors(
        max(_known(abs(got - want) / abs(want)) for got, want in zip(losses, gold.losses, strict=True)),
        max(_relative(own, wanted) for own, wanted in zip(grads, gold.gradients, strict=True)),
    )


def check_eager(eager: Eager, steps: Sequence[Step], gold: Gold) -> Errors:
    """Return the errors of the eager step, which are the rounding errors of its dtype.

    Raises:
        ArithmeticError: the errors are too large for rounding.
    """
    found = errors_of(eager, steps, gold)
    if not (found.loss <= _ABSURD and found.gradient <= _ABSURD):
        raise ArithmeticError(
            f"{eager.name!r} is not timed: expected errors of at most {_ABSURD}, from rounding, against the same step "
            f"in a wider dtype, got {found.loss:.1e} for the loss and {found.gradient:.1e} for the gradients"
        )
    return found


def check(provider: StepProvider, steps: Sequence[Step], gold: Gold, tolerance: Tolerance) -> Errors:
    """Return the errors of a provider.

    Raises:
        ArithmeticError: an error is outside the tolerance; providers that compute different things are not compared.
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
    """Return infinity for NaN, which ``max`` would ignore."""
    return float("inf") if math.isnan(error) else error


@dataclass
class Outcome:
    """The result of a provider's rounds: the parts of every step, or the problem that ended them."""

    parts: list[dict[str, float]] = field(default_factory=list)
    first_loss: float = float("nan")  # before any update
    peak_gib: float | None = None  # of GPU memory: models, gradients, optimizer states, activations
    step_mib: float | None = None  # of CPU memory in the largest step: gradients, activations
    problem: str = ""


def steps_of(kinds: Sequence[Kind], shape: StepShape, device: str) -> tuple[dict[bool, list[Step]], str]:
    """Return the steps, with the reference's log-probabilities, and a description of the data."""
    data = shape.stores()
    steps = {}
    for lora in sorted({kind.lora for kind in kinds}):
        reference = make_model(shape, device, reference_seed(lora=lora)).eval()
        steps[lora] = make_steps(data, reference, pairs=shape.pairs, count=shape.steps, objective=shape.objective)
        del reference
        free(device)
    return steps, data.said


def made(kind: Kind, shape: StepShape, device: str) -> StepProvider:
    """Return a provider with newly created models. All providers have the same initial weights."""
    reference = make_model(shape, device, reference_seed(lora=kind.lora)) if kind.second_model() else None
    return kind(make_model(shape, device, 0, lora=kind.lora), reference)


def free(device: str) -> None:
    """Free unreferenced memory and return it to the device."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def checked(
    kinds: Sequence[Kind], shape: StepShape, device: str, steps: StepsOf
) -> tuple[dict[Kind, Errors], list[str]]:
    """Return the errors of the providers that match the eager step, and the reasons why others are left out."""
    errors: dict[Kind, Errors] = {}
    refused: list[str] = []

    def tried(kind: Kind, compared: Callable[[Any], Errors]) -> Errors | None:
        found = None
        try:
            found = compared(made(kind, shape, device))
        except ArithmeticError as error:
            refused.append(str(error))
        except Exception as error:  # noqa: BLE001 - other implementations can raise anything; the rest still run
            refused.append(f"{kind.name}: {said(error)}")
        free(device)
        return found

    for lora in (False, True):
        own = [kind for kind in kinds if kind.lora == lora]
        if not own:
            continue
        eager, _ = baseline(own[0], shape.objective.name)
        tolerance, few = TOLERANCES[shape.dtype], steps[lora][:_CHECKED_STEPS]
        models = make_model(shape, device, 0, lora=lora), make_model(shape, device, reference_seed(lora=lora))
        gold = Gold.of(eager(*(wider(model, tolerance.wider) for model in models)), few)
        del models
        rounding = tried(eager, partial(check_eager, steps=few, gold=gold))
        if rounding is not None:
            tolerance = tolerance.widened(rounding)
        for kind in own:
            found = (
                rounding if kind is eager else tried(kind, partial(check, steps=few, gold=gold, tolerance=tolerance))
            )
            if found is not None:
                errors[kind] = found
    return errors, refused


def by_rounds(kinds: Sequence[Kind], shape: StepShape, steps: StepsOf, device: str, rounds: int) -> dict[Kind, Outcome]:
    """Run one step of every provider per round, so that a slow moment affects all. All models exist at once."""
    outcomes = {kind: Outcome() for kind in kinds}
    watches, calls = {}, {}
    for kind in kinds:
        provider, watches[kind] = made(kind, shape, device), Stopwatch(device)
        outcomes[kind].step_mib = _memory(provider, steps[kind.lora], device)
        watches[kind].follow(*provider.models)
        calls[kind] = _one_step(provider, steps[kind.lora], watches[kind], outcomes[kind])
    interleaved(calls, rounds, warm_up=1)
    for kind, watch in watches.items():
        outcomes[kind].parts = watch.read()[1:]
    return outcomes


def _memory(provider: StepProvider, steps: Sequence[Step], device: str) -> float | None:
    """Return the MiB that forward and backward of the largest step allocate on a CPU, or None on a GPU."""
    if device != "cpu":
        return None
    largest = max(steps, key=lambda step: step.batch.tokens)
    return peak_mib(lambda: provider.gradients(largest))


def _one_step(
    provider: StepProvider, steps: Sequence[Step], watch: Stopwatch, outcome: Outcome
) -> Callable[[int], object]:
    def call(number: int) -> None:
        loss = provider.train(steps[number % len(steps)], watch)
        if outcome.first_loss != outcome.first_loss:  # NaN: not set yet
            outcome.first_loss = loss.item()

    return call


def by_blocks(
    kinds: Sequence[Kind], shape: StepShape, steps: StepsOf, device: str, rounds: int
) -> Iterator[dict[Kind, Outcome]]:
    """Build, warm up, time and free one provider after another, then all again in reverse order (ABBA).

    Drifting clocks then slow the first and the last provider equally overall. Each of the two blocks has half of the
    rounds. Yields all outcomes so far after every block.
    """
    outcomes: dict[Kind, Outcome] = {}
    half = (rounds + 1) // 2
    first, second = range(half), range(half, rounds)
    for kind, numbers in chain(((kind, first) for kind in kinds), ((kind, second) for kind in reversed(kinds))):
        outcome = outcomes.setdefault(kind, Outcome())
        if outcome.problem or not numbers:
            continue
        try:
            _block(kind, shape, device, steps[kind.lora], numbers, outcome)
        except torch.OutOfMemoryError as error:
            outcome.problem = f"out of memory: asked for {asked_for(str(error))}"
        except Exception as error:  # noqa: BLE001 - other implementations can raise anything; the rest still run
            outcome.problem = said(error)
        free(device)
        yield outcomes


def _block(
    kind: Kind, shape: StepShape, device: str, steps: Sequence[Step], numbers: Sequence[int], outcome: Outcome
) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    provider, watch = made(kind, shape, device), Stopwatch(device)
    outcome.step_mib = outcome.step_mib or _memory(provider, steps, device)
    watch.follow(*provider.models)
    losses = [provider.train(step, watch) for step in _warm_up(kind, steps, first=not outcome.parts)]
    watch.read()
    if not outcome.parts:
        outcome.first_loss = losses[0].item()
    for number in numbers:
        provider.train(steps[number % len(steps)], watch)
    outcome.parts += watch.read()
    if device == "cuda":
        outcome.peak_gib = max(outcome.peak_gib or 0.0, torch.cuda.max_memory_allocated() / (1 << 30))


def _warm_up(kind: Kind, steps: Sequence[Step], *, first: bool) -> list[Step]:
    """Return the warm-up steps: all steps in the first block, because some kernels are compiled per size.

    In the second block everything is compiled, but memory was returned to the device, so the largest steps allocate it
    again.
    """
    if first:
        return list(steps)
    return sorted(steps, key=kind.tokens)[: -_AGAIN - 1 : -1]


def asked_for(message: str) -> str:
    """Return the size in torch's "out of memory" message, or "an unknown size"."""
    found = re.search(r"[Tt]ried to allocate ([\d.]+ [KMGT]iB)", message)
    return found.group(1) if found else "an unknown size"
