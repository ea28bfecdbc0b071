"""``efface unlearn --scale``: run a recipe end to end with small models on a CPU."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers.hf_argparser import string_to_bool

from efface.cli.demo import figures_table, teaching_bar
from efface.cli.progress import open_console
from efface.cli.run_folder import RECORD as RUN_RECORD
from efface.cli.training import unlearn
from efface.flags import FlagParser, flag_words, given_names, hyphens
from efface.recipes import load_recipe
from efface.recipes.recipe import settings_parser
from efface.recipes.settings import not_overridden, parse
from efface.simulate.scales import RECORD, TinyRun, run_tiny

_COLUMNS = {
    "forget\nquality": "forget_quality",
    "model\nutility": "model_utility",
    "forget:\nprobability": "forget_Q_A_Prob",
    "ROUGE": "forget_Q_A_ROUGE",
    "truth\nratio": "forget_truth_ratio",
    "retain:\nprobability": "retain_Q_A_Prob",
    "ROUGE ": "retain_Q_A_ROUGE",
}
_REFUSED = {
    "model": "the models are trained as part of the run",
    "forget": "the data come from the recipe; give a folder with TOFU's files as --data",
    "retain": "the data come from the recipe; give a folder with TOFU's files as --data",
    "dry_run": "models and rows are made during the run",
    "retain_log": "the retain model is also trained and evaluated",
}


def unlearn_with(flags: Mapping[str, Any], overrides: Sequence[str], check: bool) -> None:
    """Run ``efface unlearn`` with flags and overrides. A finished run is repeated only with the flag ``overwrite``.

    Args:
        flags: name -> value.
        overrides: words of a command line, which override ``flags``.
        check: only check the flags.

    Raises:
        ValueError: an unknown flag or a value of the wrong type.
    """
    words = [*flag_words(not_overridden(flags, settings_parser().given(overrides))), *overrides]
    parsed = parse(words)
    record = Path(flags["output_dir"], RUN_RECORD)
    finished = record.is_file() and json.loads(record.read_text(encoding="utf-8"))["finished"]
    if not check and (flags["overwrite"] or not finished):
        unlearn(*parsed, words)


def run_at(scale: str, words: Sequence[str]) -> int:
    """Run ``efface unlearn --scale``. Return the exit code.

    Args:
        scale: name of the scale.
        words: the other flags of the command line and of the ``--config`` file.

    Raises:
        FileExistsError: the output folder contains other files.
        ValueError: there is no recipe, or a flag that cannot be used with ``--scale``; and as ``run_tiny``.
    """
    for name in _REFUSED.keys() & given_names(words):
        raise ValueError(f"--scale {scale}: expected no --{hyphens(name)}, because {_REFUSED[name]}; drop it")
    parser = FlagParser("unlearn", "Runs a recipe with small models.")
    for name in ("--recipe", "--data"):
        parser.add_argument(name)
    parser.add_argument("--output", dest="output_dir")
    for name in ("--overwrite", "--json"):
        parser.add_argument(name, type=string_to_bool, nargs="?", const=True, default=False)
    command, overrides = parser.parse_known_args(words)
    if command.recipe is None:
        raise ValueError(f"--scale {scale}: expected --recipe with a name from `efface recipes`, got none")
    recipe = load_recipe(command.recipe)
    folder = Path(command.output_dir or f"{recipe.name}-{scale}")
    options: dict[str, Any] = {"data": command.data, "overrides": overrides, "overwrite": command.overwrite}
    say = open_console(stderr=True).print
    with teaching_bar(open_console(stderr=True)) as progress:
        run = run_tiny(recipe, folder, unlearn=unlearn_with, scale=scale, progress=progress, say=say, **options)
    if command.json:
        sys.stdout.write((folder / RECORD).read_text(encoding="utf-8"))
        return 0
    show(run, open_console())
    say(f"wrote {folder}")
    return 0


def show(run: TinyRun, console: Console) -> None:
    """Print the flags that differ from the recipe, and the figures of the retain, full and unlearned models."""
    say = console.print
    changed = ", ".join([*(f"{name} {json.dumps(value)}" for name, value in run.changed.items()), *run.overrides])
    say(f"{run.recipe} on {run.data}")
    say(f"changed from the recipe: {changed}")
    columns = {heading: (name, ".3g") for heading, name in _COLUMNS.items()}
    console.print(figures_table("", columns, run.models, pad_edge=False, collapse_padding=True))
    for model in run.models:
        if model.note:
            say(f"{model.name}: {model.note}")
    if run.revisions:
        say(f"revisions: {', '.join(run.revisions)}")
