"""``efface completion``: print a shell script that completes commands, flags, their values and file names."""

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

import shtab

from efface.cli.main import COMMANDS
from efface.flags import FlagParser
from efface.recipes import known_recipes

_EXAMPLES = """
examples:
  efface completion bash > ~/.local/share/bash-completion/completions/efface
  efface completion zsh > "${fpath[1]}/_efface"
"""
_FILES = {"config", "data", "forget", "retain", "retain_log", "holdout", "refusal_file", "markdown", "json_file"}
_FOLDERS = {"model", "full", "retain_model", "reference_model", "tokenizer", "output_dir", "folders"}


def parser() -> FlagParser:
    """Return the parser of the command's flags."""
    flags = FlagParser(
        "completion",
        "Prints a shell script that completes the commands of efface, their flags and the values of flags.",
        _EXAMPLES,
    )
    flags.add_argument("shell", choices=list(shtab.SUPPORTED_SHELLS))
    return flags


def run(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    options = parser().parse_args(argv)
    root = argparse.ArgumentParser(prog="efface")
    commands = root.add_subparsers()
    for name, (module, summary) in COMMANDS.items():
        flags: FlagParser = importlib.import_module(module).parser()
        flags.show_all()
        # ``root`` is not a FlagParser, because add_parser() would construct FlagParsers without their command.
        commands.add_parser(name, help=summary, parents=[_completing(flags)], add_help=False)
    print(shtab.complete(root, options.shell))
    return 0


def _completing(flags: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Set the choices or the kind of path that complete each flag."""
    for action in flags._actions:  # noqa: SLF001 - argparse has no public list of actions
        if action.dest == "recipe":
            action.choices = list(known_recipes())
        elif action.choices is not None:
            action.choices = list(action.choices)  # shtab reads choices[0]; in transformers 4 some are dict keys
        elif action.dest in _FOLDERS:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif action.dest in _FILES or action.type is Path:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    return flags
