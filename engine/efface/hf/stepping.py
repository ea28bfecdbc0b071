"""The ways of stepping: what an optimizer step holds, the loss of its micro-batches, and all else that goes with it.

``PackedStepping`` is ours; ``efface.hf.open_unlearning.PaddedStepping`` is open-unlearning's.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from efface.batching import PackedBatch, Role, Step, TokenStore
from efface.hf.activations import train_only
from efface.hf.arguments import UnlearnArguments
from efface.hf.cached_reference import CachedReference
from efface.hf.dataset import PackedSteps, Steps
from efface.hf.head_loss import StepOutput
from efface.hf.live_reference import ModelReference
from efface.hf.meter import StepMeter
from efface.hf.score import store_logprobs
from efface.hf.step_loss import step_loss
from efface.objectives import PDU, RMU, Objective


class Stores(NamedTuple):
    """The sequences of a run; those that it does not read are empty, or None."""

    forget: TokenStore
    retain: TokenStore
    alternate: TokenStore | None = None


class Run(Protocol):
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
    def loss(self, run: Run, model: nn.Module, batch: Any, step: Any) -> tuple[Tensor, Any]:
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

    def dual_before_batch(self, run: Run, objective: PDU, batch: Any) -> float | None:
        """Before a micro-batch."""
        return None

    def dual_after_batch(self, run: Run, objective: PDU, batch: Any, step: Any, output: Any) -> float | None:
        """After a micro-batch, whose ``loss`` has returned ``output``."""
        return None

    def dual_after_step(self, run: Run, objective: PDU) -> float | None:
        """After an optimizer step; the trainer's count of them includes it."""
        return None

    def dual_after_epoch(self, run: Run, objective: PDU, epochs: float) -> float | None:
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

    def loss(self, run: Run, model: nn.Module, batch: PackedBatch, step: Step) -> tuple[Tensor, StepOutput]:
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
        self, run: Run, objective: PDU, batch: PackedBatch, step: Step, output: StepOutput
    ) -> float | None:
        """Add the micro-batch's share of the step's retain NLL."""
        retain = torch.where(batch.roles == Role.RETAIN, output.sequence_logprobs, 0.0)
        nll = -retain.sum() / max(step.totals.retain_tokens, 1)
        self._nll = nll if self._nll is None else self._nll + nll
        return None

    def dual_after_step(self, run: Run, objective: PDU) -> float | None:
        """The step's retain NLL, once the warm-up is over."""
        nll, self._nll = self._nll, None
        # Where this step began: the first one after the warm-up's epochs is the first that updates.
        began = (run.state.global_step - 1) / len(self.steps)
        if nll is None or objective.dual_update_upon != "step" or not _warm(objective, began):
            return None
        return float(run.accelerator.reduce(nll))

    def dual_after_epoch(self, run: Run, objective: PDU, epochs: float) -> float | None:
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
    """Return the pairs of an optimizer step, on all processes together."""
    if args.pairs_per_step is not None:
        return args.pairs_per_step
    return int(args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size)
