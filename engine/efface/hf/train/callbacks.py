"""Callbacks for evaluation during training: on a schedule, keeping the best model, and stopping below a threshold.

This example keeps the model that forgets most among those with a utility of at least 0.5::

    def evaluate(model):  # returns any metrics; this one scores rows with TOFU's columns
        log = efface.evaluate.score_rows(model, tokenizer, rows)
        return {"forget_probability": float(log.probability.mean()), "model_utility": utility_of(model)}

    EvaluateCallback(evaluate, every="epoch", on_start=True)
    KeepBest("forget_probability", greater_is_better=False, floor=("model_utility", 0.5))
    StopUnder("model_utility", 0.3)

Pass all three in ``UnlearnTrainer(callbacks=[...])``. The values that ``evaluate`` returns are logged, so TensorBoard
and other trackers record them too.
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
    """Base class of callbacks that use the trainer; ``PackedTrainer`` sets the attribute ``trainer``."""

    trainer: Any = None

    def _trainer(self) -> Any:
        if self.trainer is None:
            raise ValueError(f"{type(self).__name__}: expected a trainer, got none; pass it to a trainer of efface")
        return self.trainer


class EvaluateCallback(TrainerBound):
    """Callback that calls ``evaluate(model)`` on a schedule and logs the metrics that it returns.

    The run itself stays bit-identical: the evaluation runs without gradients and in evaluation mode, and the training
    mode and the random-number generators are restored afterwards. On several processes, every process calls
    ``evaluate``, and the metrics of the first process are used.

    Args:
        evaluate: takes the model without wrappers, and returns metrics by name. The name ``loss`` is not allowed,
            because it is the run's own loss.
        every: "epoch", or a number of optimizer steps.
        on_start: whether to evaluate before the first step too.

    Raises:
        ValueError: ``every`` is neither "epoch" nor a positive integer.
    """

    def __init__(self, evaluate: Evaluate, every: Literal["epoch"] | int = "epoch", *, on_start: bool = False) -> None:
        if every != "epoch" and (not isinstance(every, int) or every < 1):
            raise ValueError(f"`every`: expected 'epoch' or a number of steps >= 1, got {every!r}")
        self._evaluate = evaluate
        self._every = every
        self._on_start = on_start

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Evaluate the initial model, unless the run is resumed."""
        if self._on_start and state.global_step == 0:
            self._run(control)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Evaluate after every ``every`` steps."""
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
            raise ValueError(
                "EvaluateCallback: expected no metric called 'loss', the run's own loss, got one; rename it"
            )
        if trainer.args.world_size > 1:
            shared = [figures]
            torch.distributed.broadcast_object_list(shared, src=0)
            figures = shared[0]
        # trainer.log can clear should_log; restore it, so that this step's own log entry is still written.
        due = control.should_log
        trainer.log(figures)
        control.should_log = due


class KeepBest(TrainerBound, ExportableState):
    """Callback that saves the best model so far to a folder with ``save_model``, and its metrics as ``best.json``.

    The folder contains a complete model or does not exist, even if the run is killed while the model is replaced.
    Checkpoints contain the best value so far, so a resumed run continues with it.

    Args:
        metric: name of a metric of the ``EvaluateCallback``.
        floor: name and minimum of a metric that a model must reach to qualify, such as ``("model_utility", 0.5)``; or
            None.
        greater_is_better: whether higher values of ``metric`` are better.
        folder: destination; None is ``<output_dir>/best``.

    Raises:
        ValueError: during the run, an evaluation returns ``metric`` without the metric of ``floor``.
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
        """Return the arguments and the best value so far, for ``trainer_state.json``."""
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
        """Restore the best value from the checkpoint that the run resumes from."""
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
        """Save the model if its metrics are the best so far."""
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
                    f"KeepBest: expected the metric {name!r} of `floor` together with {self.metric!r}, got "
                    f"{', '.join(logs)}; return both from `evaluate`"
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
        if not trainer.args.should_save:  # with sharded weights, every process must take part in a save
            trainer.save_model(str(folder), _internal_call=True)
            return
        with written_folder(folder) as partial:
            trainer.save_model(str(partial), _internal_call=True)
            (partial / "best.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


class StopUnder(TrainerCallback):
    """Callback that stops the run when a metric of the ``EvaluateCallback`` is below a threshold or NaN.

    Args:
        metric: name of the metric, such as ``"model_utility"``.
        floor: minimum value at which the run continues.
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
        """Stop the run if the metric is below ``floor`` or NaN."""
        if logs is not None and self.metric in logs and not float(logs[self.metric]) >= self.floor:
            control.should_training_stop = True
