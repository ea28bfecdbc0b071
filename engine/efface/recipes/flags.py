"""Parser of flags that are fields of dataclasses, and conversion of values from YAML files to the flags' types."""

import argparse
import dataclasses
import re
from argparse import SUPPRESS
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from efface.flags import FlagParser, did_you_mean, hyphens, texts

T = TypeVar("T")

# Title of a group -> (flags that `--help` shows, further flags that `--help-all` shows).
_GROUPS = {
    "model and data": (
        """model forget retain forget_filter retain_filter data data_filter from_config question_column answer_column
        template max_length""",
        "refusal_file revision dtype alternate_column system_prompt date_string retain_sampling allow_overlap",
    ),
    "objective": (
        "objective beta gamma alpha retain_loss_type objective_options reference reference_model",
        "delta compat reference_revision reference_device reference_8bit reference_cache",
    ),
    "recipe and evaluation": ("recipe scale evaluate retain_log dry_run json", ""),
    "training": (
        """learning_rate num_train_epochs max_steps pairs_per_step token_budget warmup_epochs bf16
        gradient_checkpointing""",
        "share_prefixes warmup_steps weight_decay lr_scheduler_type optim chunk_rows loss_backend token_cache",
    ),
    "LoRA": ("lora_r merge_adapter", "lora_alpha lora_dropout lora_target"),
    "run": (
        "output_dir overwrite save_schedule seed use_cpu push_to_hub",
        "save_strategy hub_model_id revision_per_checkpoint",
    ),
}
_ORDER = {name: place for place, name in enumerate(" ".join(map(" ".join, _GROUPS.values())).split())}
_TITLES = {name: title for title, names in _GROUPS.items() for name in " ".join(names).split()}
_SHOWN = frozenset(name for shown, _ in _GROUPS.values() for name in shown.split())
# Fields whose flag has another name, the same in all commands. The field's name works as a flag too.
_NAMES = {"output_dir": "--output"}
# Help texts of flags of transformers in `--help`; `--help-all` shows those of transformers.
_SHORT = {
    "output_dir": "folder for the model and its checkpoints",
    "bf16": "compute in bfloat16",
    "push_to_hub": "push the model and its checkpoints",
    "hub_model_id": "name on the Hub; default: that of the folder",
    "seed": "random seed",
    "use_cpu": "do not use GPUs",
    "num_train_epochs": "passes over the forget set or the training data",
    "max_steps": "optimizer steps, instead of epochs",
    "learning_rate": "learning rate after the warm-up",
    "lr_scheduler_type": "schedule of the learning rate after the warm-up",
    "warmup_steps": "warm-up steps; below 1, a share of all steps",
    "optim": "optimizer",
    "weight_decay": "weight decay of all weights except biases and norms",
    "gradient_checkpointing": "recompute activations in the backward pass to save memory",
}
_TRANSFORMERS = "transformers.TrainingArguments"
_METAVARS: dict[Any, str] = {int: "N", float: "X", string_to_bool: "BOOL"}
# Expected value in the error of a flag that was given without one.
_EXPECTED = {
    "--config": "the path of a YAML file",
    "--recipe": "a name from `efface recipes`, or the path of a YAML file",
    "--scale": "tiny or smoke",
}


