"""The flags of ``efface sweep``: parsing and checks of the settings of all trials and of the varied parameters."""

import argparse
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from efface.flags import FlagParser, given_names, hyphens
from efface.hf.text.row_files import READERS
from efface.hf.text.token_cache import file_digest
from efface.hf.train.arguments import UnlearnArguments
from efface.hf.train.record import argument_values, plan_values
from efface.hf.train.stepping import pairs_per_step
from efface.recipes import Recipe
from efface.recipes.command import UnlearnCommand
from efface.recipes.evaluation import check_evaluation, check_sets
from efface.recipes.recipe import settings_parser
from efface.recipes.settings import config_settings, recipe_of, unlearn_parser, unlearn_settings
from efface.sweep.ledger import SAMPLERS
from efface.sweep.run import KEEP
from efface.sweep.space import Point, Space, known_presets, load_preset, parse_grid, parse_space

_EXAMPLES = """
examples:
  efface sweep --recipe tofu-npo --preset audit-54 --output sweep --dry-run
  efface sweep --recipe tofu-npo --grid learning_rate=1e-5,5e-5 beta=.05,.1,.5 \\
      --output sweep
  efface sweep --recipe tofu-npo --sampler tpe --trials 30 --output sweep \\
      --space learning_rate=log:1e-6:1e-4 beta=float:0.01:1 alpha=choice:1,2,5
  efface sweep --model ./llama --forget forget10.json --retain retain90.json \\
      --grid beta=.1,.5 --evaluation '--data tofu --retain-log TOFU_EVAL.json' \\
      --output sweep

All other flags are those of `efface unlearn`, and apply to every trial. Run a stopped
sweep again to continue it. Run the same command on several machines, with the same
--storage and --study, to share the trials between them.
"""

# Flags of `efface unlearn` that a sweep refuses, with the reason.
_REFUSED = {
    "output_dir": "each trial has its own folder in the --output of the sweep",
    "overwrite": "a sweep always continues; choose another --output to start a new one",
    "json": "results are in best.json and sweep.csv",
    "push_to_hub": "push the best model after the sweep",
    "resume_from_checkpoint": "a trial resumes from its own newest checkpoint",
}


_UNSET = ("push_to_hub", "resume_from_checkpoint")  # of the flags above, those that are accepted with a false value


@dataclass(frozen=True)
class SweepCommand:
    """The parsed command line of ``efface sweep``.

    Attributes:
        options: the flags of the sweep itself.
        words: flags of ``efface unlearn`` for every trial, as words of a command line.
        given: the values of ``words``, by field name.
        space: the varied parameters.
        sampler: "grid", "tpe" or "random".
        command: the settings of ``efface unlearn`` that all trials share.
        args: the trainer's arguments that all trials share, not checked against this machine.
        recipe: the recipe, or None.
        evaluation: words of ``efface evaluate`` for each trial, or None.
    """

    options: argparse.Namespace
    words: list[str]
    given: Mapping[str, Any]
    space: Space
    sampler: str
    command: UnlearnCommand
    args: UnlearnArguments
    recipe: Recipe | None
    evaluation: list[str] | None

    @property
    def out(self) -> Path:
        """The folder of the sweep."""
        return Path(self.options.output_dir)

    @property
    def evaluated(self) -> bool:
        """Whether trials are evaluated."""
        by_recipe = self.recipe is not None and self.recipe.evaluate["benchmark"] != "none" and self.command.evaluate
        return by_recipe or self.evaluation is not None

    @property
    def shares_retain_log(self) -> bool:
        """Whether the first trial evaluates the recipe's retain model, and the others reuse the log."""
        if self.recipe is None or not self.command.evaluate or self.command.retain_log is not None:
            return False
        return "retain_model" in self.recipe.evaluate and "retain_log" not in self.recipe.evaluate

    def settings(self) -> dict[str, Any]:
        """Return all settings that the results depend on. A study with other settings cannot be continued."""
        mine = {"dry_run", "json", "output_dir", "retain_log"}
        return {
            "sampler": self.sampler,
            "space": {parameter.name: parameter.described() for parameter in self.space},
            "evaluation": self.evaluation or (None if self.recipe is None else dict(self.recipe.evaluate)),
            "command": {name: value for name, value in vars(self.command).items() if name not in mine},
            "arguments": argument_values(self.args),
            "plan": plan_values(self.args, pairs_per_step(self.args)),
            "content": self._content(),
        }

    def _content(self) -> dict[str, str]:
        """Return path -> digest of the local files that trials read, to detect a file that has changed."""
        words = [word.partition("=")[2] or word for word in self.evaluation or []]
        sources = [self.command.forget, self.command.retain, self.command.data, self.args.refusal_file, *words]
        found = [Path(source).expanduser() for source in sources if source]
        files = [path for path in found if path.is_file()]
        files += [path for folder in found if folder.is_dir() for path in folder.iterdir() if path.suffix in READERS]
        return {str(path): file_digest(path) for path in sorted(set(files))}


