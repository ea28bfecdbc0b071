"""``efface unlearn``: train a checkpoint to forget a data set."""

from collections.abc import Sequence

from efface.cli.training import unlearn
from efface.flags import flag_words
from efface.recipes.flags import SettingsParser
from efface.recipes.settings import unlearn_parser, unlearn_settings, with_config

_EXAMPLES = """
examples:
  efface unlearn --recipe npo-tofu-forget10-llama-3.2-1b --data tofu/ --dry-run
  efface unlearn --recipe tofu-npo --data tofu/ --scale tiny --output tiny
  efface unlearn --model ./llama --forget f.json --retain r.json --output out
  efface unlearn --config npo.yaml --learning-rate 2e-5

Run a stopped command again to continue it. --config overrides --recipe, and flags
override both. All flags of transformers.TrainingArguments work.
"""


def parser() -> SettingsParser:
    """Return the parser of the command's flags."""
    return unlearn_parser(
        "unlearn",
        "Trains a checkpoint to forget one data set and retain another one, and saves the model.",
        _EXAMPLES,
    )


def run(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    flags = parser()
    given = flags.given(argv)
    values = with_config(given, flags)
    if (scale := values.pop("scale", None)) is not None:
        from efface.cli.tiny import run_at

        return run_at(scale, flag_words(values))
    return unlearn(*unlearn_settings(given, flags), argv)
