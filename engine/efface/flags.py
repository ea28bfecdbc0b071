"""``FlagParser``, the argument parser of every command, and conversion of flags to and from command-line words.

Flags are written with hyphens (``--retain-log``); underscores in flag names are accepted too.
"""

import argparse
import difflib
import json
import math
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NoReturn

_WIDTH = 100
# Alternative spellings: that of transformers, and that of efface 0.1.
_SPELLINGS = {"--output-dir": "--output", "--out": "--output"}
_LARGEST = (1 << 63) - 1
_SEEDS = 1 << 32  # NumPy's generators take seeds below this
# Flags with a value "no", which YAML reads as False.
_NO = {"save_schedule", "save_strategy", "eval_strategy", "logging_strategy"}


def hyphens(name: str) -> str:
    """Return a flag name with hyphens: ``retain-log`` for ``retain_log``."""
    return name.replace("_", "-")


def did_you_mean(
    name: object, known: Iterable[str], otherwise: str = "", *, cutoff: float = 0.6, before: str = ""
) -> str:
    """Return the end of an error message about an unknown name: "; did you mean ...?" if a known name is similar.

    Args:
        name: the unknown name.
        known: the names to compare with.
        otherwise: returned if no known name is similar.
        cutoff: minimum similarity, as in ``difflib.get_close_matches``.
        before: prefix of the suggested name in the message, such as "--"; not compared.
    """
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=cutoff)
    return f"; did you mean {before + near[0]!r}?" if near else otherwise


def positive(text: str) -> int:
    """Return a flag's value as an integer of at least 1; for use as ``type`` of an argparse argument.

    Raises:
        ArgumentTypeError: the value is not an integer, or is less than 1.
    """
    with suppress(ValueError):
        if (number := int(text)) >= 1:
            return number
    raise argparse.ArgumentTypeError(f"expected a whole number >= 1, got {text!r}")


