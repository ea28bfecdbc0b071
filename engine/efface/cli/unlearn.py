"""``efface unlearn``: make a checkpoint forget a data set."""

from collections.abc import Sequence

from efface.cli.training import unlearn
from efface.flags import flag_words
from efface.recipes.flags import SettingsParser
from efface.recipes.settings import unlearn_parser, unlearn_settings, with_config

_EXAMPLES = """
examples:
  efface unlearn --recipe npo-tofu-forget10-llama-3.2-1b --output-dir out
  efface unlearn --recipe npo-tofu-forget10-llama-3.2-1b --data tofu/ --learning-rate 2e-5 --dry-run
  efface unlearn --recipe npo-tofu-forget10-llama-3.2-1b --data tofu/ --scale tiny --output-dir tiny

  efface unlearn --model ./llama --forget forget10.json --retain retain90.json --objective npo --output-dir out
  efface unlearn --config npo.yaml --learning-rate 2e-5
  efface unlearn --model ./llama --forget fame.csv --forget-filter topic_id=3 --retain fame.csv \\
      --retain-filter 'topic_id!=3' --objective graddiff --pairs-per-step 32 --output-dir out

  efface unlearn --model ./llama --forget forget10.json --retain retain90.json --objective npo --output-dir out \\
      --lora-r 8 --reference adapter

  torchrun --nproc-per-node 8 -m efface unlearn --config npo.yaml

A run that was stopped continues from its newest checkpoint when the same command is given again.
Every flag of transformers.TrainingArguments works: --help-all. Flags on the command line win over those of --config,
and these over those of --recipe. Hyphens and underscores in names mean the same.
"""


def parser() -> SettingsParser:
    """Return the parser of the command's flags."""
    return unlearn_parser("unlearn", __doc__, _EXAMPLES)


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    flags = parser()
    given = flags.given(argv)
    values = with_config(given, flags)
    if (scale := values.pop("scale", None)) is not None:
        from efface.cli.tiny import run_at

        return run_at(scale, flag_words(values))
    return unlearn(*unlearn_settings(given, flags), argv)
