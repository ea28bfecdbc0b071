"""What a run measures about itself, summed on the device and read only when it is logged."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from efface.batching import PackedBatch, Role


class StepMeter(TrainerCallback):
    """Sums forget loss, retain loss, tokens and seconds of the optimizer steps since the last log."""

    def __init__(self) -> None:
        self.tokens = 0  # of the whole run
        self.seconds = 0.0  # of the whole run, inside optimizer steps
        self._reset()
        self._began: float | None = None

    def _reset(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._tokens = 0
        self._seconds = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock; evaluation and checkpoints between steps are not counted."""
        self._began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop the clock."""
        if self._began is not None:
            elapsed = time.perf_counter() - self._began
            self._seconds += elapsed
            self.seconds += elapsed
        self._steps += 1

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: a resumed run goes on with the sums that it had."""
        return {name: value for name, value in vars(self).items() if name != "_began"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what ``state_dict`` returned."""
        vars(self).update(state)

    def add(self, batch: PackedBatch, terms: Tensor, weights: dict[str, float]) -> None:
        """Add a micro-batch: its weighted terms (S,), and the weights that forget and retain losses enter with."""
        self._tokens += batch.tokens
        self.tokens += batch.tokens
        for name, role in (("forget", Role.FORGET), ("retain", Role.RETAIN)):
            if weights.get(name):
                value = torch.where(batch.roles == role, terms, 0).sum() / weights[name]
                key = f"{name}_loss"
                self._sums[key] = self._sums[key].to(value.device) + value if key in self._sums else value

    def add_losses(self, tokens: int, **losses: Tensor) -> None:
        """Add a padded micro-batch's share of the means of the step."""
        self._tokens += tokens
        self.tokens += tokens
        for name, loss in losses.items():
            key = f"{name}_loss"
            self._sums[key] = self._sums[key] + loss if key in self._sums else loss

    def read(self, over_ranks: Callable[[Tensor], Tensor] = lambda sums: sums) -> dict[str, float]:
        """Return the means over the steps since the last call, and start anew. Reads the device.

        ``over_ranks`` adds a vector over all ranks, each of which has to call this.
        """
        if not self._steps:
            return {}
        names = sorted(self._sums)
        tokens = torch.tensor(float(self._tokens), device=self._sums[names[0]].device if names else None)
        sums = over_ranks(torch.stack([tokens, *(self._sums[name].float() for name in names)])).tolist()
        means = {name: value / self._steps for name, value in zip(names, sums[1:], strict=True)}
        if self._seconds > 0:
            means["tokens_per_second"] = round(sums[0] / self._seconds, 1)
        self._reset()
        return means


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
            "--learning_rate, a smaller --gamma, gradient clipping (--max_grad_norm 1.0), or --bf16 instead of --fp16; "
            "gradient ascent without a retain term diverges by design"
        )
