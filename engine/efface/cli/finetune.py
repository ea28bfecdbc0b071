"""``efface finetune``: fine-tune a model on a data set, to make the "full" and "retain" models of a benchmark."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PrinterCallback, set_seed

from efface.cli.progress import ProgressBar
from efface.cli.training import TrainingRun, carry_out, config_of, model_inputs, tokenizer_of
from efface.hf.model.fingerprint import fingerprint
from efface.hf.model.loading import load_config, load_model
from efface.hf.text.rows import check_source
from efface.hf.train.arguments import UnlearnArguments
from efface.hf.train.record import command_line
from efface.hf.train.trainer import FinetuneTrainer, PackedTrainer
from efface.recipes.flags import SettingsParser, made
from efface.recipes.settings import over, with_config

# The settings of TOFU's "full" and "retain" models (arXiv 2401.06121, and open-unlearning's configuration).
DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 5.0,
    "learning_rate": 1e-5,
    "weight_decay": 0.01,
    "warmup_epochs": 1.0,
    "pairs_per_step": 32,
}

_EXAMPLES = """
examples:
  efface finetune --model ./llama --data locuslab/TOFU:full:train --output full
  efface finetune --model ./llama --data fame.csv --data-filter 'topic_id!=3' \\
      --output retain

Forget quality compares with the log of a model trained without the forget set:
  efface finetune --model ./llama --data locuslab/TOFU:retain90:train --output retain90
  efface evaluate --model retain90 --split forget10 --output retain90/evaluation

Then run `efface unlearn --recipe NAME` with the flag
--retain-log retain90/evaluation/TOFU_EVAL.json. The defaults are TOFU's. Run a stopped
command again to continue it. All flags of transformers.TrainingArguments work.
"""


@dataclass
class FinetuneCommand:
    """The flags of ``efface finetune``, in addition to those of ``UnlearnArguments``."""

    model: str = field(metadata={"help": "checkpoint folder or Hub name"})
    data: str = field(
        metadata={
            "help": "training data: a file, or a Hub data set (name[:config[:split]]); files are JSON, CSV or Parquet"
        }
    )
    data_filter: list[str] | None = field(
        default=None,
        metadata={
            "help": "rows to train on: column=value[,value] or column!=value[,value]; a row must meet all conditions; "
            "values are compared as text; put a value with commas in double quotes"
        },
    )
    revision: str = field(
        default="main",
        metadata={
            "help": "branch, tag or commit on the Hub; for a folder, a checkpoint inside it, such as checkpoint-12"
        },
    )
    dtype: str = field(
        default="auto", metadata={"help": "dtype of the loaded weights: auto, float32, bfloat16 or float16"}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "run code that comes with the checkpoint; read it first"}
    )
    tokenizer: str | None = field(default=None, metadata={"help": "folder or Hub name; default: that of --model"})
    from_config: bool = field(
        default=False,
        metadata={"help": "start from random float32 weights drawn with --seed, not from the weights of --model"},
    )
    overwrite: bool = field(
        default=False,
        metadata={
            "help": "write into an output folder that is not empty; removes checkpoints of another run in it; an "
            "unfinished run of the same command still continues"
        },
    )


def parser() -> SettingsParser:
    """Return the parser of the command's flags."""
    return SettingsParser(
        "finetune",
        (FinetuneCommand, UnlearnArguments),
        'Fine-tunes a model on a data set, for example to make the "full" and "retain" models of a benchmark.',
        _EXAMPLES,
        DEFAULTS,
    )


def _parse(argv: Sequence[str]) -> tuple[FinetuneCommand, UnlearnArguments]:
    flags = parser()
    values = over(DEFAULTS, with_config(flags.given(argv), flags))
    flags.check_required(values)
    return made(FinetuneCommand, values), made(UnlearnArguments, values)


def _load(command: FinetuneCommand, seed: int) -> Any:
    if not command.from_config:
        return load_model(
            command.model,
            revision=command.revision,
            dtype=command.dtype,
            trainable=True,
            trust_remote_code=command.trust_remote_code,
        )
    if command.dtype not in ("auto", "float32"):
        raise ValueError(
            f"--dtype: expected float32 with --from-config, got {command.dtype!r}; drop --dtype, and add --bf16 True"
        )
    trusted = command.trust_remote_code
    config = load_config(command.model, revision=command.revision, trust_remote_code=trusted)
    set_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype="float32", trust_remote_code=trusted)


def run(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    command, args = _parse(argv)
    args.disable_tqdm = True
    check_source(command.data)

    def make(bar: ProgressBar) -> tuple[PackedTrainer, dict[str, Any]]:
        bar.stage("loading the model")
        tokenizer = tokenizer_of(command)  # loads at once, so a wrong name raises before a model that takes minutes
        model = _load(command, args.seed)
        weights = fingerprint(model).hex()
        bar.stage("reading the data")
        trainer = FinetuneTrainer(
            model,
            args,
            data=command.data,
            data_filter=command.data_filter,
            processing_class=tokenizer,
            callbacks=[bar],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.base_model, trainer.revision = command.model, command.revision
        return trainer, {"model": {"weights": weights}}

    return carry_out(
        TrainingRun(
            args,
            title=f"finetune · {Path(command.model).name}",
            command=command_line(argv, "finetune"),
            overwrite=command.overwrite,
            inputs={
                **model_inputs("--model", command.model, command.revision),
                "--data": command.data,
                "--config": config_of(argv),
            },
            merged=False,
            make=make,
        )
    )
