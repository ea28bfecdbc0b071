"""Flags as data: from a mapping to the words of a command line, and back to typed values."""

import dataclasses
import difflib
import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

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


_NO = {"save_schedule", "save_strategy", "eval_strategy", "logging_strategy"}  # YAML reads their "no" as False


class _Loader(yaml.SafeLoader):
    """Refuses a name that a mapping holds twice, of which YAML's own would take the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names: list[Any] = []
        for key, _ in node.value:
            name = self.construct_object(key)
            if name in names:
                raise yaml.constructor.ConstructorError(None, None, f"found {name!r} twice", key.start_mark)
            names.append(name)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds.

    Raises:
        ValueError: it is no YAML, or holds a name twice.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r}: expected YAML, got something else ({error})") from error


class FlagParser(HfArgumentParser):
    """Raises ValueError where argparse would print its usage and end the process.

    A flag of several values may be given several times; to argparse alone, the last one would be all.
    """

    def add_argument(self, *names: Any, **options: Any) -> Any:
        """See ``argparse``."""
        if options.get("nargs") == "+":
            options.setdefault("action", "extend")
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        """Raise."""
        raise ValueError(message)


def flag_names(*classes: type) -> set[str]:
    """Return the names of the flags that dataclasses of arguments have."""
    return {field.name for cls in classes for field in dataclasses.fields(cls) if field.init}


def flag_words(flags: Mapping[str, Any]) -> list[str]:
    """Return ``{"beta": 0.1, "forget_filter": ["a=1", "b=2"]}`` as the words of a command line; None is left out."""
    words: list[str] = []
    for name, value in flags.items():
        if isinstance(value, (list, tuple)):
            words += [f"--{name}", *map(str, value)]
        elif isinstance(value, Mapping):
            words.append(f"--{name}={json.dumps(value)}")
        elif value is False and name.replace("-", "_") in _NO:
            words.append(f"--{name}=no")
        elif value is not None:
            words.append(f"--{name}={value}")  # one word, so that a value may begin with a dash
    return words


def given_names(words: Sequence[str]) -> set[str]:
    """Return the names of the flags among the words of a command line."""
    return {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in words if word.startswith("--")}


def not_overridden(flags: Mapping[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """Return the flags of a recipe that still hold beside the words of a command line.

    A flag gives way to itself, and to another that says the same thing differently (``warmup_steps`` for
    ``warmup_epochs``). What is said about a value gives way with it: an objective's parameters, a template's date.
    """
    given = given_names(words)
    gone = set(given).union(*(group for group in _GROUPS if group & given))
    for name, about in _ABOUT.items():
        found = (taken(words, spelling, "a value")[0] for spelling in (name, name.replace("_", "-")))
        value, before = next(filter(None, found), None), flags.get(name)
        if value is not None and before is not None and not _same(name, value, before):
            gone |= about
    return {name: value for name, value in flags.items() if name not in gone}


def _same(name: str, value: str, other: Any) -> bool:
    """Whether two values of a flag mean one thing: in an objective's name case and underscores do not matter."""
    if name == "objective":
        return plain(value) == plain(str(other))
    return value == str(other)


def taken(words: Sequence[str], flag: str, what: str) -> tuple[str | None, list[str]]:
    """Return the value of a flag, the last one given, and the words without it; None if it is not there.

    Raises:
        ValueError: a flag without a value; ``what`` says what one is.
    """
    value, rest = None, []
    waiting = iter(words)
    for word in waiting:
        name, equals, after = word.partition("=")
        if name != f"--{flag}":
            rest.append(word)
            continue
        value = after if equals else next(waiting, "")
        if not value or value.startswith("--"):
            raise ValueError(f"--{flag}: expected {what}, got {value or 'nothing'}")
    return value, rest


def check_flags(flags: Mapping[str, Any], classes: Sequence[type], where: str, *, partial: bool = False) -> None:
    """Raise ValueError, which begins with ``where``, unless every flag is one of the classes' and of its type.

    Args:
        flags: by name.
        classes: dataclasses of arguments.
        where: the file and section, for messages.
        partial: flags that a command requires may be missing.
    """
    known = flag_names(*classes)
    for name in flags:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "; see `efface unlearn --help`"
            raise ValueError(f"{where}: expected flags of the command, got {name!r}{hint}")
    parser = FlagParser(classes)  # type: ignore[arg-type]
    if partial:
        for action in parser._actions:  # noqa: SLF001 - argparse has no other way to lift a requirement
            action.required = False
    try:
        parser.parse_args(flag_words(flags))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def typed(parser: FlagParser, words: Sequence[str], name: str) -> Namespace:
    """Return the values of the words.

    Raises:
        ValueError: a flag that is not known, or a value that is not of its type.
    """
    namespace, unknown = parser.parse_known_args(list(words))
    if unknown:
        raise ValueError(f"unknown arguments {' '.join(unknown)}; see `efface {name} --help`")
    return namespace
