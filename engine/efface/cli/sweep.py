"""The flags of ``efface sweep``, and what they say together."""

import argparse
import csv
import io
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from rich import box
from rich.console import Console
from rich.table import Table

from efface.cli.dry_run import describe
from efface.cli.flags import config_flags, parse, recipe_of
from efface.cli.progress import open_console
from efface.cli.run_folder import differences
from efface.cli.training import terminated_as_interrupted
from efface.cli.trial import Subprocesses
from efface.files import alone, write_whole
from efface.hf.reference.cached import NO_FILE
from efface.hf.reference.make import reference_kind
from efface.hf.text.row_files import READERS
from efface.hf.text.token_cache import file_digest
from efface.hf.train.arguments import UnlearnArguments
from efface.hf.train.record import argument_values, command_line, plan_values
from efface.hf.train.stepping import pairs_per_step
from efface.recipes import Recipe
from efface.recipes.command import UnlearnCommand
from efface.recipes.evaluation import check_evaluation, check_sets
from efface.recipes.flags import flag_words, given_names, taken
from efface.sweep import (
    KEEP,
    SAMPLERS,
    Floor,
    Launcher,
    Ledger,
    Loop,
    Place,
    Space,
    Trial,
    best_of,
    known_presets,
    load_preset,
    parse_grid,
    parse_space,
    point_name,
    points,
    ranked,
)
from efface.sweep.ledger import optuna_module
from efface.sweep.results import last_lines
from efface.sweep.space import Point

_EXAMPLES = """
examples:
  efface sweep --recipe npo-tofu-forget10-llama-3.2-3b --preset audit-54 --output_dir sweep --dry-run
  efface sweep --recipe npo-tofu-forget10-llama-3.2-3b --grid learning_rate=1e-5,2e-5,5e-5 beta=.05,.1,.5 \\
      --output_dir sweep
  efface sweep --recipe tofu-npo --sampler tpe --trials 30 --full_log full/TOFU_EVAL.json --output_dir sweep \\
      --space learning_rate=log:1e-6:1e-4 beta=float:0.01:1 num_train_epochs=int:3:10 alpha=choice:1,2,5
  efface sweep --model ./llama --forget forget10.json --retain retain90.json --objective npo --grid beta=.1,.5 \\
      --evaluation '--data tofu --split forget10 --retain-log retain90/TOFU_EVAL.json' --output_dir sweep

All other flags are those of `efface unlearn`, and hold for every trial. The same command goes on where a sweep was
stopped or killed; given on more machines with one --storage and --study, they share the trials.
"""

# What a sweep decides itself, or cannot mean.
_OURS = {
    "output_dir": "--output_dir is given to the sweep",
    "overwrite": "a sweep goes on where it was; choose another --output_dir to start anew",
    "json": "results are in best.json and sweep.csv",
    "push_to_hub": "push the best model when it is known",
    "resume_from_checkpoint": "a trial continues from its own newest checkpoint",
}


_UNSET = ("push_to_hub", "resume_from_checkpoint")  # of those above: what may be said, as long as it says no


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


@dataclass(frozen=True)
class SweepCommand:
    """What ``efface sweep`` was asked for.

    Attributes:
        options: its own flags.
        words: those of ``efface unlearn`` for every trial.
        space: what is varied.
        sampler: "grid", "tpe" or "random".
        command: what the words say.
        args: likewise, not checked against this machine.
        recipe: where they name one.
        evaluation: words of ``efface evaluate`` for each trial.
    """

    options: argparse.Namespace
    words: list[str]
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
        """Whether trials leave figures."""
        judged = self.recipe is not None and self.recipe.evaluate["benchmark"] != "none" and self.command.evaluate
        return judged or self.evaluation is not None

    @property
    def shares_retain_log(self) -> bool:
        """Whether a trial evaluates the recipe's retain model, which the others need not do again."""
        if self.recipe is None or not self.command.evaluate or self.command.retain_log is not None:
            return False
        return "retain_model" in self.recipe.evaluate and "retain_log" not in self.recipe.evaluate

    def settings(self) -> dict[str, Any]:
        """Return all that the results depend on; a study of others is another one."""
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
        """Return digests of the local files that trials read: another file under the same path is another study."""
        words = [word.partition("=")[2] or word for word in self.evaluation or []]
        sources = [self.command.forget, self.command.retain, self.command.data, self.args.refusal_file, *words]
        found = [Path(source).expanduser() for source in sources if source]
        files = [path for path in found if path.is_file()]
        files += [path for folder in found if folder.is_dir() for path in folder.iterdir() if path.suffix in READERS]
        return {str(path): file_digest(path) for path in sorted(set(files))}


