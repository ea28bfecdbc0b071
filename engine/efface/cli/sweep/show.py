"""What a sweep tells: a ranked table, ``sweep.csv``, ``best.json``, the report, and what a dry run lists."""

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from efface.cli.dry_run import describe
from efface.cli.sweep.flags import SweepCommand, resolve
from efface.hf.recipe import command_line
from efface.recipes.flags import flag_words
from efface.sweep import Floor, Place, Trial, best_of, point_name, points, ranked
from efface.sweep.results import write_whole
from efface.sweep.space import Point

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
