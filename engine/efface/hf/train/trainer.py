"""The trainers: ``transformers.Trainer`` over packed batches, with the loss inside the model's head."""

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

from efface.batching import Role, TokenStore
from efface.errors import reading
from efface.hf.model.activations import find_module
from efface.hf.model.adapted_head import base_of
from efface.hf.model.forwards import release
from efface.hf.model.head import fuse
from efface.hf.model.loading import load_model, load_tokenizer
from efface.hf.model.packing import agree, reading_of
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


class PackedTrainer(ResumableTrainer):
    """What fine-tuning and unlearning share. ``objective`` None is plain NLL over the retain store.

    Attributes:
        objective: what is trained.
        data: of what the sets were made, by role.
        pairs_per_step: pairs of an optimizer step, on all processes together.
        base_model: the name of the model before training.
        revision: of the base model.
        adapter: in words, which adapter is trained on what, and what is saved; None without one.
        command: the command line that started the run, if one did.
        reference_kind: "cached", "live" or "adapter", for objectives with a reference.
        publisher: writes cards, and pushes checkpoints.
    """

    revision = "main"
    adapter: str | None = None
    command: str | None = None
    reference_kind: str | None = None
    _saved = False  # while what is in the output folder is pushed: it need not be written again

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
        args = copy.copy(unlearn_arguments(args))  # the caller's stay as they are
        check_fields(args)  # they may have been changed since they were made
        if args.n_gpu > 1:
            # transformers would wrap the model in DataParallel, which splits tensors along a batch axis we do not have
            args._n_gpu = 1  # noqa: SLF001
        check_model(model)
        for module in {id(one): one for one in (model, base_of(model))}.values():
            release(module)  # from an earlier trainer of this process; the precision is what these arguments say
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
        # A step arrives whole, so to the trainer's loop there is nothing to accumulate.
        args.gradient_accumulation_steps = 1
        # transformers would look for columns to count; a step knows its tokens.
        self._counts_tokens = args.include_num_input_tokens_seen not in ("no", False)
        args.include_num_input_tokens_seen = type(args).include_num_input_tokens_seen  # "no"; False of transformers 4
        self.meter = StepMeter()
        self._watch = LossWatch()
        self._dual: DualVariable | None = None
        self._gradients_seen = False
        self.publisher = Publisher(args, hub_client)
        if self.publisher.revisions:
            args.push_to_hub = False  # else transformers pushes too, to main
        # The meter comes first: what later callbacks do between two steps is no part of a step.
        trainer_options["callbacks"] = [self.meter, *(trainer_options.get("callbacks") or ()), self.publisher]
        super().__init__(model=fuse(model), args=args, train_dataset=self._steps, **trainer_options)
        self.data: dict[str, DataFacts] = {}
        self.base_model: str = getattr(model.config, "_name_or_path", "") or type(model).__name__
        prepare_checkpointing(model, base_of(model), args)
        stores = [store for store in (forget, retain, alternate) if store is not None]
        self._settle_reading(base_of(model), max(int(store.lengths.max(initial=0)) for store in stores))
        self._bind(*self.callback_handler.callbacks)
        # The loss is the mean over the whole step already; the trainer must not divide it by the micro-batches.
        self.model_accepts_loss_kwargs = True

    def _settle_reading(self, base: PreTrainedModel, longest: int) -> None:
        """Let all processes read packs alike; raise ValueError where they would run different numbers of passes."""
        if self.args.world_size == 1:
            return
        agree(base)
        reading = reading_of(base)
        sharded = self.is_fsdp_enabled or (self.is_deepspeed_enabled and is_deepspeed_zero3_enabled())
        if sharded and reading is not None and reading.splits(longest):
            reason = reading.alone or f"sequences of {reading.limit} tokens and more change its position encoding"
            raise ValueError(
                f"{type(base).__name__}: expected a model that reads packs in one pass, got one that runs one "
                f"sequence a pass ({reason}), while FSDP and ZeRO-3 need as many passes on every process; use DDP or "
                "ZeRO-2"
            )

    def add_callback(self, callback: Any) -> None:
        """Add a callback; those that work with the trainer are told which."""
        super().add_callback(callback)
        self._bind(*self.callback_handler.callbacks)

    def _bind(self, *callbacks: Any) -> None:
        for callback in callbacks:
            if isinstance(callback, TrainerBound):
                callback.trainer = self

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return a loader whose items are this rank's optimizer steps; the plan has shared them out already."""
        loader: DataLoader[Any] = DataLoaderShard(
            self._steps, batch_size=1, sampler=SequentialSampler(self._steps), collate_fn=_only_item
        )
        return loader

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], None]:
        """Return the next step. What transformers counts here, its means' denominators, a step carries along."""
        self._steps.begin_epoch(self.state.global_step // len(self._steps))
        self.meter.clock.begin(device)
        steps = list(itertools.islice(epoch_iterator, num_batches))
        self.meter.clock.end("data")
        return steps, None

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Return the schedule.

        Raises:
            ValueError: a learning rate that is 0 at every step; settings that the schedule has not.
        """
        args: Any = self.args
        expected = f"what {args.lr_scheduler_type.value} takes"
        with reading(f"`lr_scheduler_kwargs` {args.lr_scheduler_kwargs}", expected, "correct it"):
            scheduler = super().create_scheduler(num_training_steps, optimizer)
        check_schedule(scheduler, num_training_steps)
        return scheduler

    def _tell_data(self) -> None:
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ReferenceCallback):
                callback.on_data(self.data)

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        """Pairs of an epoch."""
        return self._steps.pairs

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Run the micro-batches of an optimizer step forward and backward; return this rank's share of the loss."""
        step = inputs.to(self.args.device, non_blocking=True)
        if self.is_deepspeed_enabled and len(step.batches) > 1:
            raise ValueError(
                f"`token_budget`: DeepSpeed takes an optimizer step after every backward pass, so it has to hold a "
                f"whole step, got one of {len(step.batches)} micro-batches; raise it, or use DDP or FSDP"
            )
        if self._counts_tokens:
            tokens = to_device(torch.tensor(int(step.tokens)), self.args.device)
            self.state.num_input_tokens_seen += int(self.accelerator.reduce(tokens))
        losses = []
        for i, batch in enumerate(step.batches):
            # Gradients are exchanged once a step, with the last micro-batch.
            waiting = i + 1 < len(step.batches)
            with self.accelerator.no_sync(model) if waiting else contextlib.nullcontext():
                losses.append(super().training_step(model, {"batch": batch, "step": step}))
                self.meter.clock.end("backward")
        total = torch.stack(losses).sum()
        self._watch.see(total, self.state.global_step + 1)
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled  # no rank has all gradients to look at
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
        """Run one micro-batch forward; return what its backward pass begins with."""
        if "batch" not in inputs:  # of an ``eval_dataset``, which transformers collates
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
        """Create the optimizer."""
        with self._stepping.optimizing(self.model, self.objective):
            return super().create_optimizer(*args, **kwargs)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the names of the parameters that weight decay applies to."""
        return self._stepping.decayed(model, super().get_decay_parameter_names(model))

    @property
    def reference(self) -> CachedReference | ModelReference | None:
        """What the objective compares with; None where it compares with nothing."""
        return self._reference

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the meter's figures beside the trainer's own."""
        self._watch.check()
        self._bind(*self.callback_handler.callbacks)  # a resumed run may have made some anew
        if "loss" in logs:
            dual = {} if self._dual is None else self._dual.read()
            logs = {**logs, **self.meter.read(lambda figures: self.accelerator.gather(figures[None])), **dual}
            if self._counts_tokens:
                logs["num_input_tokens_seen"] = self.state.num_input_tokens_seen
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, **options: Any) -> TrainOutput:  # type: ignore[override]
        """See ``ResumableTrainer.train``; ends when the checkpoints are on the Hub, or are in ``not_pushed``.

        Raises:
            FloatingPointError: a loss, or the weights at a checkpoint or at the end, that are not finite.
        """
        output = super().train(resume_from_checkpoint, **options)
        self._check_finite()
        return output

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._check_finite()
        super()._save_checkpoint(*args, **kwargs)

    def _check_finite(self) -> None:
        """Raise FloatingPointError for what must not be saved: a loss shows it one step late."""
        self._watch.check()
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):  # shards are in no one's hands
            check_weights(self.model, self.state.global_step)  # type: ignore[arg-type]

    def checkpoints_in_use(self) -> AbstractSet[Path]:
        """Return those that are not pushed yet."""
        return self.publisher.in_use()

    @property
    def not_pushed(self) -> dict[int, str]:
        """After ``train()``, the errors of checkpoints that are not on the Hub, by step."""
        return self.publisher.not_pushed

    def recipe(self) -> RunRecord:
        """Return what the model of this run is made of."""
        return RunRecord.of(self)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, its tokenizer, and a card (README.md)."""
        if self._saved and output_dir is None:
            return
        super().save_model(output_dir, _internal_call=True)
        if self.args.should_save:
            self.publisher.write_card(Path(output_dir or str(self.args.output_dir)))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write our card where transformers would write its own."""
        if self.is_world_process_zero():
            self.publisher.write_card(Path(str(self.args.output_dir)))

    def push_to_hub(self, *args: Any, saved: bool = False, **kwargs: Any) -> Any:
        """Push the model; where checkpoints are revisions, to main of the same repository.

        With ``saved`` it is in the output folder already, and is not written again: killed meanwhile, it stays whole.
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
        """6 · parameters · tokens, the usual estimate of a training step."""
        model: Any = self.model
        return 6 * int(model.num_parameters(exclude_embeddings=True)) * int(inputs.tokens)


class UnlearnTrainer(PackedTrainer):
    """Unlearns a forget set while keeping a retain set.

    Every batch packs forget and retain sequences without padding into one forward pass; the head computes the loss
    without keeping logits. The rest is ``transformers.Trainer``: schedule, optimizers, callbacks, checkpoints.

    Args:
        model: an ``AutoModelForCausalLM``, or a ``peft.PeftModel`` around one, which is changed in place; or the name
            of one, a folder or on the Hub, which is loaded, with its tokenizer where none is given.
        args: ``UnlearnArguments``, or ``transformers.TrainingArguments``, whose defaults are then efface's.
        forget: what to forget: rows with a question and an answer column, a file or Hub name, or a TokenStore.
        retain: what to keep; may be None where the objective's ``alpha`` is 0.
        forget_filter: which rows: conditions such as ``"topic_id=3,7"`` or ``"language!=EN"``, all of which a row must
            meet, or a mapping of columns to values.
        retain_filter: likewise.
        objective: for example ``NPO(beta=0.1)``; the class or the name of one, for its defaults; or a function that
            maps ``efface_kernels.Sequences`` to their forget terms (see ``efface.FunctionObjective``).
        alternate: other answers to the forget questions, one for each, for objectives that train them; default: made by
            ``args.refusal_file`` or ``args.alternate_column``.
        reference: the frozen model. "cached" computes its log-probabilities once, before training, and keeps them in
            a file (``args.reference_cache``); "live" keeps a second model; "adapter" is the base model of a
            ``peft.PeftModel``; "auto" is "cached" where the objective reads nothing but log-probabilities, else
            "adapter" or "live". Ignored by objectives without a reference.
        reference_model: a model, or the name of one; None is ``model`` as it is now.
        reference_device: where a live reference runs; None is where the policy does.
        processing_class: the tokenizer; needed for text.
        **trainer_options: callbacks, optimizers and the like, as of ``transformers.Trainer``.

    Raises:
        FileNotFoundError: a data file or a model that does not exist.
        TypeError: an argument of another type; a parameter of ``transformers.Trainer`` that would do nothing.
        ValueError: an empty forget set, a missing column, a row without a label, a token outside the vocabulary, rows
            in both sets without ``args.allow_overlap``, a reference that the objective cannot do with.
        FloatingPointError: from ``train()``, a loss that is not finite, with the step.
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
            if args.ddp_find_unused_parameters is None:  # what lies behind the module gets no gradient
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
        self._tell_data()
        self.reference_kind = kind
        self._forget_store = forget_store
        if isinstance(objective, PDU) and objective.primal_dual:
            self._dual = DualVariable(self._stepping)
            self.add_callback(self._dual)
        if kind is not None:
            compared = {Role.FORGET: forget_store}
            if alternate_store is not None:
                compared[Role.ALTERNATE] = alternate_store
            # The policy as it is now, in the precision in which it will train: L − L_ref starts at 0.
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
                    progress=self._tell_reference,
                )

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, **options: Any) -> TrainOutput:  # type: ignore[override]
        """See ``PackedTrainer.train``; a run that is not resumed begins with ``check_start``."""
        if not resume_from_checkpoint:
            self.check_start()
        return super().train(resume_from_checkpoint, **options)

    def check_start(self) -> None:
        """Raise ValueError unless the model as it is now is the one that an "adapter" reference is."""
        if isinstance(self._reference, AdapterReference):
            self._reference.check_start(self._forget_store)

    def _tell_reference(self, computed: int, missing: int, sequences: int) -> None:
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ReferenceCallback):
                callback.on_reference(computed, missing, sequences)


class FinetuneTrainer(PackedTrainer):
    """Fine-tunes on question-answer rows, packed: how the "full" and "retain" models of a benchmark are made.

    Args:
        model: as of ``UnlearnTrainer``, as are ``args``, ``processing_class`` and the errors.
        args: see there.
        data: what to learn: rows, a file or a Hub data set, or a ``TokenStore``.
        data_filter: which of its rows.
        processing_class: see there.
        trainer_options: of ``transformers.Trainer``.
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
            raise ValueError("`compat`: is about unlearning; drop it for fine-tuning")
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
        self._tell_data()


def _loaded(
    model: PreTrainedModel | str | Path, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Return a model, loaded where it is named, and its tokenizer.

    Raises:
        TypeError: neither a model nor a name; no tokenizer.
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
