"""Arguments of a run: those of ``transformers.TrainingArguments``, with defaults that suit packed batches."""

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
    """``TrainingArguments`` plus what efface needs to know.

    An optimizer step holds ``pairs_per_step`` forget/retain pairs, whatever the number of processes (None is
    per_device_train_batch_size x gradient_accumulation_steps x processes); they share it in micro-batches of up to
    ``token_budget`` tokens, and the loss is the mean over all of it.

    What becomes of transformers' own fields stands in ``efface.hf.train.options``.

    Raises:
        ImportError: an optimizer whose package is not installed.
        ValueError: settings that contradict one another, or that would do nothing.
    """

    # Batches are packed tokens without columns, and a NaN is an error, not a number to hide.
    remove_unused_columns: bool = field(default=False, metadata={"help": "unused: batches are packed tokens"})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "unused: a NaN stops the run"})
    report_to: None | str | list[str] = field(  # noqa: RUF036 - HfArgumentParser wants this order
        default="none", metadata={"help": "tensorboard, wandb, … or none"}
    )
    logging_steps: float = field(default=10, metadata={"help": "log every so many optimizer steps"})

    save_schedule: str | None = field(
        default=None,
        metadata={"help": "when to write a checkpoint: epoch, a number of steps, or no"},
    )
    save_strategy: SaveStrategy | str = field(
        default="", metadata={"help": "as of transformers; steps is the default, see --save-schedule"}
    )
    revision_per_checkpoint: bool = field(
        default=False,
        metadata={
            "help": "with --push-to-hub: each checkpoint to a branch; checkpoint-N (N: optimizer steps), and the final "
            "model to main"
        },
    )

    pairs_per_step: int | None = field(
        default=None,
        metadata={
            "help": "forget/retain pairs of an optimizer step, on all processes together; default: "
            "per_device_train_batch_size x gradient_accumulation_steps x processes"
        },
    )
    token_budget: int = field(
        default=4096, metadata={"help": "most tokens of a forward pass; a step with more of them takes several"}
    )
    warmup_epochs: float | None = field(
        default=None,
        metadata={
            "help": "epochs in which the learning rate rises; in whole steps rounded down, at least one (with --compat "
            "perhaps none)"
        },
    )
    retain_sampling: str = field(
        default="random",
        metadata={"help": "draw of retain rows: random, cycle, paired; cycle: none again before all came; paired: i"},
    )
    dataloader_num_workers: int = field(default=0, metadata={"help": "threads that assemble batches; 0 is one"})

    compat: str | None = field(
        default=None,
        metadata={"help": "open-unlearning: its labels and step, to match old runs; padded, quirk for quirk, slow"},
    )

    question_column: str | None = field(
        default=None,
        metadata={"help": "column that holds the prompt; default: question (of documents: prompt, if there is one)"},
    )
    answer_column: str | None = field(
        default=None, metadata={"help": "column that holds the answer; default: answer (of documents: text)"}
    )
    alternate_column: str | None = field(
        default=None,
        metadata={"help": "column of the forget set with another answer; for dpo (AltPO) and idk_nll"},
    )
    refusal_file: str | None = field(
        default=None,
        metadata={"help": "text file of other answers, refusals; one a line, for dpo (IdkDPO) and idk_nll"},
    )
    template: str = field(
        default=AUTO,
        metadata={"help": f"prompt format: {AUTO}, {', '.join(TEMPLATES)} (documents)"},
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": 'system prompt of a chat; default: the template\'s; "" for none'}
    )
    date_string: str | None = field(
        default=None, metadata={"help": "date, for chat templates that print one; default: the template's"}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "cut sequences to so many tokens (documents are split); default: never"}
    )
    allow_overlap: bool = field(default=False, metadata={"help": "let rows stand in both sets; else that is an error"})
    token_cache: str | None = field(
        default=None, metadata={"help": "folder for tokenised data; default: $EFFACE_CACHE or ~/.cache/efface"}
    )
    reference_cache: str | None = field(
        default=None,
        metadata={
            "help": "file of cached log-probabilities; runs share it; none keeps them in memory alone; "
            "default: reference.sqlite in $EFFACE_CACHE or ~/.cache/efface"
        },
    )
    chunk_rows: int | None = field(
        default=None,
        metadata={"help": "rows of logits alive at a time in the loss; default: by the model and the device"},
    )
    loss_backend: str = field(default="auto", metadata={"help": "of the loss: auto, native, triton or torch"})

    # Pairs of an epoch, and of a step; the trainer sets it, because it knows the data.
    epoch_pairs: tuple[int, int] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check what transformers does not."""
        check_unknown_fields(self)  # as given: transformers changes some of its own
        check_numbers(self)
        check_texts(self)
        self._schedule_saves()
        self._meet()
        super().__post_init__()  # type: ignore[no-untyped-call]
        check_fields(self)
        check_ranges(self)
        check_optimizer(str(getattr(self.optim, "value", self.optim)))
        check_reporters(self.report_to or ())
        if self.revision_per_checkpoint and not self.push_to_hub:
            raise ValueError("`revision_per_checkpoint`: pushes to the Hub, so it needs --push-to-hub too")
        if self.revision_per_checkpoint and self.save_strategy == SaveStrategy.NO:
            raise ValueError(
                "`revision_per_checkpoint`: no checkpoint is written; set --save-schedule epoch or a number"
            )
        self._check_warmup()
        self._check_compat()
        self._check_length()

    def __getstate__(self) -> dict[str, Any]:
        """Return what is written, into ``training_args.bin`` for one: all but tokens of access."""
        return {name: None if name.endswith("_token") else value for name, value in vars(self).items()}

    def __copy__(self) -> "UnlearnArguments":
        """Return a copy in memory, which keeps them."""
        copied = object.__new__(type(self))
        vars(copied).update(vars(self))
        return copied

    def _check_length(self) -> None:
        # transformers takes max_steps=0 for "as many as the epochs have", and trains nothing in 0 epochs.
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(
                f"`max_steps`: expected at least 1 optimizer step, or -1 for num_train_epochs, got {self.max_steps}"
            )
        if self.max_steps == -1 and not self.num_train_epochs > 0:
            raise ValueError(
                f"`num_train_epochs`: expected more than 0, got {self.num_train_epochs}: without an optimizer step the "
                "model would be what it was"
            )
        if self.max_steps == -1 and math.isinf(self.num_train_epochs):
            raise ValueError("`num_train_epochs`: expected a finite number, got inf: the run would never end")

    def _meet(self) -> None:
        """Let processes on CPUs meet under ``ddp_timeout``, too; transformers gives it to those on GPUs alone."""
        processes = os.environ.get("WORLD_SIZE", "1")
        if not (processes.isascii() and processes.isdigit()):
            raise ValueError(f"WORLD_SIZE: expected a number of processes, as torchrun sets it, got {processes!r}")
        alone = int(processes) == 1
        if self.use_cpu and not alone and not torch.distributed.is_initialized():
            timeout = timedelta(seconds=self.ddp_timeout)
            torch.distributed.init_process_group(self.ddp_backend or "gloo", timeout=timeout)

    def _schedule_saves(self) -> None:
        """Turn ``save_schedule`` into transformers' own two settings."""
        given = str(getattr(self.save_strategy, "value", self.save_strategy))
        if self.save_schedule is None:
            self.save_strategy = given or "steps"
            return
        schedule = str(self.save_schedule)
        every = int(schedule) if schedule.isascii() and schedule.isdigit() else 0
        if schedule not in ("epoch", "no") and every < 1:
            raise ValueError(f"`save_schedule`: expected epoch, no, or a number of steps from 1, got {schedule!r}")
        strategy = "steps" if every else schedule
        if given not in ("", strategy) or (every and self.save_steps not in (type(self).save_steps, every)):
            raise ValueError(
                f"`save_schedule`: {schedule!r} contradicts save_strategy={given or 'steps'!r}, "
                f"save_steps={self.save_steps}; give one of them"
            )
        self.save_strategy = strategy
        if every:
            self.save_steps = every

    def _check_warmup(self) -> None:
        if self.warmup_epochs is None:
            return
        others = [name for name in ("warmup_steps", "warmup_ratio") if getattr(self, name, None)]
        if others:
            raise ValueError(f"`warmup_epochs`: expected it alone, got `{others[0]}` too; give one of them")

    def _check_compat(self) -> None:
        if self.compat is None:
            return
        if self.compat != "open-unlearning":
            raise ValueError(f"`compat`: expected 'open-unlearning' or None, got {self.compat!r}")
        if self.world_size > 1:
            raise ValueError(
                f"`compat`: expected one process, got {self.world_size}; run one with {self.world_size} times the "
                "gradient_accumulation_steps, which is the same where they divide an epoch's micro-batches"
            )
        size = self.per_device_train_batch_size
        if self.pairs_per_step is not None and self.pairs_per_step % size:
            raise ValueError(
                f"`compat`: expected `pairs_per_step` in micro-batches of per_device_train_batch_size={size}, got "
                f"{self.pairs_per_step}; set --per-device-train-batch-size to a divisor of it"
            )

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Return the steps of the warm-up; at least one where any is asked for, as TOFU does, but not with ``compat``.

        Raises:
            ValueError: ``warmup_epochs`` outside a trainer, where nobody knows how long an epoch is.
        """
        if self.warmup_epochs is None:
            return int(super().get_warmup_steps(num_training_steps))
        if self.epoch_pairs is None:
            raise ValueError("`warmup_epochs`: only a trainer knows the steps of an epoch; give `warmup_steps`")
        pairs, per_step = self.epoch_pairs
        if self.compat is not None:
            return int((self.warmup_epochs * pairs) // per_step)
        return max(1, int(self.warmup_epochs * (pairs / per_step))) if self.warmup_epochs else 0


def unlearn_arguments(args: object) -> UnlearnArguments:
    """Return arguments as the trainers take them: ``UnlearnArguments`` as they are, ``TrainingArguments`` as such.

    A field that has transformers' default gets efface's. Of a dictionary ``UnlearnArguments(**args)`` is the way.

    Raises:
        TypeError: neither.
        ValueError: a field that would do nothing.
    """
    if isinstance(args, UnlearnArguments):
        return args
    known = {one.name for one in fields(TrainingArguments)}
    others = sorted({one.name for one in fields(args)} - known) if isinstance(args, TrainingArguments) else []
    if not isinstance(args, TrainingArguments) or others:
        lost = f", of which {', '.join(others[:3])}{', ...' if len(others) > 3 else ''} would do nothing"
        raise TypeError(
            "`args`: expected efface.UnlearnArguments or transformers.TrainingArguments, got "
            f"{type(args).__name__}{lost if others else ''}"
        )
    plain = TrainingArguments(output_dir=args.output_dir)
    names = (one.name for one in fields(TrainingArguments) if one.init and one.name != "output_dir")
    given = {name: getattr(args, name) for name in names if getattr(args, name) != getattr(plain, name)}
    return UnlearnArguments(output_dir=args.output_dir, **given)
