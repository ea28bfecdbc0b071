"""The flags of ``efface unlearn``, which other commands about the same run share."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from transformers.training_args import OptimizerNames

from efface.hf.train.arguments import UnlearnArguments
from efface.recipes import Recipe, load_recipe, local_source
from efface.recipes.command import UnlearnCommand
from efface.recipes.flags import FlagParser, flag_words, given_names, not_overridden, read_yaml, taken, typed

_EXAMPLES = """
examples:
  efface unlearn --recipe npo-tofu-forget10-llama-3.2-1b --output_dir out
  efface unlearn --recipe npo-tofu-forget10-llama-3.2-1b --data tofu/ --learning_rate 2e-5 --dry-run
  efface unlearn --recipe npo-tofu-forget10-llama-3.2-1b --data tofu/ --scale tiny --output_dir tiny

  efface unlearn --model ./llama --forget forget10.json --retain retain90.json --objective npo --output_dir out
  efface unlearn --config npo.yaml --learning_rate 2e-5
  efface unlearn --model ./llama --forget fame.csv --forget_filter topic_id=3 --retain fame.csv \\
      --retain_filter 'topic_id!=3' --objective graddiff --pairs_per_step 32 --output_dir out

  efface unlearn --model ./llama --forget forget10.json --retain retain90.json --objective npo --output_dir out \\
      --lora_r 8 --reference adapter

  torchrun --nproc-per-node 8 -m efface unlearn --config npo.yaml

A run that was stopped, however, continues from its newest checkpoint when the same command is given again.
Every flag of transformers.TrainingArguments works. --config reads a YAML file of flags. Flags on the command line win
over those of the file, and these over those of --recipe.
"""

# What asks something of the machine that a dry run does not need, and a value that asks nothing.
_OF_THE_MACHINE: dict[str, Any] = {
    "use_cpu": True,
    "optim": OptimizerNames.ADAMW_TORCH.value,
    "bf16": False,
    "fp16": False,
    "bf16_full_eval": False,
    "fp16_full_eval": False,
    "tf32": None,
    "torch_compile": False,
    "deepspeed": None,
}

T = TypeVar("T")


def config_flags(path: str) -> dict[str, Any]:
    """Read a YAML file of flags.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of something else.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"config file {path!r} does not exist; check the path")
    content = read_yaml(file) or {}
    if not isinstance(content, dict):
        raise ValueError(f"config file {path!r}: expected `flag: value` lines, got a {type(content).__name__}")  # noqa: TRY004 - a file's content is a value
    names = [str(name).replace("-", "_") for name in content]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"config file {path!r}: expected each flag once, got {twice[0]!r} with a hyphen and without")
    return content


def with_config(argv: Sequence[str]) -> list[str]:
    """Return the words of a command line, with the flags of its ``--config`` before them."""
    config, words = taken(argv, "config", "the path of a YAML file")
    if config is None:
        return words
    return [*flag_words(not_overridden(config_flags(config), words)), *words]


def unlearn_parser(name: str = "unlearn", description: str | None = __doc__, epilog: str = _EXAMPLES) -> FlagParser:
    """Return the parser of ``efface <name>``, which takes the flags of ``efface unlearn``."""
    return FlagParser(
        [UnlearnCommand, UnlearnArguments],  # type: ignore[list-item]
        prog=f"efface {name}",
        description=description,
        epilog=epilog,
        allow_abbrev=False,  # what gives way to what is told by whole names
    )


def parse(
    argv: Sequence[str], *, name: str = "unlearn", description: str | None = __doc__, epilog: str = _EXAMPLES
) -> tuple[UnlearnCommand, UnlearnArguments]:
    """Parse the flags of ``efface <name>``: those of ``--recipe`` first, then those of ``--config``.

    Raises:
        FileNotFoundError: a recipe, a file or a folder that does not exist.
        ValueError: a flag that is not known, an unknown recipe.
    """
    words = with_config(argv)
    chosen, _ = taken(words, "recipe", "a name of `efface recipes`, or the path of a YAML file")
    if chosen is not None:
        words = [*flag_words(not_overridden(load_recipe(chosen).unlearn, words)), *words]
    values = typed(unlearn_parser(name, description, epilog), words, name)
    command = part(UnlearnCommand, values)
    if command.scale is not None:
        raise ValueError("--scale: is for `efface unlearn` alone; drop it")
    if command.data is not None:
        command.forget = local_source(command.forget, command.data, "--forget")
        if command.retain is not None:
            command.retain = local_source(command.retain, command.data, "--retain")
    if command.dry_run:
        if name != "unlearn":
            raise ValueError(f"--dry_run: `efface {name}` has none; see `efface unlearn --dry-run`")
        return command, unready_arguments(values)
    return command, part(UnlearnArguments, values)


def part(cls: type[T], values: Namespace) -> T:
    """Return the arguments of one dataclass out of parsed values."""
    return cls(**{field.name: getattr(values, field.name) for field in fields(cls) if field.init})  # type: ignore[arg-type]


def unready_arguments(values: Namespace) -> UnlearnArguments:
    """Return arguments that were checked against one another, but not against this machine and its packages."""
    asked = {name: getattr(values, name) for name in _OF_THE_MACHINE}
    args = part(UnlearnArguments, Namespace(**{**vars(values), **_OF_THE_MACHINE}))
    for name, value in asked.items():
        setattr(args, name, value)
    return args


def recipe_of(command: UnlearnCommand) -> Recipe | None:
    """Return the recipe that a command names."""
    return None if command.recipe is None else load_recipe(command.recipe)


__all__ = ["UnlearnCommand", "given_names", "parse", "part", "recipe_of", "unready_arguments", "with_config"]