class SettingsParser(FlagParser, HfArgumentParser):
    """The parser of a command whose flags are the fields of dataclasses.

    The parser sets no defaults: a flag that is not given is missing in the result, and the field's default applies.

    Args:
        command: name of the command.
        classes: the dataclasses.
        description: see ``FlagParser``.
        examples: see ``FlagParser``.
        defaults: defaults of the command, which the help shows instead of those of the fields.
        shown: names of the fields that ``--help`` shows.
    """

    def __init__(
        self,
        command: str,
        classes: Sequence[type],
        description: str | None = None,
        examples: str = "",
        defaults: Mapping[str, Any] | None = None,
        shown: Collection[str] = _SHOWN,
    ) -> None:
        self.names = {field.name for cls in classes for field in dataclasses.fields(cls) if field.init}
        self._help_defaults = defaults or {}
        self._shown = shown
        self._required: list[str] = []
        self._groups: dict[str, Any] = {}
        super().__init__(command, description, examples, partial=True, dataclass_types=classes)
        said = "YAML file of flags; flags of the command line override it"
        self.add_argument("--config", metavar="FILE", default=SUPPRESS, help=said)
        needed = "".join(f" {name} {name.strip('-').upper()}" for name in self._required)
        self.usage = f"efface {command} [--config FILE]{needed} [flags]"
        titles = list(_GROUPS)
        self._action_groups.sort(key=lambda group: titles.index(group.title) if group.title in titles else -1)
        self._action_groups.sort(key=lambda group: group.title == _TRANSFORMERS)
        for title in self._groups.keys() - {_TRANSFORMERS}:
            self._groups[title]._group_actions.sort(key=lambda action: _ORDER[action.dest])  # noqa: SLF001 - argparse cannot reorder flags

    def add_argument(self, *names: Any, **options: Any) -> Any:
        """Add a flag. The flag of a field goes into its group of the help."""
        flags = list(dict.fromkeys(map(hyphens, names)))
        name = options.get("dest") or flags[0].lstrip("-").replace("-", "_")
        if name not in self.names:
            return super().add_argument(*names, **options)
        if name in _NAMES:
            flags, options["dest"] = [_NAMES[name]], name
        if options.pop("required", False):
            self._required.append(flags[0])
        default = self._help_defaults.get(name, options.get("default"))
        options["default"] = SUPPRESS
        said = re.sub(r"--\w+", lambda found: hyphens(found[0]), options.pop("help", ""))
        at = ""
        if default not in (None, "", False, True, -1) and "default" not in said:
            at = f" (default: {getattr(default, 'value', default)})".replace("%", "%%")
        if options.get("nargs") == "+":
            options["action"] = "extend"
        negation, choices = options.get("action") == "store_false", options.get("choices", ())
        if not negation and (not choices or len("".join(map(str, choices))) > 30):
            word = "NAME" if choices else name.rpartition("_")[2].upper()
            options["metavar"] = _METAVARS.get(options.get("type"), word)
        title = _TITLES.get(name, _TRANSFORMERS)
        if title not in self._groups:
            self._groups[title] = self.add_argument_group(title)
        action = self._groups[title].add_argument(*flags, help=f"{said}{at}", **options)
        short = f"{_SHORT.get(name) or said.partition('; ')[0]}{at}"
        self.shorten(action, short if name in self._shown and not negation else SUPPRESS)
        return action

    def error(self, message: str) -> NoReturn:
        """Raise ValueError with the message of argparse, or with the expected value of a flag that lacks one."""
        flag, _, rest = message.removeprefix("argument ").partition(": ")
        if rest == "expected one argument" and flag in _EXPECTED:
            message = f"{flag}: expected {_EXPECTED[flag]}, got nothing"
        super().error(message)

    def converted(self, flags: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Convert values of flags from a YAML file to those that the command line would give, by field name.

        ``2e-5``, which YAML reads as text, becomes a number. ``no``, which YAML reads as False, becomes the word again
        for flags such as ``save_strategy``. A mapping becomes JSON text. Flags with the value None are left out.

        Args:
            flags: name of a flag, with hyphens or underscores -> value.
            where: start of error messages, such as the path of the file.

        Raises:
            ValueError: a flag is unknown, is given in two spellings, or has a value of the wrong type.
        """
        values: dict[str, Any] = {}
        for name, value in flags.items():
            action = self._option_string_actions.get(self.written(f"--{name}"))
            if action is None or action.dest not in self.names:
                hint = did_you_mean(str(name).replace("-", "_"), self.names, f"; see `{self.prog} --help`")
                raise ValueError(f"{where}: expected flags of the command, got {name!r}{hint}")
            if action.dest in values:
                raise ValueError(f"{where}: expected each flag once, got {action.dest!r} in two spellings")
            try:
                values[action.dest] = self._converted(action, value)
            except (argparse.ArgumentError, argparse.ArgumentTypeError) as error:
                raise ValueError(f"{where}: {error}") from error
        return {name: value for name, value in values.items() if value is not None}

    def _converted(self, action: argparse.Action, value: Any) -> Any:
        if value is None:
            return None
        said = texts(action.dest, value)
        if len(said) != 1 and (action.nargs != "+" or not said):
            raise argparse.ArgumentError(action, f"expected {'values' if action.nargs else 'one value'}, got {value!r}")
        if action.nargs == 0:  # --no-...
            return action.const if string_to_bool(said[0]) else not action.const
        values = [self._get_value(action, text) for text in said]
        for each in values:
            self._check_value(action, each)
        return values if action.nargs == "+" else values[0]

    def check_required(self, values: Mapping[str, Any], where: str = "") -> None:
        """Raise ValueError, with a message that starts with ``where``, if a required value is missing."""
        missing = [flag for flag in self._required if flag.strip("-").replace("-", "_") not in values]
        if missing:
            raise ValueError(f"{where}the following arguments are required: {', '.join(missing)}")


def made(cls: type[T], values: Mapping[str, Any]) -> T:
    """Return an instance of a dataclass from the values of its fields. Other values are ignored."""
    return cls(**{field.name: values[field.name] for field in dataclasses.fields(cls) if field.name in values})  # type: ignore[arg-type]
