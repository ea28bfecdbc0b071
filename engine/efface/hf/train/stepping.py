"""The ways of stepping: what an optimizer step holds, the loss of its micro-batches, and all else that goes with it.

``PackedStepping`` is ours; ``efface.hf.train.open_unlearning.PaddedStepping`` is open-unlearning's. ``DualVariable``
moves PDU's weight of the retain term at the moments that a way of stepping says.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from efface.batching import PackedBatch, Role, Step, StepTotals, TokenStore
from efface.hf.model.activations import ActivationLoss, train_only
from efface.hf.model.head_loss import HeadLoss, StepOutput
from efface.hf.reference.cached import CachedReference
from efface.hf.reference.live import ModelReference
from efface.hf.reference.score import store_logprobs
from efface.hf.train.arguments import UnlearnArguments
from efface.hf.train.callbacks import TrainerBound
from efface.hf.train.dataset import PackedSteps, Steps
from efface.hf.train.meter import StepMeter
from efface.objectives import PDU, RMU, Objective


class Stores(NamedTuple):
    """The sequences of a run; those that it does not read are empty, or None."""

    forget: TokenStore
    retain: TokenStore
    alternate: TokenStore | None = None


class SteppedTrainer(Protocol):
    """What the ways of stepping read of a trainer, as it is at that moment."""

    objective: Objective | None
    accelerator: Any
    args: Any
    meter: StepMeter
    model: Any
    state: Any

    @property
    def reference(self) -> CachedReference | ModelReference | None:
        """The frozen model."""


class Stepping(ABC):
    """One way of stepping.

    A dual variable ascends by a retain loss at the moments that the four ``dual_`` methods stand for; each returns that
    loss, or None to leave the variable as it is.

    Attributes:
        runs_reference: whether the frozen model itself has to run, where its log-probabilities would do.
        draws_refusals: whether a refusal is drawn whenever a row is read, instead of once.
        steps: the data set whose item k is this rank's part of optimizer step k.
        epoch_pairs: the pairs that a warm-up takes an epoch for.
    """

    runs_reference: ClassVar[bool] = False
    draws_refusals: ClassVar[bool] = False
    steps: Steps[Any]
    epoch_pairs: int

    @abstractmethod
    def __init__(
        self,
        args: UnlearnArguments,
        stores: Stores,
        objective: Objective | None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """Plan the steps of a run."""

    @classmethod
    @abstractmethod
    def planned_pairs(cls, args: UnlearnArguments) -> int:
        """Return the pairs that the plan of an epoch keeps together: of a step, or of one of its micro-batches."""

    @classmethod  # noqa: B027 - any can, unless a subclass says otherwise
    def check_objective(cls, objective: Objective) -> None:
        """Raise ValueError for an objective that cannot be trained in this way."""

    @classmethod
    @abstractmethod
    def choose_weights(cls, model: PreTrainedModel, objective: RMU) -> None:
        """Leave out the parameters that an objective does not name.

        Raises:
            ValueError: none is left.
        """

    @abstractmethod
    def loss(self, run: SteppedTrainer, model: nn.Module, batch: Any, step: Any) -> tuple[Tensor, Any]:
        """Run a micro-batch of a step; return what to go back from, and what the loss was made of."""

    def optimizing(self, model: Any, objective: Objective | None) -> AbstractContextManager[None]:
        """Return what an optimizer is created in."""
        return nullcontext()

    def decayed(self, model: nn.Module, names: list[str]) -> list[str]:
        """Return the names of the parameters that weight decay applies to; those given are transformers' own choice."""
        return names

    def learning(self, model: nn.Module, optimizer: Any) -> Sequence[nn.Parameter]:
        """Return the parameters of which one at least must have a gradient after the first step."""
        return list(model.parameters())

    def dual_before_batch(self, run: SteppedTrainer, objective: PDU, batch: Any) -> float | None:
        """Before a micro-batch."""
        return None

    def dual_after_batch(self, run: SteppedTrainer, objective: PDU, batch: Any, step: Any, output: Any) -> float | None:
        """After a micro-batch, whose ``loss`` has returned ``output``."""
        return None

    def dual_after_step(self, run: SteppedTrainer, objective: PDU) -> float | None:
        """After an optimizer step; the trainer's count of them includes it."""
        return None

    def dual_after_epoch(self, run: SteppedTrainer, objective: PDU, epochs: float) -> float | None:
        """After so many epochs."""
        return None


