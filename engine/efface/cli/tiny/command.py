"""``efface unlearn --recipe NAME --scale tiny``: what the words mean, and the table at the end."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from efface.cli.console import open_console
from efface.cli.tiny.run import RECORD, TinyRun, run_tiny
from efface.recipes import load_recipe
from efface.recipes.flags import FlagParser, given_names

_COLUMNS = {
    "forget\nquality": "forget_quality",
    "model\nutility": "model_utility",
    "forget:\nprobability": "forget_Q_A_Prob",
    "ROUGE": "forget_Q_A_ROUGE",
    "truth\nratio": "forget_truth_ratio",
    "retain:\nprobability": "retain_Q_A_Prob",
    "ROUGE ": "retain_Q_A_ROUGE",
}
_NOT_HERE = {
    "model": "the models are taught on the spot",
    "forget": "the data are the recipe's own; --data names a folder with TOFU's files",
    "retain": "the data are the recipe's own; --data names a folder with TOFU's files",
    "dry_run": "models and rows are only made when it runs",
    "retain_log": "the retain model is taught and evaluated too",
}


@dataclass
class _Command:
    """The flags that are not of the training itself."""

    recipe: str | None = None
    data: str | None = None
    output_dir: str | None = None
    overwrite: bool = False
    json: bool = False


def run_at(scale: str, words: Sequence[str]) -> int:
    """Run ``efface unlearn`` at a scale; ``words`` are those of its command line and its file of flags but ``--scale``.

    Raises:
        FileExistsError: an output folder that holds other things.
        ValueError: no recipe, or flags that have no meaning at a scale; as ``run_tiny``.
    """
    for name in _NOT_HERE.keys() & given_names(words):
        raise ValueError(f"--scale {scale}: expected no --{name}, because {_NOT_HERE[name]}; drop it")
    parser = FlagParser([_Command], allow_abbrev=False)  # type: ignore[list-item]
    command, overrides = parser.parse_args_into_dataclasses(list(words), return_remaining_strings=True)
    if command.recipe is None:
        raise ValueError(f"--scale {scale}: expected --recipe, a name of `efface recipes`, got none")
    recipe = load_recipe(command.recipe)
    folder = Path(command.output_dir or f"{recipe.name}-{scale}")
    options: dict[str, Any] = {"data": command.data, "overrides": overrides, "overwrite": command.overwrite}
    console = open_console(stderr=True)
    run = run_tiny(recipe, folder, scale=scale, console=console, **options)
    if command.json:
        sys.stdout.write((folder / RECORD).read_text(encoding="utf-8"))
        return 0
    show(run, open_console())
    console.print(f"wrote {folder}", highlight=False, soft_wrap=True)
    return 0


def show(run: TinyRun, console: Console) -> None:
    """Print what changed against the recipe, and the figures of the three models."""
    changed = ", ".join([*(f"{name} {json.dumps(value)}" for name, value in run.changed.items()), *run.overrides])
    console.print(f"{run.recipe} on {run.data}", highlight=False, soft_wrap=True)
    console.print(f"other than the recipe: {changed}", highlight=False, soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, collapse_padding=True)
    table.add_column("", no_wrap=True)
    for heading in _COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    for model in run.models:
        figures = [model.figures.get(name) for name in _COLUMNS.values()]
        table.add_row(model.name, *("-" if figure is None else f"{figure:.3g}" for figure in figures))
    console.print(table)
    for model in run.models:
        if model.note:
            console.print(f"{model.name}: {model.note}", highlight=False, soft_wrap=True)
    if run.revisions:
        console.print(f"revisions: {', '.join(run.revisions)}", highlight=False, soft_wrap=True)
