"""Arguments of a run: those of ``transformers.TrainingArguments``, with defaults that suit packed batches."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from efface.hf.templates import AUTO, TEMPLATES


@dataclass
class UnlearnArguments(TrainingArguments):
    """``TrainingArguments`` plus what efface needs to know.

    An optimizer step holds ``pairs_per_step`` forget/retain pairs, whatever the number of processes; they share it in
    micro-batches of up to ``token_budget`` tokens, and the loss is the mean over all of it.
    """

    # Batches are packed tokens without columns, and a NaN is an error, not a number to hide.
    remove_unused_columns: bool = field(default=False, metadata={"help": "unused: batches are packed tokens"})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "unused: a NaN stops the run"})
    report_to: None | str | list[str] = field(  # noqa: RUF036 - HfArgumentParser wants this order
        default="none", metadata={"help": "tensorboard, wandb, … or none"}
    )
    logging_steps: float = field(default=10, metadata={"help": "log every so many optimizer steps"})

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
    retain_sampling: str = field(
        default="random",
        metadata={"help": "how pairs draw retain rows: random, cycle (none again before all came), paired (row i)"},
    )
    dataloader_num_workers: int = field(default=0, metadata={"help": "threads that assemble batches; 0 is one"})

    compat: str | None = field(
        default=None,
        metadata={"help": "open-unlearning: its padded step with all its quirks, to match old runs; slow"},
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
        metadata={"help": "column of the forget set that holds another answer, for dpo (AltPO) and idk_nll"},
    )
    refusal_file: str | None = field(
        default=None,
        metadata={"help": "text file with a refusal a line, the other answers instead, for dpo (IdkDPO) and idk_nll"},
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
    token_cache: str | None = field(
        default=None, metadata={"help": "folder for tokenised data; default: $EFFACE_CACHE or ~/.cache/efface"}
    )
    reference_cache: str | None = field(
        default=None,
        metadata={
            "help": "file of cached reference log-probabilities, which runs share; none keeps them in memory alone; "
            "default: reference.sqlite in $EFFACE_CACHE or ~/.cache/efface"
        },
    )
    chunk_rows: int | None = field(
        default=None, metadata={"help": "rows of logits alive at a time in the loss; default: chosen from the model"}
    )
    loss_backend: str = field(
        default="auto", metadata={"help": "implementation of the loss: auto, native, triton or torch"}
    )
