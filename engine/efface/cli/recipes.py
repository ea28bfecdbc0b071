"""``efface recipes``: list the recipes, or show one."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table

from efface.cli.dry_run import describe
from efface.cli.progress import add_json_flag, open_console, show_json
from efface.flags import FlagParser
from efface.recipes import Recipe, known_recipes, load_recipe
from efface.recipes.evaluation import stem
from efface.recipes.settings import unlearn_settings

_EXAMPLES = """
examples:
  efface recipes
  efface recipes npo-tofu-forget10-llama-3.2-1b
  efface unlearn --recipe npo-tofu-forget10-llama-3.2-1b --output out

The second command prints the YAML file of a recipe. Write your own in the same format,
and give its path in place of a name.
"""


_SHORT = {"forget_quality": "FQ", "model_utility": "MU"}


def parser() -> FlagParser:
    """Return the parser of the command's flags."""
    flags = FlagParser(
        "recipes",
        "Lists the recipes that come with efface, or shows one.",
        _EXAMPLES,
    )
    flags.add_argument("name", nargs="?", help="recipe to show: its name, or the path of a YAML file")
    add_json_flag(flags)
    return flags


def run(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    options = parser().parse_args(argv)
    names = list(known_recipes()) if options.name is None else [options.name]
    recipes = [load_recipe(name) for name in names]
    if options.json:
        plain = [{**asdict(recipe), "path": str(recipe.path), "memory": _memory(recipe)} for recipe in recipes]
        show_json(plain if options.name is None else plain[0])
    elif options.name is None:
        open_console().print(_table(recipes))
    else:
        _explain(recipes[0])
    return 0


def _memory(recipe: Recipe) -> int | None:
    """Return the bytes of memory that ``--dry-run`` estimates for the recipe, or None if unknown."""
    command, args = unlearn_settings({"recipe": str(recipe.path), "dry_run": True})
    total: int | None = describe(command, args, command.make_objective(), recipe)["memory"].get("total")
    return total


def _table(recipes: Sequence[Recipe]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    table.add_column("recipe, model", overflow="fold")
    for heading, width in (("method", 11), ("data", 11), ("published", 9)):  # the table fits 80 columns
        table.add_column(heading, min_width=width, no_wrap=True)
    table.add_column("GiB", justify="right", min_width=3, no_wrap=True)
    for recipe in recipes:
        size = _memory(recipe)
        table.add_row(
            f"{recipe.name}\n{str(recipe.unlearn['model']).rpartition('/')[2]}",
            str(recipe.unlearn["objective"]),
            stem(str(recipe.unlearn["forget"])),
            "\n".join(
                f"{short} {recipe.published[name]:g}" for name, short in _SHORT.items() if name in recipe.published
            ),
            "-" if size is None else f"{size / 2**30:.0f}",
        )
    table.caption = (
        "FQ: published forget quality. MU: published model utility. GiB: memory of one process with the whole model, "
        "computed and not measured; see `efface unlearn --dry-run`"
    )
    return table


def _explain(recipe: Recipe) -> None:
    print(f"# {recipe.path}\n# {_LEGEND}\n")
    print(recipe.path.read_text(encoding="utf-8").rstrip())
    size = _memory(recipe)
    expected: Any = "not known" if size is None else f"about {size / 2**30:.0f} GiB (computed, one process)"
    print(f"\n# expected memory: {expected}")
    print(f"# run it:   efface unlearn --recipe {recipe.name} --output out")
    print(f"# or first: efface unlearn --recipe {recipe.name} --dry-run")


_LEGEND = """published: figures of the source. ours: settings that the source does not state.
# unlearn: flags of `efface unlearn`. evaluate: benchmark for the result.
# architecture, rows: for estimates without network. tiny: flags that differ with --scale tiny."""
