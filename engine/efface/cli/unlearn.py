"""``efface unlearn``: make a checkpoint forget a data set."""

from collections.abc import Sequence

from efface.cli.flags import parse, unlearn_parser, with_config
from efface.cli.training import unlearn
from efface.recipes.flags import taken

parser = unlearn_parser


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    scale, words = taken(with_config(argv), "scale", "tiny or smoke")
    if scale is not None:
        from efface.cli.tiny import run_at

        return run_at(scale, words)
    return unlearn(*parse(argv), argv)
