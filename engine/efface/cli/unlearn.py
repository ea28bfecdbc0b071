"""``efface unlearn``: make a checkpoint forget a data set."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, PrinterCallback, set_seed

from efface.cli.output import check_output, written_whole
from efface.cli.progress import ProgressBar
from efface.hf.adapters import add_lora, check_mergeable, merged
from efface.hf.arguments import UnlearnArguments
from efface.hf.trainer import UnlearnTrainer
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
    revision: str = field(default="main", metadata={"help": "revision of the Hub checkpoint"})
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
    overwrite: bool = field(default=False, metadata={"help": "write into an output folder that is not empty"})

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


def _load_model(name: str, command: UnlearnCommand) -> Any:
    """Load a checkpoint; a path that does not exist must not become a search on the Hub."""
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise FileNotFoundError(f"model folder {name!r} does not exist; check the path")
    return AutoModelForCausalLM.from_pretrained(
        Path(name).expanduser() if Path(name).expanduser().is_dir() else name,
        revision=command.revision,
        dtype=command.dtype,
    )


def _adapted(model: Any, command: UnlearnCommand, seed: int) -> Any:
    """Return the model, with the LoRA adapter that the flags ask for."""
    if command.lora_r is None:
        given = {"alpha": command.lora_alpha, "dropout": command.lora_dropout, "target": command.lora_target}
        unused = [f"--lora_{name}" for name, value in given.items() if value]
        unused += ["--merge_adapter"] if command.merge_adapter else []
        if unused:
            raise ValueError(f"{', '.join(unused)}: expected --lora_r, the rank of the adapter, got none")
        return model
    set_seed(seed)  # the adapter's first weights are drawn
    model = add_lora(
        model,
        r=command.lora_r,
        alpha=command.lora_alpha,
        dropout=command.lora_dropout,
        target=command.lora_target or (),
    )
    if command.merge_adapter:
        check_mergeable(model)
    return model


def make_trainer(
    command: UnlearnCommand, args: UnlearnArguments, objective: Objective, bar: ProgressBar
) -> UnlearnTrainer:
    """Load what the command names; the trainer computes what its reference lacks, and is ready to train."""
    args.disable_tqdm = True
    trainer = UnlearnTrainer(
        _adapted(_load_model(command.model, command), command, args.seed),
        args,
        forget=command.forget,
        retain=command.retain,
        forget_filter=command.forget_filter,
        retain_filter=command.retain_filter,
        objective=objective,
        reference=command.reference,
        # held by nobody else, so that it is freed when its log-probabilities are known
        reference_model=None if command.reference_model is None else _load_model(command.reference_model, command),
        processing_class=AutoTokenizer.from_pretrained(command.model, revision=command.revision),
        callbacks=[bar],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    command, args = parse(argv)
    first = args.process_index == 0  # of the processes of a distributed run, the one that speaks and writes
    console = Console(stderr=True, quiet=not first)
    objective = command.make_objective()
    out = Path(args.output_dir or "trainer_output")
    if first and args.resume_from_checkpoint is None:
        check_output(out, overwrite=command.overwrite)

    bar = ProgressBar(console, f"{objective.name} · {Path(command.model).name}")
    try:
        trainer = make_trainer(command, args, objective, bar)
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    finally:
        bar.close()
    if command.merge_adapter:
        trainer.model = merged(trainer.model)
    with written_whole(out, writes=args.should_save) as partial:
        trainer.save_model(str(partial))
    trainer.save_state()
    console.print(f"wrote {out}")
    if args.world_size > 1:
        # A process that leaves without a word may tear connections that others still read from.
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.end_training()
    return 0