def parser() -> _Parser:
    """Return the parser of the command's own flags; those of ``efface unlearn`` come beside them."""
    flags = _Parser(
        prog="efface sweep",
        description="Runs a recipe, or any flags of `efface unlearn`, with many settings, each in a process of its "
        "own, and ranks the results by Forget Quality among those with enough Model Utility. Trials that fail are "
        "kept with their error. Needs Optuna: pip install 'efface[sweep]'.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = flags.add_argument
    add("--output_dir", "--output-dir", required=True, metavar="DIR", help="study, trials and results; see the guide")
    add("--grid", nargs="+", metavar="FLAG=A,B", help="every combination of these values, each once")
    add("--preset", metavar="NAME", help=f"a grid by its name: {', '.join(known_presets())}; or a YAML file")
    kinds = "float:LOW:HIGH, log:LOW:HIGH, int:LOW:HIGH, choice:A,B"
    add("--space", nargs="+", metavar="FLAG=KIND:...", help=f"what tpe and random draw from: {kinds}")
    add("--sampler", choices=SAMPLERS, help="(default: grid; with --space tpe)")
    add("--trials", type=int, metavar="N", help="how many trials tpe and random draw; may be raised later")
    add("--storage", metavar="URL", help="database of Optuna, such as postgresql://...; default: DIR/study.db")
    add("--study", metavar="NAME", help="name of the study in --storage (default: the name of DIR)")
    add("--workers", type=int, metavar="N", help="trials at a time (default: one per visible GPU, or 1)")
    floor = "a trial with less Model Utility than so many times the full model's cannot win"
    add("--floor", type=float, default=0.9, help=f"{floor}; without --full_log, the best trial's (default: 0.9)")
    add("--full_log", "--full-log", metavar="FILE", help="evaluation of the model before unlearning, for --floor")
    add("--min_utility", "--min-utility", type=float, metavar="MU", help="an absolute floor instead of --floor")
    add("--keep", choices=KEEP, default="best", help="models that stay on the disk; figures all do (default: best)")
    add("--evaluation", metavar="WORDS", help="flags of `efface evaluate` for each trial, quoted; a recipe has its own")
    add("--retry_failed", "--retry-failed", action="store_true", help="try failed trials again")
    add("--dry_run", "--dry-run", action="store_true", help="list the trials, their steps and tokens; run nothing")
    return flags


def parse_sweep(argv: Sequence[str]) -> SweepCommand:
    """Parse the command line.

    Raises:
        FileNotFoundError: a recipe, a file or a folder that does not exist.
        ValueError: flags or values that are not known or do not go together.
    """
    options, words = parser().parse_known_args(list(argv))
    space, sampler = _space(options)
    _check_numbers(options)
    config, _ = taken(words, "config", "the path of a YAML file")
    given = given_names(words) | (set(config_flags(config)) if config is not None else set())
    for name in given & _OURS.keys() - set(_UNSET):
        raise ValueError(f"--{name}: not for a sweep: {_OURS[name]}")
    for name in given_names(words) & {parameter.name for parameter in space}:
        raise ValueError(f"--{name}: expected it once, got it as a flag for all trials and among what is varied")
    evaluation = None if options.evaluation is None else shlex.split(options.evaluation)
    found = SweepCommand(options, words, space, sampler, *resolve(words, {}), evaluation)
    for name in _UNSET:
        if getattr(found.args, name):  # a recipe may ask for it, too
            raise ValueError(f"--{name}: not for a sweep: {_OURS[name]}; set it to False")
    _check_together(found)
    for parameter in space:
        for value in parameter.some():
            point = {other.name: other.some()[0] for other in space} | {parameter.name: value}
            resolve(words, point)
    return found


def resolve(words: Sequence[str], point: Point) -> tuple[UnlearnCommand, UnlearnArguments, Recipe | None]:
    """Return what the words say with the flags of a point; needs nothing of this machine.

    Raises:
        ValueError: settings that do not go together.
    """
    command, args = parse([*words, *flag_words(point), "--output_dir=trial", "--dry_run"])
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
        raise ValueError(f"expected one of --grid, --preset and --space, which say what is varied, got {got}")
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
            "--trials: a grid has as many as it has points; drop it"
            if sampler == "grid"
            else f"--sampler {sampler}: expected --trials, how many to draw, got none"
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
        raise ValueError("--min_utility: is a floor without --full_log; drop one of them")


def _check_together(found: SweepCommand) -> None:
    judged = found.recipe is not None and found.recipe.evaluate["benchmark"] != "none" and found.command.evaluate
    if judged and found.evaluation is not None:
        raise ValueError("--evaluation: the recipe says how trials are judged; add --evaluate False, or drop it")
    if found.sampler == "tpe" and not found.evaluated:
        raise ValueError(
            "--sampler tpe: expected trials with figures, which it goes by; give a --recipe with an evaluation, or "
            "--evaluation with flags of `efface evaluate`"
        )
    ours = {"model", "output"} & given_names(found.evaluation or ())
    if ours:
        raise ValueError(f"--evaluation: --{min(ours)} is the trial's own; drop it")


RECORD = "reference.json"
# Swept, these make references of their own; the trials then fill the cache, which takes many writers.
_OF_THE_REFERENCE = {
    *("objective", "model", "revision", "dtype", "bf16", "fp16", "tf32", "forget", "forget_filter", "seed"),
    *("refusal_file", "alternate_column", "template", "system_prompt", "date_string", "max_length"),
    *("reference", "reference_cache"),
}

Fill = Callable[[Sequence[str], Path], int]


def fill_in_a_process(words: Sequence[str], log: Path) -> int:
    """Run ``efface cache-reference`` in a process of its own, which gives its memory back; return its exit code."""
    command = [sys.executable, "-m", "efface", "cache-reference", *words]
    with log.open("ab") as file:
        return subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode  # noqa: S603 - our own command


def fill_reference(sweep: SweepCommand, fill: Fill, say: Callable[[str], None]) -> None:
    """Compute the reference, if the trials share a cached one and this machine has not done so for this sweep.

    Raises:
        ValueError: it could not be computed; no trial could then run.
    """
    if not _is_shared(sweep):
        return
    record, log = sweep.out / RECORD, sweep.out / "reference.log"
    with alone(sweep.out / "reference.lock"):
        if record.is_file():
            return
        say("reference: once for all trials")
        first = {parameter.name: parameter.some()[0] for parameter in sweep.space}
        code = fill([*sweep.words, *flag_words(first)], log)
        if code:
            raise ValueError(f"the reference of all trials cannot be computed, exit code {code}: {last_lines(log)}")
        said = last_lines(log, 1)
        write_whole(record, json.dumps({"said": said, "process": os.getpid()}))
        say(f"reference: {said}")


def _is_shared(sweep: SweepCommand) -> bool:
    if any(parameter.name in _OF_THE_REFERENCE or parameter.name.startswith("reference_") for parameter in sweep.space):
        return False
    objective = sweep.command.make_objective()
    if sweep.args.reference_cache == NO_FILE or sweep.command.reference not in ("auto", "cached"):
        return False
    return reference_kind(sweep.command.reference, objective, None, padded=sweep.args.compat is not None) == "cached"


_SHORT = {"forget_quality": "FQ", "model_utility": "MU"}
# Parameters on which neither steps nor tokens depend.
_FREE = {"learning_rate", "beta", "alpha", "gamma", "delta", "weight_decay", "max_grad_norm", "lr_scheduler_type"}


def write_files(sweep: SweepCommand, trials: Sequence[Trial], floor: Floor) -> None:
    """Write ``sweep.csv`` and ``best.json``, whole."""
    names = [parameter.name for parameter in sweep.space]
    metrics = sorted({name for trial in trials for name in trial.metrics}, key=lambda name: (name not in _SHORT, name))
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["rank", "trial", "state", *names, *metrics, "seconds", "exit_code", "folder", "error"])
    for rank, trial in enumerate(ranked(trials, floor), 1):
        values = [trial.point.get(name, "") for name in names] + [trial.metrics.get(name, "") for name in metrics]
        folder = str(Place(sweep.out, trial.name).folder)
        end = [trial.seconds, trial.exit_code, folder, trial.error]
        shown = rank if trial.state == "complete" else ""
        lines.writerow([shown, trial.number, trial.state, *values, *("" if each is None else each for each in end)])
    write_whole(sweep.out / "sweep.csv", text.getvalue())
    best = best_of(trials, floor)
    if best is not None:
        write_whole(sweep.out / "best.json", json.dumps(_best(sweep, best, trials, floor), indent=2) + "\n")


