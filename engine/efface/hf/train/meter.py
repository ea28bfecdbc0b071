"""What a run measures about itself, summed on the device and read only when it is logged."""

import copy
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from efface.batching import PackedBatch, Role
from efface.hf.model.head_loss import StepOutput
from efface.objectives import Objective
from efface_kernels import Kind, Term

PHASES = ("forward", "backward", "optimizer", "data")


class PhaseClock:
    """Adds up seconds by phase: each ``end`` gives the time since the last mark to a phase.

    On a CUDA device marks are events in its stream, looked at only by ``read``: a phase costs what the device spent on
    it, and waiting for data counts only as far as the device had nothing else left to do.
    """

    def __init__(self) -> None:
        self._cuda = False
        self._last: Any = None
        self._spans: list[tuple[str, Any, Any]] = []

    def begin(self, device: torch.device) -> None:
        """Set a mark."""
        self._cuda = device.type == "cuda"
        self._last = self._now()

    def end(self, phase: str) -> None:
        """Give the time since the last mark to ``phase``, and set a mark. Without a mark, nothing happens."""
        if self._last is not None:
            now = self._now()
            self._spans.append((phase, self._last, now))
            self._last = now

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> dict[str, float]:
        """Return the seconds of each phase since the last call; waits for the device's last mark."""
        seconds = dict.fromkeys(PHASES, 0.0)
        if self._spans and self._cuda:
            self._spans[-1][2].synchronize()
        for phase, start, stop in self._spans:
            seconds[phase] += start.elapsed_time(stop) / 1000 if self._cuda else stop - start
        self._spans = []
        return seconds


_STEP_PHASES = ("forward", "backward", "optimizer")

Gather = Callable[[Tensor], Tensor]
"""(k,) of this rank -> (ranks, k)."""


