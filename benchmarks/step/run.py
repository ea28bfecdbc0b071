"""Running the providers: checked first, then all in every round where all fit at once, else in blocks.

Everybody's loss and gradients are compared with the eager step in a wider dtype before anything is timed. The eager
step itself comes first, in the dtype that is timed: what it rounds, others may round too.
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
from benchmarks.step.inputs import Step, StepShape, make_model, make_steps, reference_seed, stores, wider
from benchmarks.step.measures import Stopwatch
from benchmarks.step.providers import Eager, EagerLora, StepProvider

Kind = type[StepProvider]
_CHECKED_STEPS = 2  # all would take longer than the timing
_AGAIN = 3  # steps that warm up a later block
StepsOf = Mapping[bool, Sequence[Step]]  # by whether they are LoRA's: its reference is another model
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


def errors_of(provider: StepProvider, steps: Sequence[Step], gold: Gold) -> Errors:
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


def check(provider: StepProvider, steps: Sequence[Step], gold: Gold, tolerance: Tolerance) -> Errors:
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


@dataclass
class Outcome:
    """What a provider's rounds gave: the parts of every step, or the problem that ended them."""

    parts: list[dict[str, float]] = field(default_factory=list)
    first_loss: float = float("nan")  # before any update
    peak_gib: float | None = None  # of GPU memory: models, gradients, optimizer states, activations
    problem: str = ""


def steps_of(kinds: Sequence[Kind], shape: StepShape, device: str) -> tuple[dict[bool, list[Step]], str]:
    """Return the steps, with the reference's log-probabilities, and what data they are made of."""
    forget, retain, data = stores(shape.llama().vocab_size)
    steps = {}
    for lora in sorted({kind.lora for kind in kinds}):
        reference = make_model(shape, device, reference_seed(lora=lora)).eval()
        steps[lora] = make_steps(forget, retain, reference, pairs=shape.pairs, count=shape.steps)
        del reference
        free(device)
    return steps, data


def made(kind: Kind, shape: StepShape, device: str) -> StepProvider:
    """Return a provider with its own models; all have the same weights at the start."""
    reference = make_model(shape, device, reference_seed(lora=kind.lora)) if kind.second_model() else None
    return kind(make_model(shape, device, 0, lora=kind.lora), reference)


def free(device: str) -> None:
    """Give the memory of what is no longer referred to back to the device."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def checked(
    kinds: Sequence[Kind], shape: StepShape, device: str, steps: StepsOf
) -> tuple[dict[Kind, Errors], list[str]]:
    """Return the errors of the providers that compute what the eager step computes, and why others are left out."""
    errors: dict[Kind, Errors] = {}
    refused: list[str] = []

    def tried(kind: Kind, compared: Callable[[Any], Errors]) -> Errors | None:
        found = None
        try:
            found = compared(made(kind, shape, device))
        except ArithmeticError as error:
            refused.append(str(error))
        except Exception as error:  # noqa: BLE001 - whatever a rival raises; it leaves the others their figures
            refused.append(f"{kind.name}: {said(error)}")
        free(device)
        return found

    for lora, eager in ((False, Eager), (True, EagerLora)):
        own = [kind for kind in kinds if kind.lora == lora]
        if not own:
            continue
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
    """Run a step of every provider each round: a slow moment of the machine slows all. All models live at once."""
    outcomes = {kind: Outcome() for kind in kinds}
    watches, calls = {}, {}
    for kind in kinds:
        provider, watches[kind] = made(kind, shape, device), Stopwatch(device)
        watches[kind].follow(*provider.models)
        calls[kind] = _one_step(provider, steps[kind.lora], watches[kind], outcomes[kind])
    interleaved(calls, rounds, warm_up=1)
    for kind, watch in watches.items():
        outcomes[kind].parts = watch.read()[1:]
    return outcomes


def _one_step(
    provider: StepProvider, steps: Sequence[Step], watch: Stopwatch, outcome: Outcome
) -> Callable[[int], object]:
    def call(number: int) -> None:
        loss = provider.train(steps[number % len(steps)], watch)
        if outcome.first_loss != outcome.first_loss:  # NaN: none yet
            outcome.first_loss = loss.item()

    return call


def by_blocks(
    kinds: Sequence[Kind], shape: StepShape, steps: StepsOf, device: str, rounds: int
) -> Iterator[dict[Kind, Outcome]]:
    """Build, warm up, time and free one provider after another; then all again in the reverse order (ABBA).

    Clocks that drift slow the first and the last provider alike, on the whole. Each of the two blocks has half of the
    rounds. Yields, after every block, all outcomes so far.
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
        except Exception as error:  # noqa: BLE001 - whatever a rival raises; it leaves the others their figures
            outcome.problem = said(error)
        free(device)
        yield outcomes


def _block(
    kind: Kind, shape: StepShape, device: str, steps: Sequence[Step], numbers: Sequence[int], outcome: Outcome
) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    provider, watch = made(kind, shape, device), Stopwatch(device)
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
    """Return the steps before the timed ones: at first all of them, as some kernels are compiled by the size.

    Later nothing is compiled any more, but the memory was given back to the device: the largest steps take it anew.
    """
    if first:
        return list(steps)
    return sorted(steps, key=lambda step: step.batch.tokens if kind.ours else step.padded_tokens)[: -_AGAIN - 1 : -1]


def asked_for(message: str) -> str:
    """Return the size that torch's "out of memory" message names, or "an unknown size"."""
    found = re.search(r"[Tt]ried to allocate ([\d.]+ [KMGT]iB)", message)
    return found.group(1) if found else "an unknown size"
