"""Running the providers: all in every round where all fit at once, else one after another in blocks."""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch

from benchmarks.step.check import TOLERANCES, Errors, Gold, check, check_eager
from benchmarks.step.cost import asked_for
from benchmarks.step.data import Step, make_steps, stores
from benchmarks.step.models import Shape, make_model, reference_seed, wider
from benchmarks.step.providers import Eager, EagerLora, Provider
from benchmarks.step.stopwatch import Stopwatch
from benchmarks.timing import interleaved

Kind = type[Provider]
_CHECKED_STEPS = 2  # all would take longer than the timing
_AGAIN = 3  # steps that warm up a later block
StepsOf = Mapping[bool, Sequence[Step]]  # by whether they are LoRA's: its reference is another model


@dataclass
class Outcome:
    """What a provider's rounds gave: the parts of every step, or the problem that ended them."""

    parts: list[dict[str, float]] = field(default_factory=list)
    first_loss: float = float("nan")  # before any update
    peak_gib: float | None = None  # of GPU memory: models, gradients, optimizer states, activations
    problem: str = ""


def steps_of(kinds: Sequence[Kind], shape: Shape, device: str) -> tuple[dict[bool, list[Step]], str]:
    """Return the steps, with the reference's log-probabilities, and what data they are made of."""
    forget, retain, data = stores(shape.llama().vocab_size)
    steps = {}
    for lora in sorted({kind.lora for kind in kinds}):
        reference = make_model(shape, device, reference_seed(lora=lora)).eval()
        steps[lora] = make_steps(forget, retain, reference, pairs=shape.pairs, count=shape.steps)
        del reference
        free(device)
    return steps, data


def made(kind: Kind, shape: Shape, device: str) -> Provider:
    """Return a provider with its own models; all have the same weights at the start."""
    reference = make_model(shape, device, reference_seed(lora=kind.lora)) if kind.second_model() else None
    return kind(make_model(shape, device, 0, lora=kind.lora), reference)


def free(device: str) -> None:
    """Give the memory of what is no longer referred to back to the device."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def checked(kinds: Sequence[Kind], shape: Shape, device: str, steps: StepsOf) -> tuple[dict[Kind, Errors], list[str]]:
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
            refused.append(f"{kind.name}: {_said(error)}")
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


def by_rounds(kinds: Sequence[Kind], shape: Shape, steps: StepsOf, device: str, rounds: int) -> dict[Kind, Outcome]:
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


def _one_step(provider: Provider, steps: Sequence[Step], watch: Stopwatch, outcome: Outcome) -> Callable[[int], object]:
    def call(number: int) -> None:
        loss = provider.train(steps[number % len(steps)], watch)
        if outcome.first_loss != outcome.first_loss:  # NaN: none yet
            outcome.first_loss = loss.item()

    return call


def by_blocks(
    kinds: Sequence[Kind], shape: Shape, steps: StepsOf, device: str, rounds: int
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
            outcome.problem = _said(error)
        free(device)
        yield outcomes


def _block(
    kind: Kind, shape: Shape, device: str, steps: Sequence[Step], numbers: Sequence[int], outcome: Outcome
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


def _said(error: Exception) -> str:
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"
