"""Evaluation while a run goes on: on a schedule, the best model kept, the run stopped when too much is lost.

How to keep the model that forgets best while it can still do half of what it could::

    def evaluate(model):  # any figures; this one scores rows of TOFU's columns
        log = efface.evaluate.score_rows(model, tokenizer, rows)
        return {"forget_probability": float(log.probability.mean()), "model_utility": utility_of(model)}

    EvaluateCallback(evaluate, every="epoch", on_start=True)
    KeepBest("forget_probability", greater_is_better=False, floor=("model_utility", 0.5))
    StopUnder("model_utility", 0.3)

all in ``UnlearnTrainer(callbacks=[...])``. What ``evaluate`` returns is logged, so TensorBoard and the like see it too.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from efface.files import written_folder
from efface.hf.model.supported import undisturbed
from efface.hf.train.checkpoints import BEST

Evaluate = Callable[[Any], dict[str, float]]


class TrainerBound(TrainerCallback):
    """A callback that works with the trainer; ``PackedTrainer`` sets it."""

    trainer: Any = None

    def _trainer(self) -> Any:
        if self.trainer is None:
            raise ValueError(f"{type(self).__name__}: expected a trainer of efface, which makes itself known; got none")
        return self.trainer


class EvaluateCallback(TrainerBound):
    """Calls ``evaluate(model)`` on a schedule and logs the figures it returns.

    An evaluation does not change the run, bit for bit: it runs without gradients and in evaluation mode, and modes and
    random numbers are afterwards what they were. On several processes all call it, and the first one's figures count.

    Args:
        evaluate: given the model without wrappers; its figures must not be called ``loss``, which is the run's own.
        every: "epoch", or a number of optimizer steps.
        on_start: evaluate before the first step too.

    Raises:
        ValueError: a schedule that is neither.
    """

    def __init__(self, evaluate: Evaluate, every: Literal["epoch"] | int = "epoch", *, on_start: bool = False) -> None:
        if every != "epoch" and (not isinstance(every, int) or every < 1):
            raise ValueError(f"`every`: expected 'epoch' or a number of steps from 1 on, got {every!r}")
        self._evaluate = evaluate
        self._every = every
        self._on_start = on_start

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Evaluate the model as it comes; a resumed run has done that before."""
        if self._on_start and state.global_step == 0:
            self._run(control)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Evaluate after every so many steps."""
        if self._every != "epoch" and state.global_step % self._every == 0:
            self._run(control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Evaluate after every epoch."""
        if self._every == "epoch":
            self._run(control)

    def _run(self, control: TrainerControl) -> None:
        trainer = self._trainer()
        with undisturbed(trainer.model), torch.no_grad():
            figures = {name: float(value) for name, value in self._evaluate(trainer.model).items()}
        if "loss" in figures:
            raise ValueError("EvaluateCallback: expected no figure called 'loss', which is the run's own; rename it")
        if trainer.args.world_size > 1:
            shared = [figures]
            torch.distributed.broadcast_object_list(shared, src=0)
            figures = shared[0]
        # A log in between must not use up the one that this step may be due.
        due = control.should_log
        trainer.log(figures)
        control.should_log = due


class KeepBest(TrainerBound, ExportableState):
    """Keeps the best model so far in a folder, as ``save_model`` writes it; ``best.json`` beside it says why.

    The folder holds a whole model or none, also when a run is killed while it is replaced. The best so far is part of
    checkpoints, so a resumed run goes on with it.

    Args:
        metric: a figure of the ``EvaluateCallback``.
        floor: a figure and the least that it may be for a model to count, as ``("model_utility", 0.5)``; or None.
        greater_is_better: whether more of ``metric`` is better.
        folder: None is ``<output_dir>/best``.

    Raises:
        ValueError: during the run, an evaluation with the metric but without the floor's figure.
    """

    def __init__(
        self,
        metric: str,
        floor: tuple[str, float] | None = None,
        *,
        greater_is_better: bool = True,
        folder: str | None = None,
    ) -> None:
        self.metric = metric
        self.floor = None if floor is None else (str(floor[0]), float(floor[1]))
        self.greater_is_better = greater_is_better
        self.folder = None if folder is None else str(folder)
        self.best: float | None = None
        self.best_step: int | None = None

    def state(self) -> dict[str, Any]:
        """Return what ``trainer_state.json`` remembers."""
        return {
            "args": {
                "metric": self.metric,
                "floor": None if self.floor is None else list(self.floor),
                "greater_is_better": self.greater_is_better,
                "folder": self.folder,
            },
            "attributes": {"best": self.best, "best_step": self.best_step},
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on with the best of the checkpoint that the run resumes from."""
        callbacks: Any = state.stateful_callbacks or {}
        remembered = callbacks.get(type(self).__name__, [])
        for mine in remembered if isinstance(remembered, list) else [remembered]:
            if mine["args"] == self.state()["args"]:
                self.best, self.best_step = mine["attributes"]["best"], mine["attributes"]["best_step"]

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Save the model if these figures are the best so far."""
        if logs is None or self.metric not in logs or not self._is_best(logs):
            return
        self.best, self.best_step = float(logs[self.metric]), state.global_step
        record = {name: value for name, value in logs.items() if isinstance(value, (int, float))}
        folder = Path(self.folder or Path(args.output_dir or ".") / BEST)
        self._save(folder, {"metric": self.metric, "step": state.global_step, "figures": record})

    def _is_best(self, logs: dict[str, Any]) -> bool:
        if self.floor is not None:
            name, least = self.floor
            if name not in logs:
                raise ValueError(
                    f"KeepBest: expected the floor's figure {name!r} beside {self.metric!r}, got {', '.join(logs)}"
                )
            if not float(logs[name]) >= least:
                return False
        value = float(logs[self.metric])
        if math.isnan(value):
            return False
        if self.best is None:
            return True
        return value > self.best if self.greater_is_better else value < self.best

    def _save(self, folder: Path, record: dict[str, Any]) -> None:
        trainer = self._trainer()
        if not trainer.args.should_save:  # with sharded weights every process takes part in a save
            trainer.save_model(str(folder), _internal_call=True)
            return
        with written_folder(folder) as partial:
            trainer.save_model(str(partial), _internal_call=True)
            (partial / "best.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


class StopUnder(TrainerCallback):
    """Stops the run once a figure of the ``EvaluateCallback`` is under a floor, or is no number at all.

    Args:
        metric: as ``"model_utility"``.
        floor: the least that it may be.
    """

    def __init__(self, metric: str, floor: float) -> None:
        self.metric = metric
        self.floor = floor

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Look at the figure."""
        if logs is not None and self.metric in logs and not float(logs[self.metric]) >= self.floor:
            control.should_training_stop = True