class PackedStepping(Stepping):
    """Micro-batches of packed sequences, up to a token budget; means run over the whole step, on all ranks."""

    def __init__(
        self,
        args: UnlearnArguments,
        stores: Stores,
        objective: Objective | None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """See ``Stepping``; the plan depends on neither the objective nor the tokenizer."""
        self.steps = planned_steps(
            args, stores, pairs_per_step=self.planned_pairs(args), token_budget=args.token_budget
        )
        self.epoch_pairs = self.steps.pairs
        self._chunk_rows, self._backend = args.chunk_rows, args.loss_backend
        self._nll: Tensor | None = None  # this rank's share of the step's, where a dual variable reads it

    @classmethod
    def planned_pairs(cls, args: UnlearnArguments) -> int:
        """Return those of a step: the token budget makes its micro-batches."""
        return pairs_per_step(args)

    @classmethod
    def choose_weights(cls, model: PreTrainedModel, objective: RMU) -> None:
        """Freeze the others."""
        train_only(model, objective.trainable_params_regex)

    def loss(self, run: SteppedTrainer, model: nn.Module, batch: PackedBatch, step: Step) -> tuple[Tensor, StepOutput]:
        """Forget and retain in one forward pass, the micro-batch's share of the step's loss out."""
        loss = step_loss(
            run.objective,
            run.reference,
            batch,
            step.totals,
            autocast=run.accelerator.autocast,
            chunk_rows=self._chunk_rows,
            backend=self._backend,
        )
        output: StepOutput = model(batch=batch, loss=loss)
        run.meter.add(batch, output, run.objective)
        # The step's loss is the sum of the ranks' shares, and what exchanges gradients takes their mean.
        return output.loss * run.args.world_size, output

    def dual_after_batch(
        self, run: SteppedTrainer, objective: PDU, batch: PackedBatch, step: Step, output: StepOutput
    ) -> float | None:
        """Add the micro-batch's share of the step's retain NLL."""
        retain = torch.where(batch.roles == Role.RETAIN, output.sequence_logprobs, 0.0)
        nll = -retain.sum() / max(step.totals.retain_tokens, 1)
        self._nll = nll if self._nll is None else self._nll + nll
        return None

    def dual_after_step(self, run: SteppedTrainer, objective: PDU) -> float | None:
        """The step's retain NLL, once the warm-up is over."""
        nll, self._nll = self._nll, None
        # Where this step began: the first one after the warm-up's epochs is the first that updates.
        began = (run.state.global_step - 1) / len(self.steps)
        if nll is None or objective.dual_update_upon != "step" or not _warm(objective, began):
            return None
        return float(run.accelerator.reduce(nll))

    def dual_after_epoch(self, run: SteppedTrainer, objective: PDU, epochs: float) -> float | None:
        """The retain NLL of the whole set, once the warm-up is over."""
        if objective.dual_update_upon != "epoch" or not _warm(objective, epochs):
            return None
        retain = self.steps.stores[1]
        with run.accelerator.autocast():
            sums = store_logprobs(run.accelerator.unwrap_model(run.model), retain, name="retain")
        return -float(sums.sum()) / int(retain.label_counts.sum())


def _warm(objective: PDU, epochs: float) -> bool:
    return epochs >= objective.dual_warmup_epochs - 1e-9


def planned_steps(args: UnlearnArguments, stores: Stores, *, pairs_per_step: int, token_budget: int) -> PackedSteps:
    """Return the steps of so many pairs that the arguments ask for."""
    return PackedSteps(
        *stores,
        pairs_per_step=pairs_per_step,
        token_budget=token_budget,
        seed=args.seed if args.data_seed is None else args.data_seed,
        rank=args.process_index,
        world_size=args.world_size,
        retain_sampling=args.retain_sampling,  # type: ignore[arg-type]
        drop_last=args.dataloader_drop_last,
        workers=max(1, args.dataloader_num_workers),
        pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
    )


def pairs_per_step(args: UnlearnArguments) -> int:
    """Return the pairs of an optimizer step, on all processes together.

    Raises:
        ValueError: more than an int64 counts.
    """
    if args.pairs_per_step is not None:
        return args.pairs_per_step
    pairs = int(args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size)
    if pairs >= 2**63:
        raise ValueError(
            f"`gradient_accumulation_steps`: expected fewer than 2**63 pairs in an optimizer step, got "
            f"per_device_train_batch_size {args.per_device_train_batch_size} x gradient_accumulation_steps "
            f"{args.gradient_accumulation_steps} x {args.world_size} processes; lower them"
        )
    return pairs


def step_loss(
    objective: Objective | None,
    reference: CachedReference | ModelReference | None,
    batch: PackedBatch,
    totals: StepTotals,
    *,
    autocast: Callable[[], AbstractContextManager[object]],
    chunk_rows: int | None = None,
    backend: str = "auto",
) -> HeadLoss | ActivationLoss:
    """Run the reference where the objective reads it, and return what the model's forward call then computes.

    Args:
        objective: None for plain NLL.
        reference: None where the objective reads none.
        batch: the micro-batch.
        totals: of the optimizer step.
        autocast: the precision in which the policy runs, and so the reference.
        chunk_rows: rows of logits alive at a time; None chooses.
        backend: "auto", "native", "triton" or "torch".
    """
    forget_rows = retain_rows = sums = None
    if objective is not None and isinstance(reference, ModelReference):
        with autocast():
            if objective.reads_forget_reference() and batch.forget_sequences:
                forget_rows = reference.rows(batch.forget_part())
            if objective.retain_loss() is not None and (retain := batch.retain_part()).lengths:
                retain_rows = reference.rows(retain)
    elif isinstance(reference, CachedReference):
        sums = reference.sums(batch)
    if objective is not None and objective.needs_reference and forget_rows is None and sums is None:
        # Nothing in this micro-batch to compare.
        sums = torch.zeros(len(batch.lengths), device=batch.storage.device)
    head = HeadLoss(objective, totals, forget_rows, retain_rows, sums, chunk_rows, backend)
    if not isinstance(objective, RMU):
        return head
    return ActivationLoss(
        objective,
        totals,
        _frozen_activations(objective, reference, batch, autocast),
        None if objective.compares_activations or not objective.alpha else head,
    )


def _frozen_activations(
    objective: RMU,
    reference: CachedReference | ModelReference | None,
    batch: PackedBatch,
    autocast: Callable[[], AbstractContextManager[object]],
) -> Tensor | None:
    if not objective.compares_activations or not isinstance(reference, ModelReference):
        return None
    retain = batch.retain_part()
    if not retain.lengths:
        return None
    with autocast():
        return reference.activations(retain, objective.module_regex)


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
