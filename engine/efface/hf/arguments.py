"""Arguments of a run: those of ``transformers.TrainingArguments``, with defaults that suit packed batches."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from efface.hf.templates import AUTO


@dataclass
class UnlearnArguments(TrainingArguments):
    """``TrainingArguments`` plus what efface needs to know.

    ``per_device_train_batch_size`` counts forget/retain *pairs* in a forward pass;
    ``gradient_accumulation_steps`` such batches make an optimizer step, and the loss is the mean over all of them.
    """

    # Batches are packed tokens without columns, and a NaN is an error, not a number to hide.
    remove_unused_columns: bool = field(default=False, metadata={"help": "unused: batches are packed tokens"})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "unused: a NaN stops the run"})
    report_to: None | str | list[str] = field(  # noqa: RUF036 - HfArgumentParser wants this order
        default="none", metadata={"help": "tensorboard, wandb, … or none"}
    )
    logging_steps: float = field(default=10, metadata={"help": "log every so many optimizer steps"})

    question_column: str = field(default="question", metadata={"help": "column of the data that holds the prompt"})
    answer_column: str = field(default="answer", metadata={"help": "column of the data that holds the answer"})
    template: str = field(default=AUTO, metadata={"help": "prompt format: auto, chat, question-answer, llama-2"})
    max_length: int | None = field(default=None, metadata={"help": "cut sequences to so many tokens; default: never"})
    chunk_rows: int | None = field(
        default=None, metadata={"help": "rows of logits alive at a time in the loss; default: chosen from the model"}
    )
    loss_backend: str = field(default="auto", metadata={"help": "implementation of the loss: auto, native or torch"})