def _best(sweep: SweepCommand, best: Trial, trials: Sequence[Trial], floor: Floor) -> dict[str, Any]:
    place = Place(sweep.out, best.name)
    words = [*sweep.words, *flag_words(best.point), "--output_dir=best"]
    return {
        "trial": best.number,
        "parameters": best.point,
        "metrics": best.metrics,
        "least_model_utility": floor.of(trial.metrics for trial in trials),
        "folder": str(place.folder),
        "model": str(place.folder) if place.has_weights() else None,
        "command": command_line(words),
    }


def table(sweep: SweepCommand, trials: Sequence[Trial], floor: Floor) -> Table:
    """Return the trials, best first."""
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    shown.add_column("", justify="right")
    for parameter in sweep.space:
        shown.add_column(parameter.name, justify="right", overflow="fold")
    for heading in ("FQ", "MU", "s"):
        shown.add_column(heading, justify="right")
    shown.add_column("state", overflow="fold")
    least = floor.of(trial.metrics for trial in trials)
    for rank, trial in enumerate(ranked(trials, floor), 1):
        below = trial.metrics.get("model_utility", least) < least
        state = _state(trial) + (", below the floor" if below else "")
        figures = [f"{trial.metrics[name]:.4g}" if name in trial.metrics else "-" for name in _SHORT]
        seconds = "-" if trial.seconds is None else f"{trial.seconds:.0f}"
        values = [_short(trial.point.get(parameter.name, "-")) for parameter in sweep.space]
        shown.add_row(str(rank) if trial.state == "complete" else "-", *values, *figures, seconds, state)
    known = floor.full is not None or floor.least is not None
    against = "" if known else f", {floor.share:g} times the best trial's"
    shown.caption = f"FQ: forget quality, MU: model utility, least to win {least:.4g}{against}"
    return shown


