"""The flags of ``efface unlearn``, which are also the flags of a recipe."""

from dataclasses import dataclass, field

import yaml

from efface.errors import reading
from efface.objectives import Objective, get_objective, known_objectives


@dataclass
class UnlearnCommand:
    """The flags of ``efface unlearn``, in addition to those of ``UnlearnArguments``."""

    model: str = field(metadata={"help": "checkpoint folder or Hub name"})
    forget: str = field(
        metadata={"help": "what to forget: a file, or a Hub data set (name[:config[:split]]); JSON, CSV or Parquet"}
    )
    retain: str | None = field(default=None, metadata={"help": "what to keep, as --forget"})
    forget_filter: list[str] | None = field(
        default=None,
        metadata={
            "help": "rows to forget: column=value[,value] or column!=value[,value]; a row must meet all conditions; "
            "values are compared as text; put a value with commas in double quotes"
        },
    )
    retain_filter: list[str] | None = field(default=None, metadata={"help": "rows to keep, as --forget-filter"})
    objective: str = field(default="npo", metadata={"help": f"one of {', '.join(known_objectives())}"})
    beta: float | None = field(
        default=None,
        metadata={"help": "inverse temperature (npo, simnpo, dpo), shift (undial), power (wga)"},
    )
    delta: float | None = field(default=None, metadata={"help": "reward margin of SimNPO"})
    gamma: float | None = field(default=None, metadata={"help": "weight of the forget term"})
    alpha: float | None = field(default=None, metadata={"help": "weight of the retain term"})
    retain_loss_type: str | None = field(default=None, metadata={"help": "NLL or KL; for rmu also EMBED_DIFF"})
    objective_options: list[str] | None = field(
        default=None, metadata={"help": "other parameters of the objective: name=value [name=value ...]"}
    )
    reference: str = field(
        default="auto",
        metadata={
            "help": "cached, live, adapter or auto; adapter: the model without its adapter; auto: cached if possible"
        },
    )
    reference_model: str | None = field(
        default=None, metadata={"help": "checkpoint of the reference (default: --model before training)"}
    )
    reference_revision: str = field(default="main", metadata={"help": "revision of --reference-model"})
    reference_device: str | None = field(
        default=None,
        metadata={"help": "device of a live reference, such as cuda:1; default: that of the trained model"},
    )
    reference_8bit: bool = field(
        default=False, metadata={"help": "load the reference in 8 bits with bitsandbytes, except its head"}
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
    lora_r: int | None = field(
        default=None,
        metadata={
            "help": "rank: train and save a LoRA adapter (needs peft); if --model is an adapter, train a second "
            "one, and save both as one"
        },
    )
    lora_alpha: float | None = field(
        default=None, metadata={"help": "the adapter is scaled by alpha / r; default: 2 r"}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout on the input of the adapter"})
    lora_target: list[str] | None = field(
        default=None, metadata={"help": "names of layers to adapt; default: every linear layer except the head"}
    )
    merge_adapter: bool = field(default=False, metadata={"help": "save the model with the adapter merged into it"})
    overwrite: bool = field(
        default=False,
        metadata={
            "help": "write into an output folder that is not empty, and remove the old run's files when the new model "
            "is complete; an unfinished run of the same command still continues"
        },
    )

    recipe: str | None = field(
        default=None,
        metadata={"help": "name from `efface recipes`, or a YAML file; flags of the command line override it"},
    )
    data: str | None = field(
        default=None,
        metadata={"help": "folder with the recipe's data sets as files; forget10.json for locuslab/TOFU:forget10"},
    )
    scale: str | None = field(
        default=None,
        metadata={
            "help": "tiny or smoke: run the recipe with small models on a CPU; takes minutes or seconds; trains the "
            "models on made-up data or on TOFU's files in --data, with the architecture of the recipe"
        },
    )
    retain_log: str | None = field(
        default=None,
        metadata={"help": "evaluation log of a model trained without the forget set; for the forget quality"},
    )
    evaluate: bool = field(default=True, metadata={"help": "evaluate the result with the recipe's benchmark"})
    dry_run: bool = field(
        default=False, metadata={"help": "show the settings, steps, tokens and memory of the run; train nothing"}
    )
    json: bool = field(default=False, metadata={"help": "print --dry-run as JSON"})

    def make_objective(self) -> Objective:
        """Return the objective with the given parameters; the others have the defaults of the objective.

        Raises:
            ValueError: an unknown objective or parameter, or a value that YAML cannot read.
        """
        named = ("beta", "delta", "gamma", "alpha", "retain_loss_type")
        given = {name: getattr(self, name) for name in named if getattr(self, name) is not None}
        for option in self.objective_options or []:
            name, equals, value = option.partition("=")
            if not equals:
                raise ValueError(f"--objective-options: expected name=value, got {option!r}")
            with reading(f"--objective-options {name}", "a YAML value", "correct it"):
                given[name] = yaml.safe_load(value)
        return get_objective(self.objective, **given)
