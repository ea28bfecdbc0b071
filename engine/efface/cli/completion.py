"""``efface completion``: a script with which a shell completes commands, flags, their values and files."""

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
        "Prints a script that completes efface's commands, flags and their values.",
        _EXAMPLES,
    )
    flags.add_argument("shell", choices=shtab.SUPPORTED_SHELLS)
    return flags


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    options = parser().parse_args(argv)
    whole = argparse.ArgumentParser(prog="efface")
    commands = whole.add_subparsers()
    for name, (module, summary) in COMMANDS.items():
        flags: FlagParser = importlib.import_module(module).parser()
        flags.show_all()
        # A parent of its own class would want what it was made of; its flags are all that counts here.
        commands.add_parser(name, help=summary, parents=[_completing(flags)], add_help=False)
    print(shtab.complete(whole, options.shell))
    return 0


def _completing(flags: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Say of each flag what its value is."""
    for action in flags._actions:  # noqa: SLF001 - argparse has no other way to see them
        if action.dest == "recipe":
            action.choices = list(known_recipes())
        elif action.dest in _FOLDERS:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif action.dest in _FILES or action.type is Path:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    return flags
