"""The flags of every command: written with hyphens, read with underscores too; and flags as mappings and as words."""

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
# Other spellings of flags: transformers' own, and that of efface 0.1.
_SPELLINGS = {"--output-dir": "--output", "--out": "--output"}
_LARGEST = (1 << 63) - 1
_SEEDS = 1 << 32  # as many as NumPy's generators have
# YAML reads their "no" as False.
_NO = {"save_schedule", "save_strategy", "eval_strategy", "logging_strategy"}


def hyphens(name: str) -> str:
    """Return ``retain_log`` as it is written after two hyphens: ``retain-log``."""
    return name.replace("_", "-")


def did_you_mean(
    name: object, known: Iterable[str], otherwise: str = "", *, cutoff: float = 0.6, before: str = ""
) -> str:
    """Return the end of a message about a name that is not known: the nearest one that is, else what is said.

    What stands ``before`` every name is shown, and not compared.
    """
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=cutoff)
    return f"; did you mean {before + near[0]!r}?" if near else otherwise


def positive(text: str) -> int:
    """Return the whole number from 1 that a flag's value is: a ``type`` of argparse.

    Raises:
        ArgumentTypeError: it is none.
    """
    with suppress(ValueError):
        if (number := int(text)) >= 1:
            return number
    raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")


class FlagParser(argparse.ArgumentParser):
    """The parser of a command.

    Flags are declared and shown with hyphens, and whole names alone are taken: a recipe's settings give way to what is
    named. Wrong use raises ValueError. ``--help-all`` shows what ``--help`` leaves out (``shorten``, ``hide``).

    Args:
        command: its name.
        description: what it does, in a sentence or two.
        examples: the end of its help, kept line by line.
        beside: of the command whose flags it takes beside its own, which ``--help-all`` then shows too.
        partial: whether ``--help`` leaves something out.
        options: of ``argparse.ArgumentParser``.
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
        """Add a flag as argparse does; one of several values may be given several times and keeps them all."""
        if options.get("nargs") == "+" and names[0].startswith("-") and options.get("default") is None:
            options.setdefault("action", "extend")
        return super().add_argument(*names, **options)

    def shorten(self, action: argparse.Action, text: str = argparse.SUPPRESS) -> None:
        """Say less of a flag in ``--help`` than in ``--help-all``, or nothing."""
        self._whole.setdefault(action, action.help)
        action.help = text

    def hide(self, *names: str) -> None:
        """Leave flags out of ``--help``."""
        for action in self._actions:
            if action.dest in names:
                self.shorten(action)

    def show_all(self) -> None:
        """Say all of every flag."""
        for action, text in self._whole.items():
            action.help = text
        self._whole = {}

    def format_help(self) -> str:
        """Return the help; its usage names what has to be given."""
        if self.usage is None:
            needed = [action for action in self._actions if action.required or not action.option_strings]
            formatter = self._get_formatter()
            formatter.add_usage(None, needed, [])
            words = formatter.format_help().removeprefix("usage: ").split()
            self.usage = " ".join([*words, "[flags]"]).replace("%", "%%")
        return super().format_help()

    def format_help_all(self) -> str:
        """Return the help with every flag."""
        self.show_all()
        return self.format_help() + ("" if self._beside is None else "\n" + self._beside.format_help_all())

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """See ``argparse``; underscores in the name of a flag are hyphens."""
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([self.written(word) for word in words], namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """See ``argparse``; a flag that is not known raises ValueError too."""
        values, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = next((word.partition("=")[0] for word in unknown if word.startswith("--")), "")
            known = [option[2:] for option in self.option_names()]
            hint = did_you_mean(hyphens(name[2:]), known, f"; see `{self.prog} --help`", before="--")
            raise ValueError(f"unknown arguments {' '.join(unknown)}{hint}")
        return values

    def given(self, words: Sequence[str]) -> dict[str, Any]:
        """Return the values that the words give, by name; of flags without a default, what was not given is missing."""
        values: dict[str, Any] = vars(self.parse_args(words))
        return values

    def option_names(self) -> list[str]:
        """Return all flags as they are written."""
        return [name for name in self._option_string_actions if name.startswith("--")]

    def error(self, message: str) -> NoReturn:
        """Raise where argparse would print its usage and end the process."""
        raise ValueError(message)

    def _print_message(self, message: str, file: Any = None) -> None:
        """Write, and raise OSError where argparse would end as if it had: on a full disk."""
        if message:
            print(message, end="", file=file)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """Refuse what no flag means, and what no code that is not Python's can count with."""
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
        """Return a word of a command line with the name of a flag as it was declared."""
        name, equals, value = word.partition("=")
        declared, known = hyphens(name), self._option_string_actions
        if declared not in known:
            declared = _SPELLINGS.get(declared, declared)
        return f"{declared}{equals}{value}" if name.startswith("--") and declared in known else word


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of examples, fills a description, and writes ``FILTER ...`` for one value or more."""

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
    """Return a flag's value out of a file as the words that say it on a command line; None as none."""
    if isinstance(value, (list, tuple)):
        return list(map(str, value))
    if isinstance(value, Mapping):
        return [json.dumps(value)]
    if value is False and name in _NO:
        return ["no"]
    return [] if value is None else [str(value)]


def flag_words(flags: Mapping[str, Any]) -> list[str]:
    """Return ``{"beta": 0.1, "forget_filter": ["a=1", "b=2"]}`` as the words of a command line; None is left out."""
    words: list[str] = []
    for name, value in flags.items():
        said = texts(name, value)
        if isinstance(value, (list, tuple)):
            words += [f"--{hyphens(name)}", *said]
        elif said:
            words.append(f"--{hyphens(name)}={said[0]}")  # one word, so that a value may begin with a dash
    return words


def given_names(words: Sequence[str]) -> set[str]:
    """Return the names of the flags among the words of a command line, with underscores."""
    return {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in words if word.startswith("--")}
