"""The settings of a run: what the command line gives, over its file of flags, over its recipe, as dataclasses."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.training_args import OptimizerNames

from efface.hf.train.arguments import UnlearnArguments
from efface.recipes.command import UnlearnCommand
from efface.recipes.flags import SettingsParser, made
from efface.recipes.recipe import FLAG_CLASSES, Recipe, load_recipe, local_source, read_yaml, settings_parser
from efface.registry import plain

# Flags that say the same thing in several ways: who gives one of a group means it in place of a recipe's others.
_GROUPS = (
    {"warmup_epochs", "warmup_steps", "warmup_ratio"},
    {"save_schedule", "save_strategy", "save_steps"},
    {"pairs_per_step", "per_device_train_batch_size", "gradient_accumulation_steps"},
    {"num_train_epochs", "max_steps"},
    {"bf16", "fp16"},
    {"refusal_file", "alternate_column"},
)
# What is said about another flag's value, and means nothing about another value.
_ABOUT = {
    "objective": {"beta", "delta", "gamma", "alpha", "retain_loss_type", "objective_options"},
    "template": {"system_prompt", "date_string"},
    "model": {"revision"},
    "reference_model": {"reference_revision"},
}
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
    "report_to": "none",
}


def unlearn_parser(
    command: str = "unlearn", description: str | None = None, examples: str = "", **options: Any
) -> SettingsParser:
    """Return the parser of ``efface <command>``, which takes the flags of ``efface unlearn``."""
    return SettingsParser(command, FLAG_CLASSES, description, examples, **options)


def not_overridden(settings: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a recipe that still hold beside those that were given.

    A setting gives way to itself, and to another that says the same thing differently (``warmup_steps`` for
    ``warmup_epochs``). What is said about a value gives way with it: an objective's parameters, a template's date.
    """
    gone = set(given).union(*(group for group in _GROUPS if group & given.keys()))
    for name, about in _ABOUT.items():
        value, before = given.get(name), settings.get(name)
        if value is not None and before is not None and not _same(name, value, before):
            gone |= about
    return {name: value for name, value in settings.items() if name not in gone}


def _same(name: str, value: Any, other: Any) -> bool:
    """Whether two values of a flag mean one thing: in an objective's name case and underscores do not matter."""
    if name == "objective":
        return plain(str(value)) == plain(str(other))
    return str(value) == str(other)


def over(settings: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was given over the settings that still hold beside it."""
    return {**not_overridden(settings, given), **given}


def config_settings(path: str, parser: SettingsParser) -> dict[str, Any]:
    """Read a YAML file of flags.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of something else.
    """
    file, where = Path(path), f"config file {path!r}"
    if not file.is_file():
        raise FileNotFoundError(f"{where} does not exist; check the path")
    content = read_yaml(file) or {}
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected `flag: value` lines, got a {type(content).__name__}")  # noqa: TRY004 - a file's content is a value
    return parser.converted(content, where)


def with_config(given: Mapping[str, Any], parser: SettingsParser) -> dict[str, Any]:
    """Return what was given on the command line, over the file that its ``config`` names."""
    rest = {name: value for name, value in given.items() if name != "config"}
    return over(config_settings(given["config"], parser), rest) if "config" in given else rest


def parse(words: Sequence[str], parser: SettingsParser | None = None) -> tuple[UnlearnCommand, UnlearnArguments]:
    """Return what the words of a command line say; see ``unlearn_settings``."""
    parser = parser or settings_parser()
    return unlearn_settings(parser.given(words), parser)


def unlearn_settings(
    given: Mapping[str, Any], parser: SettingsParser | None = None
) -> tuple[UnlearnCommand, UnlearnArguments]:
    """Return what was given, over the file of flags and the recipe that it names; of a dry run, not checked here.

    Args:
        given: values of flags, by their fields' names.
        parser: that of the command.

    Raises:
        FileNotFoundError: a recipe, a file or a folder that does not exist.
        ValueError: a flag that is not known, an unknown recipe.
    """
    parser = parser or settings_parser()
    values = with_config(given, parser)
    if (name := values.get("recipe")) is not None:
        recipe = load_recipe(name)
        values = over(parser.converted(recipe.unlearn, f"{recipe.path}: unlearn"), values)
    parser.check_required(values)
    command = made(UnlearnCommand, values)
    if command.scale is not None:
        raise ValueError("--scale: is for `efface unlearn` alone; drop it")
    if command.data is not None:
        command.forget = local_source(command.forget, command.data, "--forget")
        if command.retain is not None:
            command.retain = local_source(command.retain, command.data, "--retain")
    return command, unready_arguments(values) if command.dry_run else made(UnlearnArguments, values)


def unready_arguments(values: Mapping[str, Any]) -> UnlearnArguments:
    """Return arguments that were checked against one another, but not against this machine and its packages."""
    args = made(UnlearnArguments, {**values, **_OF_THE_MACHINE})
    for name in _OF_THE_MACHINE:
        setattr(args, name, values.get(name, getattr(UnlearnArguments, name)))
    return args


def recipe_of(command: UnlearnCommand) -> Recipe | None:
    """Return the recipe that a command names."""
    return None if command.recipe is None else load_recipe(command.recipe)
