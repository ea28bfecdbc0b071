"""The flags of ``efface unlearn``, which other commands about the same run share."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from transformers import HfArgumentParser

from efface.hf.arguments import UnlearnArguments
from efface.objectives import Objective, get_objective, known_objectives

_EXAMPLES = """
examples:
  efface unlearn --model ./llama --forget forget10.json --retain retain90.json --objective npo --output_dir out
  efface unlearn --config npo.yaml --learning_rate 2e-5
  efface unlearn --model ./llama --forget fame.csv --forget_filter topic_id=3 --retain fame.csv \\
      --retain_filter 'topic_id!=3' --objective graddiff --pairs_per_step 32 --output_dir out

  efface unlearn --model ./llama --forget forget10.json --retain retain90.json --objective npo --output_dir out \\
      --lora_r 8 --reference adapter

  torchrun --nproc-per-node 8 -m efface unlearn --config npo.yaml

A run that was stopped, however, continues from its newest checkpoint when the same command is given again.
Every flag of transformers.TrainingArguments works. --config reads a YAML file of flags; flags on the command line win.
"""


@dataclass
class UnlearnCommand:
    """What ``efface unlearn`` takes beside ``UnlearnArguments``."""

    model: str = field(metadata={"help": "checkpoint folder or Hub name"})
    forget: str = field(
        metadata={"help": "what to forget: a JSON, CSV or Parquet file, or a Hub data set (name[:config[:split]])"}
    )
    retain: str | None = field(default=None, metadata={"help": "what to keep, likewise"})
    forget_filter: list[str] | None = field(
        default=None,
        metadata={"help": "rows to forget: column=value[,value] or column!=value[,value]; a row must meet all"},
    )
    retain_filter: list[str] | None = field(default=None, metadata={"help": "rows to keep, likewise"})
    objective: str = field(default="npo", metadata={"help": f"one of {', '.join(known_objectives())}"})
    beta: float | None = field(
        default=None, metadata={"help": "inverse temperature of npo, simnpo and dpo, shift of undial, power of wga"}
    )
    delta: float | None = field(default=None, metadata={"help": "reward margin of SimNPO"})
    gamma: float | None = field(default=None, metadata={"help": "weight of the forget term"})
    alpha: float | None = field(default=None, metadata={"help": "weight of the retain term"})
    retain_loss_type: str | None = field(default=None, metadata={"help": "NLL or KL; of rmu also EMBED_DIFF"})
    objective_options: list[str] | None = field(
        default=None, metadata={"help": "other parameters of the objective: name=value [name=value ...]"}
    )
    reference: str = field(
        default="auto",
        metadata={"help": "cached, live, adapter (of --lora_r, switched off), or auto: cached wherever that will do"},
    )
    reference_model: str | None = field(default=None, metadata={"help": "default: --model as it is before training"})
    reference_revision: str = field(default="main", metadata={"help": "revision of --reference_model"})
    reference_device: str | None = field(
        default=None, metadata={"help": "where a live reference runs, such as cuda:1; default: where the policy does"}
    )
    reference_8bit: bool = field(
        default=False, metadata={"help": "load the reference in 8 bits, by bitsandbytes; all but its head"}
    )
    revision: str = field(
        default="main",
        metadata={"help": "branch, tag or commit on the Hub; of a folder, a checkpoint in it, as checkpoint-12"},
    )
    dtype: str = field(
        default="auto", metadata={"help": "dtype to load the model in: auto, float32, bfloat16, float16"}
    )
    lora_r: int | None = field(
        default=None, metadata={"help": "rank: train a LoRA adapter of the model, and write that (needs peft)"}
    )
    lora_alpha: float | None = field(default=None, metadata={"help": "the adapter counts alpha / r; default: 2 r"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout of what enters the adapter"})
    lora_target: list[str] | None = field(
        default=None, metadata={"help": "names of layers to adapt; default: every linear layer but the head"}
    )
    merge_adapter: bool = field(default=False, metadata={"help": "write the model with the adapter merged into it"})
    overwrite: bool = field(
        default=False,
        metadata={
            "help": "write into an output folder that is not empty; checkpoints of another run there are removed, an "
            "unfinished run of the same command continues"
        },
    )

    def make_objective(self) -> Objective:
        """Return the objective with the parameters that were given."""
        named = ("beta", "delta", "gamma", "alpha", "retain_loss_type")
        given = {name: getattr(self, name) for name in named if getattr(self, name) is not None}
        for option in self.objective_options or []:
            name, equals, value = option.partition("=")
            if not equals:
                raise ValueError(f"--objective_options: expected name=value, got {option!r}")
            given[name] = yaml.safe_load(value)
        return get_objective(self.objective, **given)


def _config_flags(path: str) -> list[str]:
    """Read a YAML file of flags as command-line words."""
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"config file {path!r} does not exist; check the path")
    content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    if not isinstance(content, dict):
        raise ValueError(f"config file {path!r}: expected `flag: value` lines, got a {type(content).__name__}")  # noqa: TRY004 - a file's content is a value
    words: list[str] = []
    for name, value in content.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *map(str, values)]
    return words


def parse(
    argv: Sequence[str], *, name: str = "unlearn", description: str | None = __doc__, epilog: str = _EXAMPLES
) -> tuple[UnlearnCommand, UnlearnArguments]:
    """Parse the flags of ``efface <name>``, those of ``--config`` first.

    Raises:
        ValueError: a flag that is not known.
    """
    words = list(argv)
    if "--config" in words:
        at = words.index("--config")
        if at + 1 == len(words):
            raise ValueError("--config: expected the path of a YAML file, got nothing")
        words = [*_config_flags(words[at + 1]), *words[:at], *words[at + 2 :]]
    parser = HfArgumentParser(
        [UnlearnCommand, UnlearnArguments],  # type: ignore[list-item]
        prog=f"efface {name}",
        description=description,
        epilog=epilog,
    )
    command, args, unknown = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    if unknown:
        raise ValueError(f"unknown arguments {' '.join(unknown)}; see `efface {name} --help`")
    return command, args