def show_failures(trials: Sequence[Trial], console: Console) -> None:
    """Print why trials failed."""
    for trial in trials:
        if trial.state == "failed":
            console.print(f"{trial.name}: {_state(trial)}", highlight=False, soft_wrap=True, markup=False)
            console.print(trial.error, highlight=False, soft_wrap=True, markup=False)


def dry_run(sweep: SweepCommand, console: Console) -> None:
    """Print the trials that there would be, with their steps and tokens."""
    if sweep.sampler == "grid":
        listed = list(points(sweep.space))
    else:
        first = {parameter.name: parameter.some()[0] for parameter in sweep.space}
        for parameter in sweep.space:
            console.print(f"{parameter.name}: {parameter.described()}", highlight=False, soft_wrap=True, markup=False)
        console.print(f"{sweep.options.trials} trials drawn by {sweep.sampler}; counted at the least values:")
        listed = [first] * sweep.options.trials
    known: dict[str, dict[str, Any]] = {}
    steps: list[Any] = []
    tokens: list[Any] = []
    for number, point in enumerate(listed):
        key = point_name({name: value for name, value in point.items() if name not in _FREE})
        if key not in known:
            command, args, recipe = resolve(sweep.words, point)
            known[key] = describe(command, args, command.make_objective(), recipe)["run"]
        steps.append(known[key].get("steps"))
        tokens.append(known[key].get("tokens"))
        if sweep.sampler == "grid":
            line = f"{number:>4}  {_in_words(point)}  {_count(steps[-1], 'steps')}  {_count(tokens[-1], 'tokens')}"
            console.print(line, highlight=False, soft_wrap=True, markup=False)
    total = f"{len(listed)} trials, {_total(steps, 'steps')}, {_total(tokens, 'tokens')}"
    console.print(total, highlight=False, soft_wrap=True, markup=False)


def _in_words(point: Point) -> str:
    return " ".join(f"{name}={_short(value)}" for name, value in point.items())


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _state(trial: Trial) -> str:
    if trial.state != "failed":
        return trial.state
    return "diverged" if trial.exit_code == 3 else f"failed ({trial.exit_code})"


def _count(count: Any, what: str) -> str:
    return f"{count:,} {what}" if isinstance(count, int) else ""


