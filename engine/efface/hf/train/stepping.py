"""``Stepping``: the composition of an optimizer step, the loss of its micro-batches, and related training details.

``PackedStepping`` is efface's own; ``efface.hf.train.open_unlearning.PaddedStepping`` reproduces open-unlearning.
``DualVariable`` updates PDU's weight of the retain term at the times that a ``Stepping`` defines.
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
from efface_kernels import ReferenceRows


class Stores(NamedTuple):
    """The sequences of a run; an unused store is empty, or None for ``alternate``."""

    forget: TokenStore
    retain: TokenStore
    alternate: TokenStore | None = None


class SteppedTrainer(Protocol):
    """The attributes of a trainer that a ``Stepping`` reads."""

    objective: Objective | None
    accelerator: Any
    args: Any
    meter: StepMeter
    model: Any
    state: Any

    @property
    def reference(self) -> CachedReference | ModelReference | None:
        """The reference model, or its cached log-probabilities; None without a reference."""


class Stepping(ABC):
    """Base class of the two kinds of optimizer steps.

    The four ``dual_`` methods are called before and after a micro-batch, after a step and after an epoch. Each returns
    the retain loss that updates PDU's dual variable at that time, or None for no update.

    Attributes:
        runs_reference: whether the reference model must run even if its log-probabilities would suffice.
        draws_refusals: whether a refusal is drawn each time a row is read, instead of once.
        steps: data set whose item k is this rank's part of optimizer step k.
        epoch_pairs: number of pairs that ``warmup_epochs`` counts as an epoch.
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
        """Return the number of pairs in one unit of the epoch's plan, which is a step or a micro-batch."""

    @classmethod  # noqa: B027 - all objectives are supported unless a subclass overrides this
    def check_objective(cls, objective: Objective) -> None:
        """Raise ValueError if the objective is not supported."""

    @classmethod
    @abstractmethod
    def choose_weights(cls, model: PreTrainedModel, objective: RMU) -> None:
        """Restrict training to the parameters that match ``objective.trainable_params_regex``.

        Raises:
            ValueError: no parameter matches.
        """

    @abstractmethod
    def loss(self, run: SteppedTrainer, model: nn.Module, batch: Any, step: Any) -> tuple[Tensor, Any]:
        """Run a micro-batch of a step; return the loss for the backward pass, and the outputs it was computed from."""

    def optimizing(self, model: Any, objective: Objective | None) -> AbstractContextManager[None]:
        """Return the context manager in which the optimizer is created."""
        return nullcontext()

    def decayed(self, model: nn.Module, names: list[str]) -> list[str]:
        """Return the names of the parameters with weight decay; ``names`` are those that transformers selects."""
        return names

    def learning(self, model: nn.Module, optimizer: Any) -> Sequence[nn.Parameter]:
        """Return the parameters of which at least one must have a nonzero gradient after the first step."""
        return list(model.parameters())

    def dual_before_batch(self, run: SteppedTrainer, objective: PDU, batch: Any) -> float | None:
        """Return the retain loss that updates the dual variable before a micro-batch, or None for no update."""
        return None

    def dual_after_batch(self, run: SteppedTrainer, objective: PDU, batch: Any, step: Any, output: Any) -> float | None:
        """Return the retain loss that updates the dual variable after a micro-batch, or None.

        ``loss`` has returned ``output``.
        """
        return None

    def dual_after_step(self, run: SteppedTrainer, objective: PDU) -> float | None:
        """Return the retain loss that updates the dual variable after an optimizer step, or None.

        ``global_step`` includes the step.
        """
        return None

    def dual_after_epoch(self, run: SteppedTrainer, objective: PDU, epochs: float) -> float | None:
        """Return the retain loss that updates the dual variable after ``epochs`` epochs, or None."""
        return None


