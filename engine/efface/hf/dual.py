"""The dual variable of PDU: the weight of the retain term, which grows while the retain loss is above its bound."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from efface.batching import PackedBatch, Role, StepTotals, TokenStore
from efface.hf.callbacks import undisturbed
from efface.hf.head_loss import StepOutput
from efface.hf.open_unlearning import PaddedPairs, PaddedSteps, drawn_retain_loss
from efface.hf.score import store_logprobs
from efface.objectives import PDU

if TYPE_CHECKING:
    from efface.hf.trainer import PackedTrainer


class DualVariable(TrainerCallback, ExportableState):
    """Gives the trainer's objective its next ``alpha`` after a step, or after an epoch; checkpoints carry it.

    Args:
        trainer: whose ``objective`` is a PDU.
        retain: the retain set.
        padded: open-unlearning's steps, if the run takes those; the variable then changes as theirs does.
    """

    def __init__(self, trainer: "PackedTrainer", retain: TokenStore, padded: PaddedSteps | None = None) -> None:
        self._trainer = trainer
        self._retain = retain
        self._padded = padded
        self._nll: Tensor | None = None  # this rank's share of the step's

    @property
    def _objective(self) -> PDU:
        objective = self._trainer.objective
        if not isinstance(objective, PDU):
            raise TypeError(f"`objective`: expected PDU, got {type(objective).__name__}")
        return objective

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on from a checkpoint's weight."""
        kept: Any = state.stateful_callbacks
        if isinstance(kept, dict) and type(self).__name__ in kept:
            alpha = kept[type(self).__name__]["attributes"]["alpha"]
            self._trainer.objective = replace(self._objective, alpha=alpha)

    def see(self, batch: PackedBatch, output: StepOutput, totals: StepTotals) -> None:
        """Add a micro-batch's share of the step's retain NLL."""
        retain = torch.where(batch.roles == Role.RETAIN, output.sequence_logprobs, 0.0)
        nll = -retain.sum() / max(totals.retain_tokens, 1)
        self._nll = nll if self._nll is None else self._nll + nll

    def begin_padded(self, batch: PaddedPairs) -> None:
        """At the start of an epoch but the first, ascend by retain rows drawn anew, as many as the epoch has pairs."""
        padded, objective, trainer = self._padded, self._objective, self._trainer
        if padded is None or objective.dual_update_upon != "epoch" or batch.position % padded.accumulation.batches:
            return
        epoch = batch.position // padded.accumulation.batches
        if epoch and padded.accumulation.epochs_at_border(batch.position) >= objective.dual_warmup_epochs:
            draw = (retain.to(trainer.args.device) for retain in padded.retain_draw(epoch - 1))
            model: Any = trainer.model
            with undisturbed(model):
                self._ascend(drawn_retain_loss(model, draw))

    def see_padded(self, batch: PaddedPairs, retain_loss: Tensor) -> None:
        """Ascend by the retain NLL of a micro-batch, as open-unlearning does after each, once it is warm.

        What its trainer knows of the epochs that have passed is the last end of an epoch.
        """
        if self._padded is None or self._objective.dual_update_upon != "step":
            return
        warm_up = self._objective.dual_warmup_epochs
        if warm_up == 0 or self._padded.accumulation.epochs_at_border(batch.position) >= warm_up:
            self._ascend(float(retain_loss))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ascend by the step's retain loss, once the warm-up is over."""
        nll, self._nll = self._nll, None
        # Where this step began: the first one after the warm-up's epochs is the first that updates.
        began = (state.global_step - 1) / self._trainer.steps_per_epoch
        if nll is not None and self._objective.dual_update_upon == "step" and self._warm(began):
            self._ascend(float(self._trainer.accelerator.reduce(nll)))

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ascend by the retain loss of the whole set, once the warm-up is over."""
        if self._padded is not None:
            return
        if self._objective.dual_update_upon == "epoch" and self._warm(state.epoch or 0.0):
            trainer = self._trainer
            with trainer.accelerator.autocast():
                sums = store_logprobs(trainer.accelerator.unwrap_model(trainer.model), self._retain, name="retain")
            self._ascend(-float(sums.sum()) / int(self._retain.label_counts.sum()))

    def _warm(self, epochs: float) -> bool:
        return epochs >= self._objective.dual_warmup_epochs - 1e-9

    def _ascend(self, retain_loss: float) -> None:
        self._trainer.objective = self._objective.ascend(retain_loss)

    def read(self) -> dict[str, float]:
        """Return what is logged, under open-unlearning's name."""
        return {"retain_preference": self._objective.alpha}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": {"alpha": self._objective.alpha}}