def parser() -> FlagParser:
    """Return the parser of the flags of the sweep itself. ``--help-all`` also shows those of ``efface unlearn``."""
    flags = FlagParser(
        "sweep",
        "Runs a recipe, or `efface unlearn` with any flags, once for each of many settings, each in its own process. "
        "Ranks by Forget Quality the trials with enough Model Utility (see --floor). Failed trials are listed. "
        "Needs Optuna: pip install 'efface[sweep]'.",
        _EXAMPLES,
        beside=unlearn_parser(),
        partial=True,
    )
    add = flags.add_argument
    add(
        "--output",
        dest="output_dir",
        required=True,
        metavar="DIR",
        help="folder for the study, the trials and the results",
    )
    add("--grid", nargs="+", metavar="FLAG=A,B", help="run every combination of these values once")
    add("--preset", metavar="NAME", help=f"name of a grid: {', '.join(known_presets())}; or a YAML file")
    kinds = "float:LOW:HIGH, log:LOW:HIGH, int:LOW:HIGH, choice:A,B"
    add("--space", nargs="+", metavar="FLAG=KIND:...", help=f"ranges from which tpe and random draw: {kinds}")
    add("--sampler", choices=SAMPLERS, help="how settings are chosen (default: grid; with --space: tpe)")
    add("--trials", type=int, metavar="N", help="number of trials that tpe and random draw; can be increased later")
    add("--storage", metavar="URL", help="database of Optuna, such as postgresql://... (default: DIR/study.db)")
    add("--study", metavar="NAME", help="name of the study in --storage (default: the name of DIR)")
    add("--workers", type=int, metavar="N", help="trials at a time (default: one per visible GPU, or 1)")
    floor = (
        "lowest Model Utility of a winning trial, as a share of the full model's (--full-log) or of the highest trial's"
    )
    add("--floor", type=float, default=0.9, help=f"{floor} (default: 0.9)")
    add("--full-log", metavar="FILE", help="evaluation of the model before unlearning, for --floor")
    add("--min-utility", type=float, metavar="MU", help="lowest Model Utility of a winning trial; replaces --floor")
    add("--keep", choices=KEEP, default="best", help="models to keep on the disk; all figures are kept (default: best)")
    add(
        "--evaluation",
        metavar="WORDS",
        help="quoted flags of `efface evaluate` for each trial, if no recipe evaluates it",
    )
    add("--retry-failed", action="store_true", help="run failed trials again")
    add("--dry-run", action="store_true", help="list the trials, their steps and tokens; run nothing")
    add("--json", action="store_true", help="print one JSON document instead of a table")
    return flags


