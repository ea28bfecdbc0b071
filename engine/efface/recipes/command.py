"""What ``efface unlearn`` takes, and with it a recipe."""

from dataclasses import dataclass, field

import yaml

from efface.errors import reading
from efface.objectives import Objective, get_objective, known_objectives


@dataclass
class UnlearnCommand:
    """What ``efface unlearn`` takes beside ``UnlearnArguments``."""

    model: str = field(metadata={"help": "checkpoint folder or Hub name"})
    forget: str = field(
        metadata={"help": "what to forget: a file, or a Hub data set (name[:config[:split]]); JSON, CSV or Parquet"}
    )
    retain: str | None = field(default=None, metadata={"help": "what to keep, likewise"})
    forget_filter: list[str] | None = field(
        default=None,
        metadata={
            "help": "rows to forget: column=value[,value] or column!=value[,value]; a row must meet all; values are "
            "compared as written, one with commas in double quotes"
        },
    )
    retain_filter: list[str] | None = field(default=None, metadata={"help": "rows to keep, likewise"})
    objective: str = field(default="npo", metadata={"help": f"one of {', '.join(known_objectives())}"})
    beta: float | None = field(
        default=None,
        metadata={"help": "inverse temperature, shift or power; of npo, simnpo, dpo; of undial; of wga"},
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
        metadata={"help": "cached, live, adapter or auto; adapter: of --lora-r, off; auto: cached where that will do"},
    )
    reference_model: str | None = field(default=None, metadata={"help": "default: --model as it is before training"})
    reference_revision: str = field(default="main", metadata={"help": "revision of --reference-model"})
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
    dtype: str = field(default="auto", metadata={"help": "of the loaded weights: auto, float32, bfloat16, float16"})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "run code that comes with the checkpoint; read it before"}
    )
    tokenizer: str | None = field(default=None, metadata={"help": "folder or Hub name; default: that of --model"})
    lora_r: int | None = field(
        default=None,
        metadata={
            "help": "rank: train a LoRA adapter, and write that (needs peft); on a model that is an "
            "adapter, a second one, and write both as one"
        },
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

    recipe: str | None = field(
        default=None,
        metadata={"help": "a name of `efface recipes`, or a YAML file; its flags hold unless given here"},
    )
    data: str | None = field(
        default=None,
        metadata={"help": "folder of the recipe's data sets as files; forget10.json for locuslab/TOFU:forget10"},
    )
    scale: str | None = field(
        default=None,
        metadata={
            "help": "tiny or smoke: the recipe end to end on a CPU; with small models of its architecture taught on "
            "the spot on its own data (--data: a folder with TOFU's files), and evaluated, in minutes or in seconds"
        },
    )
    retain_log: str | None = field(
        default=None,
        metadata={"help": "log of a model that never saw the forget set; for the recipe's forget quality"},
    )
    evaluate: bool = field(default=True, metadata={"help": "evaluate the result as the recipe says"})
    dry_run: bool = field(
        default=False, metadata={"help": "say what the run would be, its steps, tokens and memory; load nothing"}
    )
    json: bool = field(default=False, metadata={"help": "--dry-run as JSON"})

    def make_objective(self) -> Objective:
        """Return the objective with the parameters that were given."""
        named = ("beta", "delta", "gamma", "alpha", "retain_loss_type")
        given = {name: getattr(self, name) for name in named if getattr(self, name) is not None}
        for option in self.objective_options or []:
            name, equals, value = option.partition("=")
            if not equals:
                raise ValueError(f"--objective-options: expected name=value, got {option!r}")
            with reading(f"--objective-options {name}", "a value as YAML writes it", "correct it there"):
                given[name] = yaml.safe_load(value)
        return get_objective(self.objective, **given)