class PackedStepping(Stepping):
    """Steps of packed micro-batches of up to ``token_budget`` tokens; means are over the whole step, on all ranks."""

    def __init__(
        self,
        args: UnlearnArguments,
        stores: Stores,
        objective: Objective | None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """Plan the steps of a run; of the objective, the plan only depends on whether it reads last tokens."""
        self.steps = planned_steps(
            args,
            stores,
            pairs_per_step=self.planned_pairs(args),
            token_budget=args.token_budget,
            share=args.share_prefixes,
            last_tokens=reads_last_tokens(objective),
        )
        self.epoch_pairs = self.steps.pairs
        self._chunk_rows, self._backend = args.chunk_rows, args.loss_backend
        self._nll: Tensor | None = None  # this rank's share of the step's retain NLL, for PDU's dual variable

    @classmethod
    def planned_pairs(cls, args: UnlearnArguments) -> int:
        """Return the pairs per step; the token budget splits a step into micro-batches."""
        return pairs_per_step(args)

    @classmethod
    def choose_weights(cls, model: PreTrainedModel, objective: RMU) -> None:
        """Freeze the parameters that do not match ``objective.trainable_params_regex``."""
        train_only(model, objective.trainable_params_regex)

    def loss(self, run: SteppedTrainer, model: nn.Module, batch: PackedBatch, step: Step) -> tuple[Tensor, StepOutput]:
        """Run forget and retain sequences in one forward pass; return the micro-batch's share of the step's loss."""
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
        # The step's loss is the sum of the ranks' shares, but DDP and FSDP average gradients over ranks.
        return output.loss * run.args.world_size, output

    def dual_after_batch(
        self, run: SteppedTrainer, objective: PDU, batch: PackedBatch, step: Step, output: StepOutput
    ) -> float | None:
        """Add the micro-batch's share to the step's retain NLL."""
        retain = torch.where(batch.roles == Role.RETAIN, output.sequence_logprobs, 0.0)
        nll = -retain.sum() / max(step.totals.retain_tokens, 1)
        self._nll = nll if self._nll is None else self._nll + nll
        return None

    def dual_after_step(self, run: SteppedTrainer, objective: PDU) -> float | None:
        """Return the step's retain NLL, or None during the warm-up."""
        nll, self._nll = self._nll, None
        # The epoch at the start of this step: the first step that starts after the warm-up is the first to update.
        began = (run.state.global_step - 1) / len(self.steps)
        if nll is None or objective.dual_update_upon != "step" or not _warm(objective, began):
            return None
        return float(run.accelerator.reduce(nll))

    def dual_after_epoch(self, run: SteppedTrainer, objective: PDU, epochs: float) -> float | None:
        """Return the retain NLL of the whole retain set, or None during the warm-up."""
        if objective.dual_update_upon != "epoch" or not _warm(objective, epochs):
            return None
        retain = self.steps.stores[1]
        with run.accelerator.autocast():
            model = run.accelerator.unwrap_model(run.model)
            sums = store_logprobs(model, retain, share=run.args.share_prefixes, name="retain")
        return -float(sums.sum()) / int(retain.label_counts.sum())


def _warm(objective: PDU, epochs: float) -> bool:
    return epochs >= objective.dual_warmup_epochs - 1e-9


def planned_steps(
    args: UnlearnArguments,
    stores: Stores,
    *,
    pairs_per_step: int,
    token_budget: int,
    share: bool = False,
    last_tokens: bool = True,
) -> PackedSteps:
    """Return the steps of a run with the given settings; other settings come from ``args``."""
    return PackedSteps(
        *stores,
        pairs_per_step=pairs_per_step,
        token_budget=token_budget,
        share=share,
        last_tokens=last_tokens,
        seed=args.seed if args.data_seed is None else args.data_seed,
        rank=args.process_index,
        world_size=args.world_size,
        retain_sampling=args.retain_sampling,  # type: ignore[arg-type]
        drop_last=args.dataloader_drop_last,
        workers=max(1, args.dataloader_num_workers),
        pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
    )


def reads_last_tokens(objective: Objective | None) -> bool:
    """Return whether the loss reads hidden states of the last tokens of sequences, which predict no label."""
    return objective is not None and objective.reads == "activations"


def pairs_per_step(args: UnlearnArguments) -> int:
    """Return the number of pairs per optimizer step, in total over all processes.

    Raises:
        ValueError: the number exceeds the range of int64.
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
    """Run the reference model if the objective needs it; return the loss for the model's forward call to compute.

    Args:
        objective: the objective; None for plain NLL.
        reference: the reference; None for an objective without one.
        batch: the micro-batch.
        totals: totals of the optimizer step, the denominators of its means.
        autocast: returns the autocast context of the policy, which is used for the reference too.
        chunk_rows: rows of logits in memory at a time; None chooses.
        backend: "auto", "native", "triton" or "torch".
    """
    forget_rows = retain_rows = sums = None
    if objective is not None and isinstance(reference, ModelReference):
        with autocast():
            forget_rows, retain_rows = _reference_rows(objective, reference, batch)
    elif isinstance(reference, CachedReference):
        sums = reference.sums(batch)
    if objective is not None and objective.needs_reference and forget_rows is None and sums is None:
        # The micro-batch has no sequence that is compared with the reference.
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


def _reference_rows(
    objective: Objective, reference: ModelReference, batch: PackedBatch
) -> tuple[ReferenceRows | None, ReferenceRows | None]:
    """Return the frozen model's rows for the forget and the retain sequences, or None where no loss reads them."""
    forget = objective.reads_forget_reference() and batch.forget_sequences > 0
    retain = objective.retain_loss() is not None and batch.forget_sequences < len(batch.lengths)
    if forget and retain:  # in one pass, because they can share tokens
        rows = reference.rows(batch)
        hidden = rows.hidden.split([batch.forget_rows, rows.hidden.shape[0] - batch.forget_rows])
        return replace(rows, hidden=hidden[0]), replace(rows, hidden=hidden[1])
    return (
        reference.rows(batch.forget_part()) if forget else None,
        reference.rows(batch.retain_part()) if retain else None,
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
    """Callback that updates ``alpha`` of the trainer's objective, a PDU; checkpoints contain its value.

    Args:
        stepping: determines when ``alpha`` is updated, and by which retain loss.
    """

    def __init__(self, stepping: Stepping) -> None:
        self._stepping = stepping
        self._epochs = 0.0  # epochs passed when an epoch last ended

    @property
    def _objective(self) -> PDU:
        objective = self._trainer().objective
        if not isinstance(objective, PDU):
            raise TypeError(f"`objective`: expected PDU, got {type(objective).__name__}; use PDU")
        return objective

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore ``alpha`` from a checkpoint, and run the end of an epoch that the checkpoint was saved before."""
        kept: Any = state.stateful_callbacks
        if isinstance(kept, dict) and type(self).__name__ in kept:
            attributes = kept[type(self).__name__]["attributes"]
            self._trainer().objective = replace(self._objective, alpha=attributes["alpha"])
            self._epochs = attributes.get("epochs", 0.0)
            # The checkpoint was saved after the last step of an epoch. transformers resumes with the next epoch and
            # does not call on_epoch_end for the previous one.
            if state.epoch and state.epoch == round(state.epoch) and self._epochs < state.epoch:
                self.on_epoch_end(args, state, control)

    def before_batch(self, batch: Any) -> None:
        """Update ``alpha`` before a micro-batch, if due."""
        self._ascend(self._stepping.dual_before_batch(self._trainer(), self._objective, batch))

    def after_batch(self, batch: Any, step: Any, output: Any) -> None:
        """Update ``alpha`` after a micro-batch, if due; ``output`` is the second value of ``Stepping.loss``."""
        self._ascend(self._stepping.dual_after_batch(self._trainer(), self._objective, batch, step, output))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Update ``alpha`` after an optimizer step, if due."""
        self._ascend(self._stepping.dual_after_step(self._trainer(), self._objective))

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Update ``alpha`` after an epoch, if due."""
        self._epochs = state.epoch or 0.0
        self._ascend(self._stepping.dual_after_epoch(self._trainer(), self._objective, state.epoch or 0.0))

    def _ascend(self, retain_loss: float | None) -> None:
        if retain_loss is not None:
            self._trainer().objective = self._objective.ascend(retain_loss)

    def read(self) -> dict[str, float]:
        """Return ``alpha`` for the log, under the name that open-unlearning uses."""
        return {"retain_preference": self._objective.alpha}

    def state(self) -> dict[str, Any]:
        """Return ``alpha`` and the epochs passed, for a checkpoint."""
        return {"args": {}, "attributes": {"alpha": self._objective.alpha, "epochs": self._epochs}}
