"""Training metrics: losses, speed, phase times and memory, summed on the device and read only when logged."""

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
    """Timer that sums seconds by phase; each ``end`` adds the time since the last mark to a phase.

    On a CUDA device, marks are events in the stream, which only ``read`` evaluates. A phase's time is then the time of
    the device, and waiting for data counts only while the device is idle.
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
        """Add the time since the last mark to ``phase``, and set a new mark. A no-op if no mark was set."""
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
        """Return the seconds of each phase since the last call; on CUDA, wait for the last mark."""
        seconds = dict.fromkeys(PHASES, 0.0)
        if self._spans and self._cuda:
            self._spans[-1][2].synchronize()
        for phase, start, stop in self._spans:
            seconds[phase] += start.elapsed_time(stop) / 1000 if self._cuda else stop - start
        self._spans = []
        return seconds


_STEP_PHASES = ("forward", "backward", "optimizer")

Gather = Callable[[Tensor], Tensor]
"""Gathers the (k,) figures of this rank into the (ranks, k) figures of all ranks."""


class StepMeter(TrainerCallback):
    """Callback that sums metrics of the optimizer steps since the last log entry.

    - ``forget_loss``, ``retain_loss``: the two terms of the loss, before gamma and alpha; mean over steps.
    - ``forget_probability``, ``retain_probability``: exp(L / n), TOFU's Probability; mean over sequences.
    - ``mean_log_ratio``: L − L_ref; mean over forget sequences, for objectives with a reference.
    - ``npo_weight``: 2 σ(β (L − L_ref)), NPO's weight of gradient ascent; mean over forget sequences.
    - ``tokens_per_second``: tokens of the sequences of all ranks, shared tokens counted for each sequence, divided by
      the time that the slowest rank spent in steps. On CUDA the time is the device's, because the host runs ahead.
    - ``time_forward``, ``time_backward``, ``time_optimizer``, ``time_data``: shares of the four phases in their sum.
      ``time_data`` is the time spent waiting for batches, which is not part of a step.
    - ``padding_saved``: share of tokens saved, compared with one padded forget batch and one padded retain batch per
      micro-batch.
    - ``prefixes_saved``: share of the tokens on the sequences' paths that were not run, because sequences share them.
    - ``peak_memory_gib``: maximum over ranks of the device's allocations, or on CPUs of the process's resident memory.
    """

    def __init__(self) -> None:
        self.tokens = 0  # total of the run on this rank
        self.clock = PhaseClock()
        self._run_seconds = 0.0
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._tokens = 0
        self._padded = 0
        self._stored = 0
        self._paths = 0
        self._phases = dict.fromkeys(PHASES, 0.0)

    @property
    def seconds(self) -> float:
        """Seconds of the run inside optimizer steps. Synchronises the device."""
        self._read_clock()
        return self._run_seconds

    def _read_clock(self) -> None:
        for phase, seconds in self.clock.read().items():
            self._phases[phase] += seconds
            self._run_seconds += seconds if phase in _STEP_PHASES else 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock, so that evaluation and checkpoints between steps are not counted."""
        self.clock.begin(args.device)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count the step, and add the time since the last mark to the optimizer phase."""
        self.clock.end("optimizer")
        self._steps += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the sums for a checkpoint, so that a resumed run continues with them."""
        self._read_clock()
        return {name: copy.copy(value) for name, value in vars(self).items() if name != "clock"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of ``state_dict``; a state of another version of efface, with other keys, is ignored."""
        known = {name: value for name, value in state.items() if name in vars(self)}
        if state.keys() == known.keys():
            vars(self).update(known)

    @torch.no_grad()
    def add(self, batch: PackedBatch, output: StepOutput, objective: Objective | None) -> None:
        """Add the output of a micro-batch.

        The names of the metrics depend only on the objective, so that all ranks gather the same metrics.
        """
        self._count_tokens(batch.sequence_tokens, padded_tokens(batch))
        self._stored += batch.tokens
        self._paths += sum(batch.path_lengths)
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
        """Add the losses of a padded micro-batch, each already divided by the gradient accumulation steps."""
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
        mask = mask & ~values.isnan()  # NaN marks sequences whose loss does not use log-probabilities
        self._add(name, torch.where(mask, values, 0).sum())
        self._add(_count(name), mask.sum())

    def read(self, gather: Gather = lambda figures: figures[None]) -> dict[str, float]:
        """Return the metrics of the steps since the last call, and reset the sums. Synchronises the device.

        With several ranks, every rank must call this method.

        Args:
            gather: gathers the figures of all ranks, see ``Gather``; the default is for one rank.
        """
        if not self._steps:
            return {}
        names = sorted(self._sums)
        device = self._sums[names[0]].device if names else torch.device("cpu")
        self._read_clock()
        times = [self._phases[name] for name in PHASES]
        counts = (self._tokens, self._padded, self._stored, self._paths)
        host = [*map(float, counts), peak_memory_gib(device), *times]
        device_sums = [self._sums[name].float() for name in names]
        figures = torch.cat([torch.tensor(host, device=device), *(value[None] for value in device_sums)])
        ranks = gather(figures).double().cpu()
        tokens, padded, stored, paths, _, *times = (float(x) for x in ranks[:, : len(host)].sum(0))
        sums = dict(zip(names, ranks[:, len(host) :].sum(0).tolist(), strict=True))
        means: dict[str, float] = {}
        for name in names:
            if name.endswith("_loss"):
                means[name] = sums[name] / self._steps
            elif sums.get(_count(name)):
                means[name] = sums[name] / sums[_count(name)]
        in_steps = ranks[:, [5 + PHASES.index(name) for name in _STEP_PHASES]].sum(1)
        if (seconds := float(in_steps.max())) > 0:
            means["tokens_per_second"] = round(tokens / seconds, 1)
        if padded:
            means["padding_saved"] = round(1 - tokens / padded, 4)
        if stored < paths:
            means["prefixes_saved"] = round(1 - stored / paths, 4)
        if peak := float(ranks[:, 4].max()):
            means["peak_memory_gib"] = round(peak, 3)
        total = sum(times)
        if total > 0:
            means |= {f"time_{name}": round(value / total, 4) for name, value in zip(PHASES, times, strict=True)}
        self._reset()
        return means


def _count(name: str) -> str:
    return f"{name} count"


def padded_tokens(batch: PackedBatch) -> int:
    """Return the tokens of the batch if it were padded, as one batch of forget and one of retain sequences."""
    count = batch.forget_sequences
    parts = (batch.lengths[:count], batch.lengths[count:])
    return sum(len(part) * max(part) for part in parts if part)


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory: of the device's allocations since the last reset, or of the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return 0.0  # not available in the standard library
    import resource  # noqa: PLC0415 - the module does not exist on Windows

    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class LossWatch:
    """Detector of the first step with a loss that is not finite, without synchronising the device in every step."""

    def __init__(self) -> None:
        self._first_bad: Tensor | None = None

    def see(self, loss: Tensor, step: int) -> None:
        """Record the loss of a step. On the CPU, where reading a value is free, check it at once."""
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
            f"the loss is not finite at step {step}, so the run stops; nothing was saved after this step. Try a lower "
            "--learning-rate, a smaller --gamma, gradient clipping (--max-grad-norm 1.0), or --bf16 instead of --fp16; "
            "gradient ascent without a retain term diverges by design"
        )
