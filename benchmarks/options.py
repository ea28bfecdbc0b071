"""Options that suites share, and what is said of wrong ones."""

import argparse
from collections.abc import Collection, Sequence


class BadOption(ValueError):  # noqa: N818 - not an error of the program
    """An option of a command line that its parser lets pass."""


def add_without(parser: argparse.ArgumentParser) -> None:
    """Add ``--without TEXT``."""
    parser.add_argument(
        "--without", action="append", default=[], metavar="TEXT", help="leave out providers with TEXT in their name"
    )


def check_without(without: Sequence[str], names: Collection[str]) -> None:
    """Raise ``BadOption`` for a text that is part of no provider's name."""
    for text in without:
        if not any(text in name for name in names):
            listed = ", ".join(map(repr, names))
            raise BadOption(f"--without: expected a part of a provider's name, got {text!r}; they are {listed}")


def left_out(name: str, without: Sequence[str]) -> bool:
    """Whether a text of ``without`` is part of the name."""
    return any(text in name for text in without)