class StepMeter(TrainerCallback):
    """Sums figures of the optimizer steps since the last log; each is a mean over what it names.

    - ``forget_loss``, ``retain_loss``: the loss's two terms, before gamma and alpha; over steps.
    - ``forget_probability``, ``retain_probability``: exp(L / n), TOFU's Probability; over sequences.
    - ``mean_log_ratio``: L − L_ref; over forget sequences, where there is a reference.
    - ``npo_weight``: 2 σ(β (L − L_ref)), what NPO multiplies gradient ascent by; over forget sequences.
    - ``tokens_per_second`` of all ranks together, while the slowest was in its steps. On CUDA by the device's clock, of
      which the host runs ahead.
    - ``time_forward``, ``time_backward``, ``time_optimizer``, ``time_data``: shares of the four in their sum. Data is
      the time that a step waited for its batches, and no part of it.
    - ``padding_saved``: share of the tokens that padding would have added, had each micro-batch been a padded forget
      batch and a padded retain batch.
    - ``peak_memory_gib``: of the rank with most: the device's allocations, or on the CPU the process's resident memory.
    """

    def __init__(self) -> None:
        self.tokens = 0  # of the whole run
        self.clock = PhaseClock()
        self._run_seconds = 0.0
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._tokens = 0
        self._padded = 0
        self._phases = dict.fromkeys(PHASES, 0.0)

    @property
    def seconds(self) -> float:
        """Of the whole run, inside optimizer steps. Waits for the device."""
        self._read_clock()
        return self._run_seconds

    def _read_clock(self) -> None:
        for phase, seconds in self.clock.read().items():
            self._phases[phase] += seconds
            self._run_seconds += seconds if phase in _STEP_PHASES else 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock; evaluation and checkpoints between steps are not counted."""
        self.clock.begin(args.device)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop the clock."""
        self.clock.end("optimizer")
        self._steps += 1

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: a resumed run goes on with the sums that it had."""
        self._read_clock()
        return {name: copy.copy(value) for name, value in vars(self).items() if name != "clock"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what ``state_dict`` returned, of this version: another's figures would be of other things."""
        known = {name: value for name, value in state.items() if name in vars(self)}
        if state.keys() == known.keys():
            vars(self).update(known)

    @torch.no_grad()
    def add(self, batch: PackedBatch, output: StepOutput, objective: Objective | None) -> None:
        """Add a micro-batch's output. What is added depends on the objective alone, or ranks would not agree."""
        self._count_tokens(batch.tokens, padded_tokens(batch))
        forget = batch.roles == Role.FORGET
        weights = {"retain": 1.0} if objective is None else {"forget": objective.gamma, "retain": objective.alpha}
        probability = (output.sequence_logprobs / batch.label_offsets.device.diff()).exp()
        for name, mask in (("forget", forget), ("retain", batch.roles == Role.RETAIN)):
            if weights.get(name):
                self._add(f"{name}_loss", torch.where(mask, output.terms, 0).sum() / weights[name])
                self._add_mean(f"{name}_probability", probability, mask)
        if objective is not None and objective.needs_reference:
            reference = torch.zeros_like(output.terms) if output.reference_sums is None else output.reference_sums
            ratio = output.sequence_logprobs - reference
            self._add_mean("mean_log_ratio", ratio, forget)
            term = objective.term() if objective.reads == "logprobs" else None
            if isinstance(term, Term) and term.kind == Kind.NPO:
                self._add_mean("npo_weight", 2 * torch.sigmoid(term.beta * ratio), forget)

    def add_losses(self, tokens: int, **losses: Tensor) -> None:
        """Add a padded micro-batch's share of the means of the step."""
        self._count_tokens(tokens, tokens)
        for name, loss in losses.items():
            self._add(f"{name}_loss", loss)

    def _count_tokens(self, tokens: int, padded: int) -> None:
        self._tokens += tokens
        self.tokens += tokens
        self._padded += padded

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name].to(value.device) + value if name in self._sums else value

    def _add_mean(self, name: str, values: Tensor, mask: Tensor) -> None:
        mask = mask & ~values.isnan()  # of sequences whose loss reads no log-probabilities
        self._add(name, torch.where(mask, values, 0).sum())
        self._add(_count(name), mask.sum())

    def read(self, gather: Gather = lambda figures: figures[None]) -> dict[str, float]:
        """Return the means over the steps since the last call, and start anew. Reads the device.

        With several ranks all have to call this, with the ``gather`` that shows each the others' figures.
        """
        if not self._steps:
            return {}
        names = sorted(self._sums)
        device = self._sums[names[0]].device if names else torch.device("cpu")
        self._read_clock()
        times = [self._phases[name] for name in PHASES]
        host = [float(self._tokens), float(self._padded), peak_memory_gib(device), *times]
        device_sums = [self._sums[name].float() for name in names]
        figures = torch.cat([torch.tensor(host, device=device), *(value[None] for value in device_sums)])
        ranks = gather(figures).double().cpu()
        tokens, padded, _, *times = (float(x) for x in ranks[:, : len(host)].sum(0))
        sums = dict(zip(names, ranks[:, len(host) :].sum(0).tolist(), strict=True))
        means: dict[str, float] = {}
        for name in names:
            if name.endswith("_loss"):
                means[name] = sums[name] / self._steps
            elif sums.get(_count(name)):
                means[name] = sums[name] / sums[_count(name)]
        in_steps = ranks[:, [3 + PHASES.index(name) for name in _STEP_PHASES]].sum(1)
        if (seconds := float(in_steps.max())) > 0:
            means["tokens_per_second"] = round(tokens / seconds, 1)
        if padded:
            means["padding_saved"] = round(1 - tokens / padded, 4)
        if peak := float(ranks[:, 2].max()):
            means["peak_memory_gib"] = round(peak, 3)
        total = sum(times)
        if total > 0:
            means |= {f"time_{name}": round(value / total, 4) for name, value in zip(PHASES, times, strict=True)}
        self._reset()
        return means


def _count(name: str) -> str:
    return f"{name} count"


def padded_tokens(batch: PackedBatch) -> int:
    """Tokens of the batch as a padded batch of what is compared and a padded batch of what is retained."""
    count = batch.forget_sequences
    parts = (batch.lengths[:count], batch.lengths[count:])
    return sum(len(part) * max(part) for part in parts if part)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held at once: the device's allocations since it was last reset, or the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return 0.0  # the standard library does not say
    import resource  # noqa: PLC0415 - Windows has none

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class LossWatch:
    """Remembers the first step whose loss was not finite, without reading the device in every step."""

    def __init__(self) -> None:
        self._first_bad: Tensor | None = None

    def see(self, loss: Tensor, step: int) -> None:
        """Note the loss of a step. On the CPU, where reading is free, check at once."""
        if self._first_bad is None:
            self._first_bad = torch.full((), -1, dtype=torch.int64, device=loss.device)
        fresh = (self._first_bad < 0) & ~torch.isfinite(loss)
        self._first_bad = torch.where(fresh, step, self._first_bad)
        if loss.device.type == "cpu":
            self.check()

    def check(self) -> None:
        """Raise FloatingPointError if a loss was NaN or infinite."""
        if self._first_bad is None or (step := int(self._first_bad)) < 0:
            return
        raise FloatingPointError(
            f"the loss is not finite at step {step}, so the run stops; nothing was saved after it. Try a lower "
            "--learning-rate, a smaller --gamma, gradient clipping (--max-grad-norm 1.0), or --bf16 instead of --fp16; "
            "gradient ascent without a retain term diverges by design"
        )
