"""The settings of a run: the command line overrides the ``--config`` file, which overrides the recipe."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.training_args import OptimizerNames

from efface.hf.train.arguments import UnlearnArguments
from efface.recipes.command import UnlearnCommand
from efface.recipes.flags import SettingsParser, made
from efface.recipes.recipe import FLAG_CLASSES, Recipe, load_recipe, local_source, read_yaml, settings_parser
from efface.registry import plain

# Groups of flags that set the same quantity. A flag that the user gives overrides the recipe's flags of its group.
_GROUPS = (
    {"warmup_epochs", "warmup_steps", "warmup_ratio"},
    {"save_schedule", "save_strategy", "save_steps"},
    {"pairs_per_step", "per_device_train_batch_size", "gradient_accumulation_steps"},
    {"num_train_epochs", "max_steps"},
    {"bf16", "fp16"},
    {"refusal_file", "alternate_column"},
)
# Flag -> flags that depend on its value. If the user changes the value, the recipe's dependent flags are ignored.
_DEPENDENT = {
    "objective": {"beta", "delta", "gamma", "alpha", "retain_loss_type", "objective_options"},
    "template": {"system_prompt", "date_string"},
    "model": {"revision"},
    "reference_model": {"reference_revision"},
}
# Flags that require hardware or packages, with a value that requires nothing: a dry run works without them.
_MACHINE_FLAGS: dict[str, Any] = {
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
    """Return a parser of the flags of ``efface unlearn``, for any command. Options are those of ``SettingsParser``."""
    return SettingsParser(command, FLAG_CLASSES, description, examples, **options)


def not_overridden(settings: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a recipe that the given flags do not override.

    A given flag overrides the same setting, settings of the same quantity (``warmup_steps`` overrides
    ``warmup_epochs``), and settings that depend on the changed value: a new objective overrides the parameters of the
    old one, a new template its date.
    """
    gone = set(given).union(*(group for group in _GROUPS if group & given.keys()))
    for name, about in _DEPENDENT.items():
        value, before = given.get(name), settings.get(name)
        if value is not None and before is not None and not _same(name, value, before):
            gone |= about
    return {name: value for name, value in settings.items() if name not in gone}


def _same(name: str, value: Any, other: Any) -> bool:
    """Return whether two values of a flag are equal. Names of objectives ignore case and underscores."""
    if name == "objective":
        return plain(str(value)) == plain(str(other))
    return str(value) == str(other)


def over(settings: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given flags together with the settings that they do not override."""
    return {**not_overridden(settings, given), **given}


def config_settings(path: str, parser: SettingsParser) -> dict[str, Any]:
    """Read a YAML file of flags.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a mapping of known flags to valid values.
    """
    file, where = Path(path), f"config file {path!r}"
    if not file.is_file():
        raise FileNotFoundError(f"{where} does not exist; check the path")
    content = read_yaml(file) or {}
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected `flag: value` lines, got a {type(content).__name__}")  # noqa: TRY004 - invalid content, not a wrong type
    return parser.converted(content, where)


def with_config(given: Mapping[str, Any], parser: SettingsParser) -> dict[str, Any]:
    """Return the flags of the command line together with those of its ``--config`` file that they do not override."""
    rest = {name: value for name, value in given.items() if name != "config"}
    return over(config_settings(given["config"], parser), rest) if "config" in given else rest


def parse(words: Sequence[str], parser: SettingsParser | None = None) -> tuple[UnlearnCommand, UnlearnArguments]:
    """Parse the words of a command line into the settings of a run; see ``unlearn_settings``."""
    parser = parser or settings_parser()
    return unlearn_settings(parser.given(words), parser)


def unlearn_settings(
    given: Mapping[str, Any], parser: SettingsParser | None = None
) -> tuple[UnlearnCommand, UnlearnArguments]:
    """Return the settings of a run from its flags, its ``--config`` file and its recipe.

    With ``dry_run``, the arguments are not checked against this machine; see ``unready_arguments``.

    Args:
        given: name of a field -> value, from the command line.
        parser: the parser of the command; None is that of ``efface unlearn``.

    Raises:
        FileNotFoundError: a recipe, a file or a folder does not exist.
        ValueError: an unknown flag or recipe, a missing required flag, or ``--scale``.
    """
    parser = parser or settings_parser()
    values = with_config(given, parser)
    if (name := values.get("recipe")) is not None:
        recipe = load_recipe(name)
        values = over(parser.converted(recipe.unlearn, f"{recipe.path}: unlearn"), values)
    parser.check_required(values)
    command = made(UnlearnCommand, values)
    if command.scale is not None:
        raise ValueError("--scale: expected `efface unlearn`, got another command; drop it")
    if command.data is not None:
        command.forget = local_source(command.forget, command.data, "--forget")
        if command.retain is not None:
            command.retain = local_source(command.retain, command.data, "--retain")
    return command, unready_arguments(values) if command.dry_run else made(UnlearnArguments, values)


def unready_arguments(values: Mapping[str, Any]) -> UnlearnArguments:
    """Return arguments that are checked for consistency, but not against the hardware and packages of this machine."""
    args = made(UnlearnArguments, {**values, **_MACHINE_FLAGS})
    for name in _MACHINE_FLAGS:
        setattr(args, name, values.get(name, getattr(UnlearnArguments, name)))
    return args


def recipe_of(command: UnlearnCommand) -> Recipe | None:
    """Return the recipe of ``--recipe``, or None."""
    return None if command.recipe is None else load_recipe(command.recipe)
