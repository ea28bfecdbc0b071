"""``UnlearnTrainer`` and ``FinetuneTrainer``: ``transformers.Trainer`` on packed batches, with the loss in the head."""

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import DataLoaderShard
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from efface.batching import Role, TokenStore
from efface.errors import reading
from efface.hf.model.activations import find_module
from efface.hf.model.adapted_head import base_of
from efface.hf.model.forwards import release
from efface.hf.model.head import fuse
from efface.hf.model.loading import load_model, load_tokenizer
from efface.hf.model.packing import agree, reading_of, why_unshared
from efface.hf.model.supported import check_model
from efface.hf.reference.cached import CachedReference, ReferenceCallback
from efface.hf.reference.live import AdapterReference, ModelReference
from efface.hf.reference.make import make_reference, reference_kind
from efface.hf.reference.score import check_store
from efface.hf.text.data import DataFacts, QuestionAnswers
from efface.hf.text.rows import Conditions
from efface.hf.train.arguments import unlearn_arguments
from efface.hf.train.callbacks import TrainerBound
from efface.hf.train.checkpoints import ResumableTrainer
from efface.hf.train.meter import LossWatch, StepMeter
from efface.hf.train.options import check_fields, checked_trainer_options
from efface.hf.train.preflight import (
    check_gradients,
    check_loss,
    check_schedule,
    check_trainable,
    check_weights,
    prepare_checkpointing,
)
from efface.hf.train.publish import HubClient, Publisher
from efface.hf.train.record import RunRecord
from efface.hf.train.stepping import DualVariable, Stores, pairs_per_step
from efface.hf.train.stores import check_retain, stepping_of, tokenised, unlearning_stores
from efface.objectives import PDU, RMU, Objective, as_objective, check_term
from efface_kernels import Sequences, to_device

logger: Any = logging.get_logger(__name__)  # Any: transformers adds warning_once


