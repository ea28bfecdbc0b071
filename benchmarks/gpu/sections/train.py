"""The trainer: NPO on TOFU's rows with a Llama of random weights, its step times, and its host synchronisations.

The first steps warm up and the following ones are timed. In the last ones torch warns of every operation that makes the
host wait for the device. ``run.arguments`` are kinds of reference, with one run each; the default is "cached".
"""

import math
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from benchmarks.gpu.section import Run
from benchmarks.harness.timing import Clock
from benchmarks.step.data import stores
from benchmarks.step.inputs import OBJECTIVE, SHAPES, StepShape, make_model
from benchmarks.step.run import free
from efface import UnlearnTrainer
from efface.hf.train.arguments import UnlearnArguments

_SHAPE = "GPU: Llama-3.2-1B, bf16"
_OURS = ("efface", "efface_kernels")
_THEIRS = ("transformers", "accelerate", "peft")
_WARNING = "called a synchronizing CUDA operation"


@dataclass(frozen=True)
class Plan:
    """The steps of a run that are timed, and those in which host synchronisations are recorded; numbered from 1."""

    timed: range
    watched: range


_PLAN = Plan(range(6, 21), range(21, 31))
_SMOKE = Plan(range(3, 5), range(5, 7))


@dataclass(frozen=True)
class Site:
    """A place that makes the host wait: the innermost line of a training library, and the operation it called."""

    place: str
    operation: str

    @property
    def ours(self) -> bool:
        """Whether the line belongs to efface."""
        return self.place.partition(".")[0] in _OURS


class Waits:
    """Counts torch's warnings about host synchronisations, by the line that causes them."""

    def __init__(self) -> None:
        self.counts: Counter[Site] = Counter()

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Count such warnings instead of showing them; ``torch.cuda.set_sync_debug_mode`` makes torch warn."""
        with warnings.catch_warnings():
            warnings.filterwarnings("always", message=_WARNING)  # by default, a warning is shown once per line
            shown = warnings.showwarning

            def note(message: Warning | str, *where: Any, **more: Any) -> None:
                if _WARNING in str(message):
                    self.counts[_site()] += 1
                else:
                    shown(message, *where, **more)

            warnings.showwarning = note
            yield


def _site() -> Site:
    """Return the current place. The warning itself names only the innermost line, which is often inside torch."""
    frame: Any = sys._getframe(1)  # noqa: SLF001 - traceback would read the lines of every file
    frames = []
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name not in {__name__, "warnings", "_py_warnings"}:
            frames.append(f"{name}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    trainers = (place for place in frames if place.replace(":", ".").partition(".")[0] in _OURS + _THEIRS)
    # A backward pass runs in a separate thread, whose stack has no frame of the caller.
    return Site(next(trainers, frames[0]), frames[0])


class Trainer(UnlearnTrainer):
    """An ``UnlearnTrainer`` that records the loss of each step, on the device, and its tokens."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.losses: list[Tensor] = []
        self.tokens: list[int] = []
        super().__init__(*args, **options)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        self.tokens.append(inputs.tokens)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.losses.append(loss.detach())
        return loss