def parse_sweep(argv: Sequence[str]) -> SweepCommand:
    """Parse the command line and check the settings of every trial.

    For a range, only its two ends are checked.

    Raises:
        FileNotFoundError: a recipe, a file or a folder does not exist.
        ValueError: unknown flags, invalid values, or flags that contradict one another.
    """
    options, words = parser().parse_known_args(list(argv))
    space, sampler = _space(options)
    _check_numbers(options)
    given = settings_parser().given(words)
    config = config_settings(given["config"], settings_parser()) if "config" in given else {}
    for name in (given.keys() | config.keys()) & _REFUSED.keys() - set(_UNSET):
        raise ValueError(f"--{hyphens(name)}: not for a sweep: {_REFUSED[name]}")
    for name in given.keys() & {parameter.name for parameter in space}:
        raise ValueError(
            f"--{hyphens(name)}: expected either a value for all trials or varied values, got both; drop one of them"
        )
    evaluation = None if options.evaluation is None else shlex.split(options.evaluation)
    found = SweepCommand(options, words, given, space, sampler, *resolve(given, {}), evaluation)
    for name in _UNSET:
        if getattr(found.args, name):  # a recipe can set it, too
            raise ValueError(f"--{hyphens(name)}: not for a sweep: {_REFUSED[name]}; set it to False")
    _check_together(found)
    for parameter in space:
        for value in parameter.some():
            point = {other.name: other.some()[0] for other in space} | {parameter.name: value}
            resolve(given, point)
    return found


def resolve(given: Mapping[str, Any], point: Point) -> tuple[UnlearnCommand, UnlearnArguments, Recipe | None]:
    """Return the settings of a trial, checked for consistency but not against this machine.

    Args:
        given: settings of all trials, by field name.
        point: values of the varied parameters.

    Raises:
        ValueError: invalid values, or settings that contradict one another.
    """
    values = settings_parser().converted(point, "varied flags")
    command, args = unlearn_settings({**given, **values, "output_dir": "trial", "dry_run": True})
    recipe = recipe_of(command)
    command.make_objective()
    if not args.allow_overlap:
        check_sets(command)
    if recipe is not None and command.evaluate:
        check_evaluation(command, recipe)
    return command, args, recipe


def _space(options: argparse.Namespace) -> tuple[Space, str]:
    given = [name for name in ("grid", "preset", "space") if getattr(options, name) is not None]
    if len(given) != 1:
        got = " and ".join(f"--{name}" for name in given) or "none"
        raise ValueError(f"expected one of --grid, --preset and --space, which choose the varied flags, got {got}")
    sampler = options.sampler or ("tpe" if given == ["space"] else "grid")
    if options.grid is not None:
        space = parse_grid(options.grid)
    elif options.preset is not None:
        space = load_preset(options.preset)
    else:
        space = parse_space(options.space)
    if sampler == "grid" and (ranges := [parameter.name for parameter in space if parameter.kind != "choice"]):
        raise ValueError(f"--sampler grid: expected values, got a range of {', '.join(ranges)}; give choice:A,B")
    if (sampler == "grid") != (options.trials is None):
        raise ValueError(
            "--trials: expected tpe or random as --sampler, got grid, which runs every point once; drop --trials"
            if sampler == "grid"
            else f"--sampler {sampler}: expected --trials with the number of trials to draw, got none"
        )
    return space, sampler


def _check_numbers(options: argparse.Namespace) -> None:
    for name in ("trials", "workers"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name}: expected 1 or more, got {value}")
    if not 0 <= options.floor <= 1:
        raise ValueError(f"--floor: expected a share of the full model's utility, 0 .. 1, got {options.floor}")
    if options.min_utility is not None and options.full_log is not None:
        raise ValueError(
            "--min-utility: expected no --full-log with it, because both set the floor, got both; drop one"
        )


def _check_together(found: SweepCommand) -> None:
    by_recipe = found.recipe is not None and found.recipe.evaluate["benchmark"] != "none" and found.command.evaluate
    if by_recipe and found.evaluation is not None:
        raise ValueError(
            "--evaluation: expected no recipe with its own evaluation, got one; add --evaluate False, or drop "
            "--evaluation"
        )
    if found.sampler == "tpe" and not found.evaluated:
        raise ValueError(
            "--sampler tpe: expected evaluated trials, got none; give a --recipe with an evaluation, or "
            "--evaluation with flags of `efface evaluate`"
        )
    ours = {"model", "output", "output_dir"} & given_names(found.evaluation or ())
    if ours:
        raise ValueError(f"--evaluation: --{min(ours)} is set by each trial; drop it")
