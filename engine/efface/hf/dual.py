"""The dual variable of PDU: the weight of the retain term, which grows while the retain loss is above its bound."""

from dataclasses import replace
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from efface.hf.callbacks import TrainerBound
from efface.hf.stepping import Stepping
from efface.objectives import PDU


class DualVariable(TrainerBound, ExportableState):
    """Gives the trainer's objective, a PDU, its next ``alpha``; checkpoints carry it.

    Args:
        stepping: says when, and by which retain loss.
    """

    def __init__(self, stepping: Stepping) -> None:
        self._stepping = stepping
        self._epochs = 0.0  # that had passed when an epoch last ended

    @property
    def _objective(self) -> PDU:
        objective = self._trainer().objective
        if not isinstance(objective, PDU):
            raise TypeError(f"`objective`: expected PDU, got {type(objective).__name__}")
        return objective

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on from a checkpoint's weight, with the end of an epoch that the checkpoint came before."""
        kept: Any = state.stateful_callbacks
        if isinstance(kept, dict) and type(self).__name__ in kept:
            attributes = kept[type(self).__name__]["attributes"]
            self._trainer().objective = replace(self._objective, alpha=attributes["alpha"])
            self._epochs = attributes.get("epochs", 0.0)
            # Written with the epoch's last step: transformers begins the next epoch, and ends none before.
            if state.epoch and state.epoch == round(state.epoch) and self._epochs < state.epoch:
                self.on_epoch_end(args, state, control)

    def before_batch(self, batch: Any) -> None:
        """Before a micro-batch."""
        self._ascend(self._stepping.dual_before_batch(self._trainer(), self._objective, batch))

    def after_batch(self, batch: Any, step: Any, output: Any) -> None:
        """After a micro-batch of a step, with what its loss was made of."""
        self._ascend(self._stepping.dual_after_batch(self._trainer(), self._objective, batch, step, output))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After an optimizer step."""
        self._ascend(self._stepping.dual_after_step(self._trainer(), self._objective))

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After an epoch."""
        self._epochs = state.epoch or 0.0
        self._ascend(self._stepping.dual_after_epoch(self._trainer(), self._objective, state.epoch or 0.0))

    def _ascend(self, retain_loss: float | None) -> None:
        if retain_loss is not None:
            self._trainer().objective = self._objective.ascend(retain_loss)

    def read(self) -> dict[str, float]:
        """Return what is logged, under open-unlearning's name."""
        return {"retain_preference": self._objective.alpha}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": {"alpha": self._objective.alpha, "epochs": self._epochs}}