class FlagParser(argparse.ArgumentParser):
    """The argument parser of one command.

    Flags are declared and shown with hyphens. Abbreviations of flag names are not accepted: flags override a recipe's
    settings by name, so their names must be exact. Wrong use raises ValueError. ``--help-all`` also shows what
    ``shorten`` and ``hide`` removed from ``--help``.

    Args:
        command: name of the command.
        description: what the command does, in a sentence or two.
        examples: end of the help text; its line breaks are kept.
        beside: parser of another command whose flags this command also accepts; ``--help-all`` shows them too.
        partial: whether ``--help`` leaves flags out; if so, it lists ``--help-all``.
        options: passed to ``argparse.ArgumentParser``.
    """

    def __init__(
        self,
        command: str,
        description: str | None,
        examples: str = "",
        *,
        beside: "FlagParser | None" = None,
        partial: bool = False,
        **options: Any,
    ) -> None:
        self._whole: dict[argparse.Action, str | None] = {}
        self._beside = beside
        super().__init__(
            prog=f"efface {command}",
            description=description,
            epilog=examples,
            formatter_class=_Formatter,
            allow_abbrev=False,
            **options,
        )
        said = "show all flags and exit"
        whole = self.add_argument("--help-all", nargs=0, action=_HelpAll, default=argparse.SUPPRESS, help=said)
        if not partial:
            self.shorten(whole)

    def add_argument(self, *names: Any, **options: Any) -> Any:
        """Add a flag as in argparse; a flag with ``nargs="+"`` can be repeated and collects all values."""
        if options.get("nargs") == "+" and names[0].startswith("-") and options.get("default") is None:
            options.setdefault("action", "extend")
        return super().add_argument(*names, **options)

    def shorten(self, action: argparse.Action, text: str = argparse.SUPPRESS) -> None:
        """Set a shorter help text for ``--help``, or hide the flag there; ``--help-all`` keeps the full text."""
        self._whole.setdefault(action, action.help)
        action.help = text

    def hide(self, *names: str) -> None:
        """Hide flags from ``--help``, by destination name."""
        for action in self._actions:
            if action.dest in names:
                self.shorten(action)

    def show_all(self) -> None:
        """Restore the full help text of every flag."""
        for action, text in self._whole.items():
            action.help = text
        self._whole = {}

    def format_help(self) -> str:
        """Return the help text; the usage line contains only required flags and positional arguments."""
        if self.usage is None:
            needed = [action for action in self._actions if action.required or not action.option_strings]
            formatter = self._get_formatter()
            formatter.add_usage(None, needed, [])
            words = formatter.format_help().removeprefix("usage: ").split()
            self.usage = " ".join([*words, "[flags]"]).replace("%", "%%")
        return super().format_help()

    def format_help_all(self) -> str:
        """Return the help text with every flag."""
        self.show_all()
        return self.format_help() + ("" if self._beside is None else "\n" + self._beside.format_help_all())

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As ``ArgumentParser.parse_known_args``, with underscores accepted in flag names."""
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([self.written(word) for word in words], namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As ``ArgumentParser.parse_args``; raise ValueError for an unknown flag."""
        values, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = next((word.partition("=")[0] for word in unknown if word.startswith("--")), "")
            known = [option[2:] for option in self.option_names()]
            hint = did_you_mean(hyphens(name[2:]), known, f"; see `{self.prog} --help`", before="--")
            raise ValueError(f"unknown arguments {' '.join(unknown)}{hint}")
        return values

    def given(self, words: Sequence[str]) -> dict[str, Any]:
        """Parse ``words`` and return the values by name.

        A flag that was not given is absent if its default is ``argparse.SUPPRESS``.
        """
        values: dict[str, Any] = vars(self.parse_args(words))
        return values

    def option_names(self) -> list[str]:
        """Return the names of all flags, with their leading hyphens."""
        return [name for name in self._option_string_actions if name.startswith("--")]

    def error(self, message: str) -> NoReturn:
        """Raise ValueError; argparse would print the usage and exit."""
        raise ValueError(message)

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print a message, and let OSError propagate, for example on a full disk; argparse would ignore it."""
        if message:
            print(message, end="", file=file)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """Convert a value; reject an empty output path, a seed out of range, NaN, and integers beyond int64."""
        value = super()._get_value(action, arg_string)
        if "--output" in action.option_strings and not arg_string:
            raise argparse.ArgumentError(action, "expected a path, got ''")
        if action.dest == "seed" and not 0 <= value < _SEEDS:
            raise argparse.ArgumentError(action, f"expected 0 .. {_SEEDS - 1}, got {arg_string!r}")
        if isinstance(value, float) and math.isnan(value):
            raise argparse.ArgumentError(action, f"expected a number, got {arg_string!r}")
        if isinstance(value, int) and not -_LARGEST <= value <= _LARGEST:
            raise argparse.ArgumentError(action, f"expected at most {_LARGEST}, got {arg_string!r}")
        return value

    def written(self, word: str) -> str:
        """Return a command-line word with its flag name, if it is one, in the declared spelling."""
        name, equals, value = word.partition("=")
        declared, known = hyphens(name), self._option_string_actions
        if declared not in known:
            declared = _SPELLINGS.get(declared, declared)
        return f"{declared}{equals}{value}" if name.startswith("--") and declared in known else word


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Formatter that keeps line breaks of examples, wraps descriptions, and shows ``nargs="+"`` as ``NAME ...``."""

    def __init__(self, prog: str) -> None:
        width = min(shutil.get_terminal_size().columns, _WIDTH + 2) - 2
        super().__init__(prog, max_help_position=min(36, width // 2), width=width)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        kept = super()._fill_text(text, width, indent)
        return kept if "\n" in text else textwrap.fill(kept, width)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        kinds: dict[Any, str] = {int: "N", positive: "N", float: "X"}
        return kinds.get(action.type, action.dest.rpartition("_")[2].upper())

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if action.nargs == "+" and not isinstance(action.metavar, tuple):
            return f"{self._metavar_formatter(action, default_metavar)(1)[0]} ..."
        return super()._format_args(action, default_metavar)


class _HelpAll(argparse.Action):
    def __call__(self, parser: Any, *_: Any) -> None:
        print(parser.format_help_all())
        parser.exit()


def texts(name: str, value: Any) -> list[str]:
    """Return a flag's value from a file as command-line words; None gives an empty list."""
    if isinstance(value, (list, tuple)):
        return list(map(str, value))
    if isinstance(value, Mapping):
        return [json.dumps(value)]
    if value is False and name in _NO:
        return ["no"]
    return [] if value is None else [str(value)]


def flag_words(flags: Mapping[str, Any]) -> list[str]:
    """Return ``{"beta": 0.1, "forget_filter": ["a=1", "b=2"]}`` as command-line words; values of None are left out."""
    words: list[str] = []
    for name, value in flags.items():
        said = texts(name, value)
        if isinstance(value, (list, tuple)):
            words += [f"--{hyphens(name)}", *said]
        elif said:
            words.append(f"--{hyphens(name)}={said[0]}")  # one word, so that a value can begin with a dash
    return words


def given_names(words: Sequence[str]) -> set[str]:
    """Return the names of the flags in command-line words, with underscores."""
    return {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in words if word.startswith("--")}
