"""The trainers: ``transformers.Trainer`` over packed batches, with the loss inside the model's head."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from efface.batching import TokenStore
from efface.hf.arguments import UnlearnArguments
from efface.hf.data import QuestionAnswers, token_store
from efface.hf.dataset import PackedDataset
from efface.hf.head import HeadLoss, fuse
from efface.hf.meter import LossWatch, StepMeter
from efface.hf.reference import KINDS, LiveReference, make_reference
from efface.hf.score import check_store
from efface.objectives import Objective, StepTerms


class PackedTrainer(Trainer):
    """What fine-tuning and unlearning share. ``objective`` None is plain NLL over the retain store."""

    def __init__(
        self,
        model: PreTrainedModel,
        args: UnlearnArguments,
        *,
        forget: TokenStore,
        retain: TokenStore,
        objective: Objective | None,
        **trainer_options: Any,
    ) -> None:
        if args.n_gpu > 1:
            # transformers would wrap the model in DataParallel, which splits tensors along a batch axis we do not have
            args._n_gpu = 1  # noqa: SLF001
        if args.world_size > 1:
            raise ValueError(f"expected a single process, got {args.world_size}; start without a distributed launcher")
        for name, store in (("forget", forget), ("retain", retain)):
            check_store(model, store, name)
        self.objective: Objective | None = objective
        self._live: LiveReference | None = None
        self._dataset = PackedDataset(
            forget,
            retain,
            pairs_per_batch=args.per_device_train_batch_size,
            batches_per_step=args.gradient_accumulation_steps,
            seed=args.seed if args.data_seed is None else args.data_seed,
        )
        super().__init__(model=fuse(model), args=args, train_dataset=self._dataset, **trainer_options)
        self.meter = StepMeter()
        self._watch = LossWatch()
        self.add_callback(self.meter)
        # The loss is the mean over the whole step already; the trainer must not divide it by the micro-batches.
        self.model_accepts_loss_kwargs = True

    def get_train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Return a loader whose batches are single items: they are packed batches."""
        loader = DataLoader(
            self._dataset,
            batch_size=1,
            sampler=SequentialSampler(self._dataset),
            collate_fn=_only_item,
            num_workers=self.args.dataloader_num_workers,
        )
        prepared: DataLoader[dict[str, Any]] = self.accelerator.prepare(loader)
        return prepared

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Any]:
        """Return the micro-batches of a step; their totals stand for transformers' ``num_items_in_batch``."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return samples, samples[0]["totals"] if samples else None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Run one micro-batch: forget and retain in one forward pass, its share of the step's loss out."""
        batch, totals = inputs["batch"], inputs["totals"]
        reference = None
        if self._live is not None:
            with self.accelerator.autocast():
                reference = self._live.rows(batch, batch.input_ids.device)
        loss = HeadLoss(
            terms=StepTerms(self.objective, batch.roles, totals),
            reference=reference,
            reference_sums=inputs.get("reference_sums"),
            chunk_rows=self._options.chunk_rows,
            backend=self._options.loss_backend,
        )
        output = model(batch=batch, loss=loss)
        self.meter.add(batch, output.terms, self._term_weights())
        return (output.loss, output) if return_outputs else output.loss

    @property
    def _options(self) -> UnlearnArguments:
        return self.args  # type: ignore[return-value]

    def _term_weights(self) -> dict[str, float]:
        if self.objective is None:
            return {"retain": 1.0}
        return {"forget": self.objective.gamma, "retain": self.objective.alpha}

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Do one forward and backward pass, and remember a loss that is not finite."""
        loss = super().training_step(*args, **kwargs)
        self._watch.see(loss, self.state.global_step + 1)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with forget loss, retain loss and tokens per second beside the trainer's own figures."""
        self._watch.check()
        if "loss" in logs:
            logs = {**logs, **self.meter.read()}
        super().log(logs, start_time)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._watch.check()
        super()._save_checkpoint(*args, **kwargs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """6 · parameters · tokens, the usual estimate of a training step."""
        model: Any = self.model
        return 6 * int(model.num_parameters(exclude_embeddings=True)) * int(inputs["batch"].tokens)


class UnlearnTrainer(PackedTrainer):
    """Unlearns a forget set while keeping a retain set.

    Every batch packs forget and retain sequences without padding into one forward pass; the head computes the loss
    without keeping logits. The rest is ``transformers.Trainer``: schedule, optimizers, callbacks, checkpoints.

    Args:
        model: an ``AutoModelForCausalLM``; it is changed in place.
        args: ``UnlearnArguments``.
        forget: what to forget: rows with a question and an answer column, a file or Hub name, or a TokenStore.
        retain: what to keep; may be None where the objective's ``alpha`` is 0.
        objective: for example ``NPO(beta=0.1)``.
        reference: "cached" computes the reference's log-probabilities once, before training; "live" keeps a second
            model. Ignored by objectives without a reference.
        reference_model: the frozen model; None is ``model`` as it is now.
        processing_class: the tokenizer; needed for text.
        **trainer_options: callbacks, optimizers and the like, as of ``transformers.Trainer``.

    Raises:
        FileNotFoundError: a data file that does not exist.
        ValueError: an empty forget set, a missing column, a row without a label, a token outside the vocabulary.
        FloatingPointError: from ``train()``, a loss that is not finite, with the step.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: UnlearnArguments,
        *,
        forget: QuestionAnswers,
        retain: QuestionAnswers | None,
        objective: Objective,
        reference: str = "cached",
        reference_model: PreTrainedModel | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **trainer_options: Any,
    ) -> None:
        if retain is None and objective.alpha:
            raise ValueError(
                f"objective {objective.name!r} has a retain term (alpha={objective.alpha}) but no retain set; "
                "give one, or set alpha to 0"
            )
        if reference not in KINDS:
            raise ValueError(f"`reference`: expected one of {', '.join(map(repr, KINDS))}, got {reference!r}")
        forget_store = _tokenised(forget, processing_class, args, "forget")
        keep = retain is not None and objective.alpha != 0
        retain_store = _tokenised(retain, processing_class, args, "retain") if keep else TokenStore.empty()
        super().__init__(
            model,
            args,
            forget=forget_store,
            retain=retain_store,
            objective=objective,
            processing_class=processing_class,
            **trainer_options,
        )
        if objective.needs_reference:
            # The policy as it is now, in the precision in which it will train: L − L_ref starts at 0.
            with self.accelerator.autocast():
                frozen = make_reference(reference, model, reference_model, forget_store)
            if isinstance(frozen, LiveReference):
                self._live = frozen
            else:
                self._dataset.reference = frozen


class FinetuneTrainer(PackedTrainer):
    """Fine-tunes on question-answer rows, packed: how the "full" and "retain" models of a benchmark are made.

    Arguments and errors are those of ``UnlearnTrainer``; ``data`` takes the place of its forget and retain sets.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: UnlearnArguments,
        *,
        data: QuestionAnswers,
        processing_class: PreTrainedTokenizerBase | None = None,
        **trainer_options: Any,
    ) -> None:
        store = _tokenised(data, processing_class, args, "training")
        super().__init__(
            model,
            args,
            forget=TokenStore.empty(),
            retain=store,
            objective=None,
            processing_class=processing_class,
            **trainer_options,
        )


def _tokenised(
    data: QuestionAnswers | None, tokenizer: PreTrainedTokenizerBase | None, args: UnlearnArguments, name: str
) -> TokenStore:
    return token_store(
        [] if data is None else data,
        tokenizer,
        name=name,
        question_column=args.question_column,
        answer_column=args.answer_column,
        template=args.template,
        max_length=args.max_length,
    )


def _only_item(items: list[dict[str, Any]]) -> dict[str, Any]:
    (item,) = items
    return item


__all__ = ["FinetuneTrainer", "PackedTrainer", "UnlearnTrainer"]