class PackedTrainer(ResumableTrainer):
    """Base class of ``UnlearnTrainer`` and ``FinetuneTrainer``.

    Attributes:
        objective: the training objective; None is plain NLL over the retain store.
        data: description of each data set, by role.
        pairs_per_step: pairs per optimizer step, in total over all processes.
        base_model: name of the model before training.
        revision: revision of the base model.
        adapter: text that describes the trained adapter, its base and what is saved; None without an adapter.
        command: command line that started the run; None if it was not started from the command line.
        reference_kind: "cached", "live" or "adapter"; None if the objective has no reference.
        publisher: writes model cards and pushes checkpoints.
    """

    revision = "main"
    adapter: str | None = None
    command: str | None = None
    reference_kind: str | None = None
    _saved = False  # True while a model that is already in the output folder is pushed: do not save it again

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        forget: TokenStore,
        retain: TokenStore,
        objective: Objective | None,
        alternate: TokenStore | None = None,
        hub_client: HubClient | None = None,
        **trainer_options: Any,
    ) -> None:
        trainer_options = checked_trainer_options(trainer_options)
        args = copy.copy(unlearn_arguments(args))  # do not change the caller's arguments
        check_fields(args)  # again: fields can have been changed since __post_init__
        if args.n_gpu > 1:
            # transformers would wrap the model in DataParallel, which splits along a batch axis; packs have none
            args._n_gpu = 1  # noqa: SLF001
        check_model(model)
        for module in {id(one): one for one in (model, base_of(model))}.values():
            release(module)  # undo wrappers of an earlier trainer in this process, such as its autocast precision
        check_trainable(model)
        for name, store in (("forget", forget), ("retain", retain), ("alternate", alternate)):
            if store is not None:
                check_store(model, store, name)
        self.objective: Objective | None = objective
        self._reference: CachedReference | ModelReference | None = None
        self.pairs_per_step = pairs_per_step(args)
        self._stepping = stepping_of(args)(
            args, Stores(forget, retain, alternate), objective, trainer_options.get("processing_class")
        )
        self._steps = self._stepping.steps
        args.epoch_pairs = (self._stepping.epoch_pairs, self.pairs_per_step)
        # An item of the data set is a whole optimizer step, so the loop of transformers must not accumulate.
        args.gradient_accumulation_steps = 1
        # transformers would count tokens in columns of the batch; training_step counts them from the step.
        self._counts_tokens = args.include_num_input_tokens_seen not in ("no", False)
        args.include_num_input_tokens_seen = type(args).include_num_input_tokens_seen  # "no"; False in transformers 4
        self.meter = StepMeter()
        self._watch = LossWatch()
        self._dual: DualVariable | None = None
        self._gradients_seen = False
        self.publisher = Publisher(args, hub_client)
        if self.publisher.revisions:
            args.push_to_hub = False  # otherwise transformers would also push checkpoints, to main
        # The meter comes first, so that the time of later callbacks between two steps is not counted as step time.
        trainer_options["callbacks"] = [self.meter, *(trainer_options.get("callbacks") or ()), self.publisher]
        super().__init__(model=fuse(model), args=args, train_dataset=self._steps, **trainer_options)
        self.data: dict[str, DataFacts] = {}
        self.base_model: str = getattr(model.config, "_name_or_path", "") or type(model).__name__
        prepare_checkpointing(model, base_of(model), args)
        stores = [store for store in (forget, retain, alternate) if store is not None]
        longest = max(int(store.lengths.max(initial=0)) for store in stores)
        self._unify_reading(base_of(model), longest)
        if self._steps.prefixes_saved and (reason := why_unshared(base_of(model), longest)) is not None:
            if self.is_world_process_zero():
                logger.warning_once(
                    f"{type(base_of(model)).__name__}: runs shared prefixes again for each sequence: {reason}"
                )
            self._steps.stop_sharing()
        self._bind(*self.callback_handler.callbacks)
        # The loss is already the mean over the whole step; transformers must not divide it by the micro-batches.
        self.model_accepts_loss_kwargs = True

    def _unify_reading(self, base: PreTrainedModel, longest: int) -> None:
        """Make all processes use the same way of running packed batches.

        Raises:
            ValueError: under FSDP or ZeRO-3, processes could run different numbers of forward passes.
        """
        if self.args.world_size == 1:
            return
        agree(base)
        reading = reading_of(base)
        sharded = self.is_fsdp_enabled or (self.is_deepspeed_enabled and is_deepspeed_zero3_enabled())
        if sharded and reading is not None and reading.splits(longest):
            reason = reading.alone or f"sequences of {reading.limit} tokens and more change its position encoding"
            raise ValueError(
                f"{type(base).__name__}: expected a model that runs a packed batch in one pass, got one that runs one "
                f"sequence per pass ({reason}); use DDP or ZeRO-2, FSDP and ZeRO-3 need the same number of passes on "
                "every process"
            )

    def add_callback(self, callback: Any) -> None:
        """Add a callback; a ``TrainerBound`` callback gets this trainer as its ``trainer`` attribute."""
        super().add_callback(callback)
        self._bind(*self.callback_handler.callbacks)

    def _bind(self, *callbacks: Any) -> None:
        for callback in callbacks:
            if isinstance(callback, TrainerBound):
                callback.trainer = self

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return a loader whose items are this rank's optimizer steps; the plan already divided them among ranks."""
        loader: DataLoader[Any] = DataLoaderShard(
            self._steps, batch_size=1, sampler=SequentialSampler(self._steps), collate_fn=_only_item
        )
        return loader

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], None]:
        """Return the next step, without a token count: a step carries its own denominators for the means."""
        self._steps.begin_epoch(self.state.global_step // len(self._steps))
        self.meter.clock.begin(device)
        steps = list(itertools.islice(epoch_iterator, num_batches))
        self.meter.clock.end("data")
        return steps, None

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Return the learning-rate schedule.

        Raises:
            ValueError: the learning rate is 0 at every step, or ``lr_scheduler_kwargs`` do not fit the schedule.
        """
        args: Any = self.args
        expected = f"the settings of {args.lr_scheduler_type.value}"
        with reading(f"`lr_scheduler_kwargs` {args.lr_scheduler_kwargs}", expected, "correct it"):
            scheduler = super().create_scheduler(num_training_steps, optimizer)
        check_schedule(scheduler, num_training_steps)
        return scheduler

    def _notify_data(self) -> None:
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ReferenceCallback):
                callback.on_data(self.data)
                callback.on_sharing(self._steps.prefixes_saved)

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        """Return the number of pairs in an epoch."""
        return self._steps.pairs

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Run forward and backward passes of all micro-batches of a step; return this rank's share of the loss."""
        step = inputs.to(self.args.device, non_blocking=True)
        if self.is_deepspeed_enabled and len(step.batches) > 1:
            raise ValueError(
                f"`token_budget`: expected steps of one micro-batch, because DeepSpeed takes an optimizer step after "
                f"every backward pass, got one of {len(step.batches)}; raise it, or use DDP or FSDP"
            )
        if self._counts_tokens:
            tokens = to_device(torch.tensor(int(step.tokens)), self.args.device)
            self.state.num_input_tokens_seen += int(self.accelerator.reduce(tokens))
        losses = []
        for i, batch in enumerate(step.batches):
            # Gradients are reduced across processes once per step, in the backward pass of the last micro-batch.
            waiting = i + 1 < len(step.batches)
            with self.accelerator.no_sync(model) if waiting else contextlib.nullcontext():
                losses.append(super().training_step(model, {"batch": batch, "step": step}))
                self.meter.clock.end("backward")
        total = torch.stack(losses).sum()
        self._watch.see(total, self.state.global_step + 1)
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled  # no rank has all gradients
        if not self._gradients_seen and not sharded:
            weights = self._stepping.learning(model, self.optimizer)
            check_gradients([weight for weight in weights if weight.requires_grad])
            self._gradients_seen = True
        return total

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Run one micro-batch forward; return the loss, and with ``return_outputs`` the outputs too."""
        if "batch" not in inputs:  # a batch of ``eval_dataset``, which transformers collates
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        batch, step = inputs["batch"], inputs["step"]
        if self._dual is not None:
            self._dual.before_batch(batch)
        share, output = self._stepping.loss(self, model, batch, step)
        check_loss(share)
        if self._dual is not None:
            self._dual.after_batch(batch, step, output)
        self.meter.clock.end("forward")
        return (share, output) if return_outputs else share

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create the optimizer over the parameters that the stepping leaves to it."""
        with self._stepping.optimizing(self.model, self.objective):
            return super().create_optimizer(*args, **kwargs)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the names of the parameters that weight decay applies to."""
        return self._stepping.decayed(model, super().get_decay_parameter_names(model))

    @property
    def reference(self) -> CachedReference | ModelReference | None:
        """The reference model, or its cached log-probabilities; None if the objective has no reference."""
        return self._reference

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the trainer's own figures together with those of the meter."""
        self._watch.check()
        self._bind(*self.callback_handler.callbacks)  # a resumed run can have recreated callbacks
        if "loss" in logs:
            dual = {} if self._dual is None else self._dual.read()
            logs = {**logs, **self.meter.read(lambda figures: self.accelerator.gather(figures[None])), **dual}
            if self._counts_tokens:
                logs["num_input_tokens_seen"] = self.state.num_input_tokens_seen
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, **options: Any) -> TrainOutput:  # type: ignore[override]
        """Train as ``ResumableTrainer.train`` does.

        Before the method returns, every checkpoint is on the Hub or listed in ``not_pushed``, if they are pushed.

        Raises:
            FloatingPointError: a loss is not finite, or the weights at a checkpoint or at the end are not.
        """
        output = super().train(resume_from_checkpoint, **options)
        self._check_finite()
        return output

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._check_finite()
        super()._save_checkpoint(*args, **kwargs)

    def _check_finite(self) -> None:
        """Raise FloatingPointError if a loss or the weights are not finite.

        The weights are checked too, because the loss shows a bad update only in the next step.
        """
        self._watch.check()
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):  # no process has all weights
            check_weights(self.model, self.state.global_step)  # type: ignore[arg-type]

    def checkpoints_in_use(self) -> AbstractSet[Path]:
        """Return the checkpoints that are not pushed yet."""
        return self.publisher.in_use()

    @property
    def not_pushed(self) -> dict[int, str]:
        """After ``train()``, the error messages of checkpoints that could not be pushed, by step."""
        return self.publisher.not_pushed

    def recipe(self) -> RunRecord:
        """Return the record of this run: base model, data, objective, arguments and versions."""
        return RunRecord.of(self)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, its tokenizer, and a model card (README.md)."""
        if self._saved and output_dir is None:
            return
        super().save_model(output_dir, _internal_call=True)
        if self.args.should_save:
            self.publisher.write_card(Path(output_dir or str(self.args.output_dir)))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write efface's model card instead of that of transformers."""
        if self.is_world_process_zero():
            self.publisher.write_card(Path(str(self.args.output_dir)))

    def push_to_hub(self, *args: Any, saved: bool = False, **kwargs: Any) -> Any:
        """Push the model; with ``revision_per_checkpoint``, to the main branch of the checkpoints' repository.

        With ``saved=True`` the model is already in the output folder and is not written again, so a process killed
        during the upload leaves it intact.
        """
        self._saved = saved
        try:
            if not self.publisher.revisions:
                return super().push_to_hub(*args, **kwargs)
            self.save_model(_internal_call=True)
            self.publisher.push_final(Path(str(self.args.output_dir)))
            return None
        finally:
            self._saved = False

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 6 · parameters · tokens, the usual estimate for a training step; embeddings are not counted."""
        model: Any = self.model
        return 6 * int(model.num_parameters(exclude_embeddings=True)) * int(inputs.tokens)


class UnlearnTrainer(PackedTrainer):
    """Trainer that unlearns a forget set while keeping the behaviour on a retain set.

    Every batch packs forget and retain sequences into one forward pass without padding. The head computes the loss
    without keeping the logits. Schedules, optimizers, callbacks and checkpoints are those of ``transformers.Trainer``.

    Args:
        model: an ``AutoModelForCausalLM`` or a ``peft.PeftModel`` around one, which is changed in place; or a folder or
            Hub name to load it from, together with its tokenizer if ``processing_class`` is None.
        args: ``UnlearnArguments``; or ``transformers.TrainingArguments``, whose default values efface replaces with
            its own.
        forget: the data to forget: rows with a question and an answer column, a file, a Hub name, or a ``TokenStore``.
        retain: the data to keep, in the same form; can be None if the objective's ``alpha`` is 0.
        forget_filter: conditions on the rows of ``forget``, such as ``"topic_id=3,7"`` or ``"language!=EN"``, or a
            mapping of columns to values. A row must meet all of them.
        retain_filter: conditions on the rows of ``retain``, in the same form.
        objective: an objective such as ``NPO(beta=0.1)``; a class or a name, for its default parameters; or a function
            that maps ``efface_kernels.Sequences`` to their forget terms (see ``efface.FunctionObjective``).
        alternate: one alternate answer per forget question, for objectives that train them. The default takes them from
            ``args.refusal_file`` or ``args.alternate_column``.
        reference: how the frozen reference model runs. "cached" computes its log-probabilities once, before training,
            and keeps them in a file (``args.reference_cache``). "live" keeps a second model. "adapter" uses the base
            model of a ``peft.PeftModel``. "auto" chooses "cached" if the objective reads only log-probabilities, else
            "adapter" or "live". Ignored by objectives without a reference.
        reference_model: the reference model or its name; None is ``model`` in its current state.
        reference_device: the device of a live reference; None is the device of the trained model.
        processing_class: the tokenizer; required for text.
        **trainer_options: callbacks, optimizers and other parameters of ``transformers.Trainer``.

    Raises:
        FileNotFoundError: a data file or a model does not exist.
        TypeError: an argument is of a wrong type, or a parameter of ``transformers.Trainer`` would have no effect.
        ValueError: the forget set is empty, a column is missing, a row has no label, a token is outside the vocabulary,
            a row is in both sets without ``args.allow_overlap``, or the objective cannot use the reference.
        FloatingPointError: from ``train()``, a loss or weight is not finite; the message names the step.
    """

    def __init__(
        self,
        model: PreTrainedModel | str | Path,
        args: TrainingArguments,
        *,
        forget: QuestionAnswers,
        retain: QuestionAnswers | None,
        forget_filter: Conditions = None,
        retain_filter: Conditions = None,
        objective: Objective | type[Objective] | str | Callable[[Sequences], Tensor],
        alternate: QuestionAnswers | None = None,
        reference: str = "auto",
        reference_model: PreTrainedModel | str | Path | None = None,
        reference_device: torch.device | str | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **trainer_options: Any,
    ) -> None:
        args = unlearn_arguments(args)
        objective = as_objective(objective)
        model, processing_class = _loaded(model, processing_class)
        frozen = load_model(str(reference_model)) if isinstance(reference_model, (str, Path)) else reference_model
        if frozen is not None:
            check_model(frozen, "reference_model")
        stepping = stepping_of(args)
        stepping.check_objective(objective)
        check_term(objective)
        check_retain(objective, retain, retain_filter)
        kind = reference_kind(reference, objective, model, padded=stepping.runs_reference)
        keep = retain is not None and objective.reads_retain()
        forget_store, retain_store, alternate_store = unlearning_stores(
            objective,
            processing_class,
            args,
            forget=forget,
            retain=retain,
            forget_filter=forget_filter,
            retain_filter=retain_filter,
            alternate=alternate,
        )
        if isinstance(objective, RMU):
            find_module(model, objective.module_regex)
            stepping.choose_weights(model, objective)
            if args.ddp_find_unused_parameters is None:  # layers after the module get no gradient
                args = copy.copy(args)
                args.ddp_find_unused_parameters = True
        super().__init__(
            model,
            args,
            forget=forget_store,
            retain=retain_store,
            alternate=alternate_store,
            objective=objective,
            processing_class=processing_class,
            **trainer_options,
        )
        self.data["forget"] = DataFacts.of(forget, forget_store, forget_filter)
        if keep:
            self.data["retain"] = DataFacts.of(retain, retain_store, retain_filter)
        if alternate_store is not None:
            self.data["alternate"] = DataFacts.of(
                forget if alternate is None else alternate, alternate_store, forget_filter
            )
        self._notify_data()
        self.reference_kind = kind
        self._forget_store = forget_store
        if isinstance(objective, PDU) and objective.primal_dual:
            self._dual = DualVariable(self._stepping)
            self.add_callback(self._dual)
        if kind is not None:
            compared = {Role.FORGET: forget_store}
            if alternate_store is not None:
                compared[Role.ALTERNATE] = alternate_store
            # The reference is the current policy, run in the precision of training, so that L − L_ref starts at 0.
            with self.accelerator.autocast():
                self._reference = make_reference(
                    kind,
                    model,
                    frozen,
                    compared,
                    device=torch.device(reference_device or self.args.device),
                    rank=args.process_index,
                    world_size=args.world_size,
                    cache=args.reference_cache,
                    share=args.share_prefixes,
                    progress=self._notify_reference,
                )

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, **options: Any) -> TrainOutput:  # type: ignore[override]
        """Train as ``PackedTrainer.train`` does; call ``check_start`` first unless the run is resumed."""
        if not resume_from_checkpoint:
            self.check_start()
        return super().train(resume_from_checkpoint, **options)

    def check_start(self) -> None:
        """Raise ValueError if the reference is "adapter" and the model does not start out equal to its base model."""
        if isinstance(self._reference, AdapterReference):
            self._reference.check_start(self._forget_store)

    def _notify_reference(self, computed: int, missing: int, sequences: int) -> None:
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ReferenceCallback):
                callback.on_reference(computed, missing, sequences)


class FinetuneTrainer(PackedTrainer):
    """Trainer that fine-tunes on packed question-answer rows, as for the "full" and "retain" models of a benchmark.

    ``model``, ``args``, ``processing_class`` and the errors are those of ``UnlearnTrainer``.

    Args:
        model: a model, or the folder or Hub name of one.
        args: ``UnlearnArguments`` or ``transformers.TrainingArguments``.
        data: the training data: rows, a file, a Hub name, or a ``TokenStore``.
        data_filter: conditions on the rows, as ``forget_filter`` of ``UnlearnTrainer``.
        processing_class: the tokenizer; required for text.
        trainer_options: other parameters of ``transformers.Trainer``.
    """

    def __init__(
        self,
        model: PreTrainedModel | str | Path,
        args: TrainingArguments,
        *,
        data: QuestionAnswers,
        data_filter: Conditions = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **trainer_options: Any,
    ) -> None:
        args = unlearn_arguments(args)
        model, processing_class = _loaded(model, processing_class)
        if args.compat is not None:
            raise ValueError("`compat`: expected None for fine-tuning, got a value; drop it")
        store = tokenised(data, processing_class, args, "training", data_filter)
        super().__init__(
            model,
            args,
            forget=TokenStore.empty(),
            retain=store,
            objective=None,
            processing_class=processing_class,
            **trainer_options,
        )
        self.data = {"training": DataFacts.of(data, store, data_filter)}
        self._notify_data()


def _loaded(
    model: PreTrainedModel | str | Path, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Return the model and its tokenizer; load the model, and a missing tokenizer, if ``model`` is a name.

    Raises:
        TypeError: ``model`` is neither a model nor a name, or ``tokenizer`` is of a wrong type.
    """
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(
            f"`processing_class`: expected a tokenizer of transformers, got {type(tokenizer).__name__}; load one with "
            "AutoTokenizer.from_pretrained"
        )
    if isinstance(model, (str, Path)):
        name = str(model)
        return load_model(name, trainable=True), load_tokenizer(name) if tokenizer is None else tokenizer
    check_model(model)
    return model, tokenizer


def _only_item(items: list[Any]) -> Any:
    (item,) = items
    return item


__all__ = ["FinetuneTrainer", "PackedTrainer", "UnlearnTrainer"]