def _total(counts: Sequence[Any], what: str) -> str:
    if all(isinstance(count, int) for count in counts):
        return f"{sum(counts):,} {what}"
    return f"{what} not known without the data and the tokenizer here (--data)"


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    sweep = parse_sweep(argv)
    console = open_console(stderr=True)
    if sweep.options.dry_run:
        dry_run(sweep, open_console())
        return 0
    return carry_out(sweep, Subprocesses(sweep.evaluation), fill_in_a_process, console)


def carry_out(sweep: SweepCommand, launch: Launcher, fill: Fill, console: Console) -> int:
    """Run a sweep to its end; trials and the reference run by what is given.

    Raises:
        FileExistsError: the folder of a sweep with other settings; says what differs.
        FileNotFoundError: a log that does not exist.
        ImportError: no Optuna.
        ValueError: a log without Model Utility; the reference cannot be computed.
    """
    optuna_module()
    floor = _floor(sweep)
    ledger = _ledger(sweep)

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True, markup=False)

    def changed(what: str) -> None:
        trials = ledger.trials()
        ended = sum(trial.state in ("complete", "failed") for trial in trials)
        say(f"{ended} of {max(len(trials), ledger.count)}  {what}")
        write_files(sweep, trials, floor)

    ledger.plan()
    if sweep.options.retry_failed:
        say(f"{ledger.retry_failed()} failed trials are tried again")
    loop = Loop(
        ledger,
        launch,
        sweep.words,
        _devices(sweep),
        evaluated=sweep.evaluated,
        retain_log=sweep.shares_retain_log,
        floor=floor,
        keep=sweep.options.keep,
        changed=changed,
    )
    try:
        with terminated_as_interrupted():
            if ledger.unfinished():
                fill_reference(sweep, fill, say)
            loop.run()
    except KeyboardInterrupt:
        say("stopped; run the same command again to continue: finished trials stay, those in work go on")
        raise
    trials = ledger.trials()
    write_files(sweep, trials, floor)
    open_console().print(table(sweep, trials, floor))
    show_failures(trials, console)
    _report(sweep, console)
    say(f"wrote {sweep.out}")
    return 0 if any(trial.state == "complete" for trial in trials) else 1


def _floor(sweep: SweepCommand) -> Floor:
    options = sweep.options
    if options.full_log is None:
        return Floor(options.floor, least=options.min_utility)
    from efface.evaluate.report.figures import read_evaluation
    from efface.evaluate.report.find import find_log

    utility = read_evaluation(find_log(options.full_log)).figures.get("model_utility")
    if utility is None:
        raise ValueError(f"--full_log {options.full_log!r}: expected an evaluation with Model Utility, got none")
    return Floor(options.floor, full=utility)


def _ledger(sweep: SweepCommand) -> Ledger:
    options, settings = sweep.options, sweep.settings()
    ledger = Ledger(
        sweep.out,
        options.storage,
        options.study or sweep.out.resolve().name,
        space=sweep.space,
        sampler=sweep.sampler,
        count=options.trials or 0,
        settings=settings,
    )
    changes = [] if ledger.before is None else differences(ledger.before, settings)
    if changes:
        where = f"folder {str(sweep.out)!r}" if options.storage is None else f"study {options.study!r}"
        raise FileExistsError(
            f"{where} holds a sweep of other settings; choose another. What differs: {'; '.join(changes)}"
        )
    return ledger


def _devices(sweep: SweepCommand) -> list[str | None]:
    """Return CUDA_VISIBLE_DEVICES for each worker: a GPU each, in turns if there are more workers."""
    if sweep.args.use_cpu:
        return [None] * (sweep.options.workers or 1)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        gpus = [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    else:
        import torch

        gpus = list(map(str, range(torch.cuda.device_count())))
    count = sweep.options.workers or max(1, len(gpus))
    return [gpus[k % len(gpus)] if gpus else None for k in range(count)]


def _report(sweep: SweepCommand, console: Console) -> None:
    """Write the report of the trials, if any was evaluated."""
    from efface.evaluate import report

    page, options = sweep.out / "report.html", sweep.options
    log = sweep.command.retain_log
    try:
        report(sweep.out / "trials", page, full=options.full_log, retain_log=log, floor=options.floor)
    except (ValueError, OSError) as error:  # trials that leave nothing to show
        console.print(f"no report: {error}", highlight=False, soft_wrap=True, markup=False)