class Moments(TrainerCallback):
    """Records the begin and end of each step on the device's clock, and makes torch warn in the watched steps."""

    def __init__(self, device: str, watched: range) -> None:
        self._gpu, self._watched, self._clock = device == "cuda", watched, Clock(device)
        self._spans: list[list[Any]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._gpu and state.global_step + 1 == self._watched.start:
            torch.cuda.set_sync_debug_mode("warn")
        self._spans.append([self._clock.now()])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._spans[-1].append(self._clock.now())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Turn the warnings off: work after the last step can wait for the device."""
        self.silence()

    def silence(self) -> None:
        """Turn torch's warnings off."""
        if self._gpu:
            torch.cuda.set_sync_debug_mode("default")

    def steps(self, numbers: range) -> list[float]:
        """Return the milliseconds of each of these steps. The device must have finished them."""
        return [self._clock.between(*self._spans[number - 1]) for number in numbers]

    def whole(self, numbers: range) -> float:
        """Return the milliseconds from the begin of the first to the end of the last of these steps."""
        return self._clock.between(self._spans[numbers[0] - 1][0], self._spans[numbers[-1] - 1][1])


def run(run: Run) -> None:
    """Append a row for each kind of reference, and one for each line that makes the host wait.

    Raises:
        ArithmeticError: a run failed, its first loss is not that of a random model, or a line of efface makes the host
            wait in every step.
    """
    shape = replace(SHAPES["smoke"], checkpointing=True) if run.smoke else SHAPES[_SHAPE]
    data = stores(shape.llama().vocab_size)
    wrong = [fault for reference in run.arguments or ("cached",) for fault in _trained(run, shape, data, reference)]
    if wrong:
        raise ArithmeticError("the trainer: " + "; ".join(wrong))


def _trained(run: Run, shape: StepShape, data: tuple[Any, Any, str], reference: str) -> list[str]:
    """Call ``_train``; report an exception as a fault and free the memory, so that the other kinds still run."""
    try:
        wrong = _train(run, shape, data, reference)
    except Exception as error:  # noqa: BLE001 - any error
        text = f"{reference}: {type(error).__name__}: {error}"
        run.row(text.splitlines()[0], reference=reference, problem=text)
        wrong = [text]
    free(run.device)
    return wrong


def _train(run: Run, shape: StepShape, data: tuple[Any, Any, str], reference: str) -> list[str]:
    """Append the rows of a run; return its faults."""
    plan = _SMOKE if run.smoke else _PLAN
    forget, retain, source = data
    begin = time.perf_counter()
    model = make_model(shape, run.device, 0)
    made = time.perf_counter()
    moments, waits = Moments(run.device, plan.watched), Waits()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            _arguments(folder, run, pairs=shape.pairs, steps=plan.watched[-1]),
            forget=forget,
            retain=retain,
            objective=OBJECTIVE,
            reference=reference,
            callbacks=[moments],
        )
        ready = time.perf_counter()
        if not run.smoke:
            torch.cuda.reset_peak_memory_stats()
        try:
            with waits.noted():
                trainer.train()
        finally:
            moments.silence()
    if not run.smoke:
        torch.cuda.synchronize()
    trained = time.perf_counter()
    steps = moments.steps(plan.timed)
    tokens = sum(trainer.tokens[number - 1] for number in plan.timed)
    rate = 1e3 * tokens / moments.whole(plan.timed)
    losses = [float(loss) for loss in trainer.losses]
    peak = None if run.smoke else torch.cuda.max_memory_allocated() / (1 << 30)
    run.row(
        f"{reference}: {statistics.median(steps):.1f} ms per step ({min(steps):.1f} to {max(steps):.1f}), {rate:.0f} "
        f"tokens/s, first loss {losses[0]:.3f}, last loss {losses[-1]:.3f}"
        + ("" if peak is None else f", peak {peak:.1f} GiB")
        + f"; model {made - begin:.1f} s, trainer with its reference {ready - made:.1f} s, run {trained - ready:.1f} s",
        reference=reference,
        data=source,
        steps=len(losses),
        timed=len(plan.timed),
        step_ms=statistics.median(steps),
        steps_ms=steps,
        watched_ms=moments.steps(plan.watched),
        tokens_per_step=tokens / len(plan.timed),
        tokens_per_second=rate,
        first_loss=losses[0],
        last_loss=losses[-1],
        losses=losses,
        peak_gib=peak,
        model_seconds=made - begin,
        reference_seconds=ready - made,
        run_seconds=trained - ready,
    )
    # At the first step the policy still equals its reference, and the model's predictions are uniform.
    known = 2 / OBJECTIVE.beta * math.log(2) + OBJECTIVE.alpha * math.log(shape.llama().vocab_size)
    wrong = _waits(run, reference, waits, len(plan.watched))
    if not abs(losses[0] - known) <= 0.05 * known:
        wrong.append(f"{reference}: expected a first loss of about {known:.2f}, got {losses[0]:.2f}")
    return wrong


def _waits(run: Run, reference: str, waits: Waits, steps: int) -> list[str]:
    """Append a row for each line that waited in ``steps`` steps; return those of efface that wait in every step."""
    wrong = []
    for site, count in waits.counts.most_common():
        who = "efface" if site.ours else "theirs"
        said = f"{reference}: {who} waits {count / steps:.1f} times per step at {site.place}"
        run.row(
            f"{said}, for {site.operation}",
            reference=reference,
            place=site.place,
            operation=site.operation,
            ours=site.ours,
            waits=count,
            waits_per_step=count / steps,
        )
        if site.ours and count >= steps:
            wrong.append(said)
    if not waits.counts and not run.smoke:
        run.row(f"{reference}: nothing waits for the device in {steps} steps", reference=reference, waits=0)
    return wrong


def _arguments(folder: str, run: Run, *, pairs: int, steps: int) -> UnlearnArguments:
    """Return the arguments of a run that saves nothing and uses no network."""
    return UnlearnArguments(
        output_dir=folder,
        pairs_per_step=pairs,
        token_budget=8192,
        max_steps=steps,
        learning_rate=1e-4,
        logging_steps=max(1, steps // 3),
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=run.smoke,
        reference_cache="none",
        seed=0,
    )
