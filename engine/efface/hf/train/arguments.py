"""``UnlearnArguments``: ``transformers.TrainingArguments`` with defaults for packed batches, plus efface's fields."""

import math
import os
from dataclasses import dataclass, field, fields
from datetime import timedelta
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy

from efface.hf.text.templates import AUTO, TEMPLATES
from efface.hf.train.options import check_fields, check_unknown_fields
from efface.hf.train.preflight import check_numbers, check_optimizer, check_ranges, check_reporters, check_texts


@dataclass
class UnlearnArguments(TrainingArguments):
    """``transformers.TrainingArguments`` plus the arguments of efface.

    An optimizer step trains ``pairs_per_step`` forget/retain pairs in total, for any number of processes. The default,
    None, is per_device_train_batch_size x gradient_accumulation_steps x processes. The processes share the pairs of a
    step, and each runs its part in micro-batches of up to ``token_budget`` tokens. The loss is the mean over the whole
    step.

    ``efface.hf.train.options`` lists how each of transformers' own fields is treated.

    Raises:
        ImportError: the package of the optimizer or of a tracker is not installed.
        TypeError: a numeric argument is not a number.
        ValueError: two settings contradict each other, a number is out of range, or a setting would have no effect.
    """

    # Batches are packed tokens without columns. A NaN in the loss is an error and must not be filtered from the log.
    remove_unused_columns: bool = field(default=False, metadata={"help": "unused: batches are packed tokens"})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "unused: a NaN stops the run"})
    report_to: None | str | list[str] = field(  # noqa: RUF036 - HfArgumentParser wants this order
        default="none", metadata={"help": "trackers to log to: tensorboard, wandb, … or none"}
    )
    logging_steps: float = field(default=10, metadata={"help": "optimizer steps between two log entries"})

    save_schedule: str | None = field(
        default=None,
        metadata={"help": "when to save a checkpoint: epoch, a number of steps, or no"},
    )
    save_strategy: SaveStrategy | str = field(
        default="", metadata={"help": "as in transformers; default: steps; see --save-schedule"}
    )
    revision_per_checkpoint: bool = field(
        default=False,
        metadata={
            "help": "with --push-to-hub: push each checkpoint to its own branch; checkpoint-N (N: optimizer steps), "
            "and the final model to main"
        },
    )

    pairs_per_step: int | None = field(
        default=None,
        metadata={
            "help": "forget/retain pairs per optimizer step, in total over all processes; default: "
            "per_device_train_batch_size x gradient_accumulation_steps x processes"
        },
    )
    token_budget: int = field(
        default=4096, metadata={"help": "maximum tokens per forward pass; a larger step is split into micro-batches"}
    )
    share_prefixes: bool = field(
        default=True,
        metadata={
            "help": "run tokens that the sequences of a forward pass share, such as a system prompt, only once; this "
            "changes results only by rounding"
        },
    )
    warmup_epochs: float | None = field(
        default=None,
        metadata={
            "help": "epochs over which the learning rate rises; rounded down to whole steps, at least one step (with "
            "--compat possibly none)"
        },
    )
    retain_sampling: str = field(
        default="random",
        metadata={
            "help": "how retain rows are drawn: random, cycle or paired; cycle: no row repeats before all were used; "
            "paired: row i goes with forget row i"
        },
    )
    dataloader_num_workers: int = field(default=0, metadata={"help": "threads that assemble batches; 0 means one"})

    compat: str | None = field(
        default=None,
        metadata={"help": "open-unlearning: use its labels and training step, to reproduce earlier runs; padded, slow"},
    )

    question_column: str | None = field(
        default=None,
        metadata={"help": "column with the prompt; default: question (for documents: prompt, if present)"},
    )
    answer_column: str | None = field(
        default=None, metadata={"help": "column with the answer; default: answer (for documents: text)"}
    )
    alternate_column: str | None = field(
        default=None,
        metadata={"help": "column of the forget set with an alternate answer; for dpo (AltPO) and idk_nll"},
    )
    refusal_file: str | None = field(
        default=None,
        metadata={
            "help": "text file of refusals to use as alternate answers; one per line, for dpo (IdkDPO) and idk_nll"
        },
    )
    template: str = field(
        default=AUTO,
        metadata={"help": f"prompt format: {AUTO}, {', '.join(TEMPLATES)} (for documents)"},
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": 'system prompt for chat templates; default: the template\'s own; "" for none'}
    )
    date_string: str | None = field(
        default=None, metadata={"help": "date for chat templates that print one; default: the template's own"}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "cut sequences to this many tokens (documents are split); default: no limit"}
    )
    allow_overlap: bool = field(
        default=False,
        metadata={"help": "accept rows that are in both the forget and the retain set; default: an error"},
    )
    token_cache: str | None = field(
        default=None, metadata={"help": "folder for tokenised data; default: $EFFACE_CACHE or ~/.cache/efface"}
    )
    reference_cache: str | None = field(
        default=None,
        metadata={
            "help": "file of cached log-probabilities; several runs can share it; none keeps them in memory only; "
            "default: reference.sqlite in $EFFACE_CACHE or ~/.cache/efface"
        },
    )
    chunk_rows: int | None = field(
        default=None,
        metadata={"help": "rows of logits in memory at a time in the loss; default: chosen for the model and device"},
    )
    loss_backend: str = field(default="auto", metadata={"help": "backend of the loss: auto, native, triton or torch"})

    # Pairs per epoch and pairs per step. The trainer sets them once it knows the data; warmup_epochs needs them.
    epoch_pairs: tuple[int, int] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Validate the arguments, including those that transformers does not check."""
        check_unknown_fields(self)  # before super().__post_init__, which changes some of transformers' fields
        check_numbers(self)
        check_texts(self)
        self._schedule_saves()
        self._init_process_group()
        super().__post_init__()  # type: ignore[no-untyped-call]
        check_fields(self)
        check_ranges(self)
        check_optimizer(str(getattr(self.optim, "value", self.optim)))
        check_reporters(self.report_to or ())
        if self.revision_per_checkpoint and not self.push_to_hub:
            raise ValueError("`revision_per_checkpoint`: expected --push-to-hub too, got none; add --push-to-hub")
        if self.revision_per_checkpoint and self.save_strategy == SaveStrategy.NO:
            raise ValueError(
                "`revision_per_checkpoint`: expected a run that saves checkpoints, got one that saves none; set "
                "--save-schedule to epoch or a number of steps"
            )
        self._check_warmup()
        self._check_compat()
        self._check_length()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to pickle, for example into ``training_args.bin``, without access tokens."""
        return {name: None if name.endswith("_token") else value for name, value in vars(self).items()}

    def __copy__(self) -> "UnlearnArguments":
        """Return a copy, with the access tokens that ``__getstate__`` leaves out."""
        copied = object.__new__(type(self))
        vars(copied).update(vars(self))
        return copied

    def _check_length(self) -> None:
        # transformers reads max_steps=0 as "as many steps as the epochs have", and trains nothing in 0 epochs.
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(
                f"`max_steps`: expected at least 1 optimizer step, or -1 for num_train_epochs, got {self.max_steps}"
            )
        if self.max_steps == -1 and not self.num_train_epochs > 0:
            raise ValueError(
                f"`num_train_epochs`: expected more than 0, got {self.num_train_epochs}, which would leave the model "
                "unchanged; set it to a positive number"
            )
        if self.max_steps == -1 and math.isinf(self.num_train_epochs):
            raise ValueError("`num_train_epochs`: expected a finite number, got inf; set it to a finite number")

    def _init_process_group(self) -> None:
        """Apply ``ddp_timeout`` to the process group of a CPU run; transformers applies it only on GPUs."""
        processes = os.environ.get("WORLD_SIZE", "1")
        if not (processes.isascii() and processes.isdigit()):
            raise ValueError(
                f"WORLD_SIZE: expected a number of processes, got {processes!r}; start the run with torchrun"
            )
        alone = int(processes) == 1
        if self.use_cpu and not alone and not torch.distributed.is_initialized():
            timeout = timedelta(seconds=self.ddp_timeout)
            torch.distributed.init_process_group(self.ddp_backend or "gloo", timeout=timeout)

    def _schedule_saves(self) -> None:
        """Set transformers' ``save_strategy`` and ``save_steps`` from ``save_schedule``."""
        given = str(getattr(self.save_strategy, "value", self.save_strategy))
        if self.save_schedule is None:
            self.save_strategy = given or "steps"
            return
        schedule = str(self.save_schedule)
        every = int(schedule) if schedule.isascii() and schedule.isdigit() else 0
        if schedule not in ("epoch", "no") and every < 1:
            raise ValueError(f"`save_schedule`: expected epoch, no, or a number of steps >= 1, got {schedule!r}")
        strategy = "steps" if every else schedule
        if given not in ("", strategy) or (every and self.save_steps not in (type(self).save_steps, every)):
            raise ValueError(
                f"`save_schedule`: {schedule!r} contradicts save_strategy={given or 'steps'!r}, "
                f"save_steps={self.save_steps}; set only one of them"
            )
        self.save_strategy = strategy
        if every:
            self.save_steps = every

    def _check_warmup(self) -> None:
        if self.warmup_epochs is None:
            return
        others = [name for name in ("warmup_steps", "warmup_ratio") if getattr(self, name, None)]
        if others:
            raise ValueError(f"`warmup_epochs`: expected no other warm-up, got `{others[0]}` too; set only one of them")

    def _check_compat(self) -> None:
        if self.compat is None:
            return
        if self.compat != "open-unlearning":
            raise ValueError(f"`compat`: expected 'open-unlearning' or None, got {self.compat!r}")
        if self.world_size > 1:
            raise ValueError(
                f"`compat`: expected one process, got {self.world_size}; use one process with {self.world_size} times "
                "the gradient_accumulation_steps, which is equivalent if they divide the number of micro-batches in an "
                "epoch"
            )
        size = self.per_device_train_batch_size
        if self.pairs_per_step is not None and self.pairs_per_step % size:
            raise ValueError(
                f"`compat`: expected `pairs_per_step` to be a multiple of per_device_train_batch_size={size}, got "
                f"{self.pairs_per_step}; set --per-device-train-batch-size to a divisor of that"
            )

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Return the number of warm-up steps.

        A positive ``warmup_epochs`` gives at least one step, as in TOFU. With ``compat`` it can give none.

        Raises:
            ValueError: ``warmup_epochs`` is set and no trainer has set the length of an epoch.
        """
        if self.warmup_epochs is None:
            return int(super().get_warmup_steps(num_training_steps))
        if self.epoch_pairs is None:
            raise ValueError(
                "`warmup_epochs`: expected arguments of a trainer, which knows the steps of an epoch, got none; set "
                "`warmup_steps`"
            )
        pairs, per_step = self.epoch_pairs
        if self.compat is not None:
            return int((self.warmup_epochs * pairs) // per_step)
        return max(1, int(self.warmup_epochs * (pairs / per_step))) if self.warmup_epochs else 0


def unlearn_arguments(args: object) -> UnlearnArguments:
    """Return ``args`` as ``UnlearnArguments``; ``transformers.TrainingArguments`` are converted.

    In the conversion, a field that has transformers' default value gets efface's default. For a dictionary, call
    ``UnlearnArguments(**args)``.

    Raises:
        TypeError: ``args`` is of another class, or of a subclass of ``TrainingArguments`` with more fields.
        ValueError: a field would have no effect.
    """
    if isinstance(args, UnlearnArguments):
        return args
    known = {one.name for one in fields(TrainingArguments)}
    others = sorted({one.name for one in fields(args)} - known) if isinstance(args, TrainingArguments) else []
    if not isinstance(args, TrainingArguments) or others:
        lost = f", whose fields {', '.join(others[:3])}{', ...' if len(others) > 3 else ''} would have no effect"
        raise TypeError(
            "`args`: expected efface.UnlearnArguments or transformers.TrainingArguments, got "
            f"{type(args).__name__}{lost if others else ''}"
        )
    plain = TrainingArguments(output_dir=args.output_dir)
    names = (one.name for one in fields(TrainingArguments) if one.init and one.name != "output_dir")
    given = {name: getattr(args, name) for name in names if getattr(args, name) != getattr(plain, name)}
    return UnlearnArguments(output_dir=args.output_dir, **given)
