"""``efface sweep``: run one recipe with many settings, compute the shared reference once, and rank the results."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from efface.cli.dry_run import describe
from efface.cli.main import main
from efface.cli.progress import Bar, open_console, show_json
from efface.cli.run_folder import RECORD as RUN_RECORD
from efface.cli.run_folder import differences
from efface.cli.training import model_inputs
from efface.files import alone, check_output, write_whole
from efface.flags import flag_words
from efface.hf.reference.cached import NO_FILE
from efface.hf.reference.make import reference_kind
from efface.hf.train.record import command_line
from efface.sweep import Floor, Launcher, Ledger, Loop, Place, Trial, best_of, point_name, points, ranked
from efface.sweep.ledger import optuna_module
from efface.sweep.results import last_lines
from efface.sweep.run import Subprocesses
from efface.sweep.settings import SweepCommand, parse_sweep, parser, resolve
from efface.sweep.space import Point

__all__ = ["parser", "run"]

RECORD = "reference.json"
# If one of these is swept, trials have different references. Each trial then fills the cache itself; the cache supports
# concurrent writers.
_REFERENCE_FLAGS = {
    *("objective", "model", "revision", "dtype", "bf16", "fp16", "tf32", "forget", "forget_filter", "seed"),
    *("refusal_file", "alternate_column", "template", "system_prompt", "date_string", "max_length"),
    *("reference", "reference_cache"),
}

Fill = Callable[[Sequence[str], Path], int]


def fill_in_a_process(words: Sequence[str], log: Path) -> int:
    """Run ``efface cache-reference`` in a subprocess, which frees its memory when it ends. Return its exit code."""
    command = [sys.executable, "-m", "efface", "cache-reference", *words]
    with log.open("ab") as file:
        return subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode  # noqa: S603 - our own command


def fill_reference(sweep: SweepCommand, fill: Fill, say: Callable[[str], None]) -> None:
    """Compute the cached reference that all trials share, once for each machine.

    Does nothing if the trials have no shared cached reference, or if ``reference.json`` records that this machine has
    already computed it.

    Args:
        sweep: the command.
        fill: runs ``efface cache-reference`` with the given words and log file, and returns its exit code.
        say: prints a line.

    Raises:
        ValueError: the command failed, so that no trial could run.
    """
    if not _is_shared(sweep):
        return
    record, log = sweep.out / RECORD, sweep.out / "reference.log"
    with alone(sweep.out / "reference.lock"):
        if record.is_file():
            return
        say("reference: computed once for all trials")
        first = {parameter.name: parameter.some()[0] for parameter in sweep.space}
        code = fill([*sweep.words, *flag_words(first)], log)
        if code:
            raise ValueError(f"the reference of all trials cannot be computed, exit code {code}: {last_lines(log)}")
        said = last_lines(log, 1)
        write_whole(record, json.dumps({"said": said, "process": os.getpid()}))
        say(f"reference: {said}")


def _is_shared(sweep: SweepCommand) -> bool:
    if any(parameter.name in _REFERENCE_FLAGS or parameter.name.startswith("reference_") for parameter in sweep.space):
        return False
    objective = sweep.command.make_objective()
    if sweep.args.reference_cache == NO_FILE or sweep.command.reference not in ("auto", "cached"):
        return False
    return reference_kind(sweep.command.reference, objective, None, padded=sweep.args.compat is not None) == "cached"


_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # first characters of cells that spreadsheets evaluate as formulas
_SHORT = {"forget_quality": "FQ", "model_utility": "MU"}
# Parameters that change neither the number of steps nor that of tokens.
_STEP_INDEPENDENT = {
    "learning_rate",
    "beta",
    "alpha",
    "gamma",
    "delta",
    "weight_decay",
    "max_grad_norm",
    "lr_scheduler_type",
}


def csv_cell(value: Any) -> Any:
    """Return a cell that spreadsheets do not evaluate: text that looks like a formula gets a leading apostrophe.

    Values of other types, such as numbers, are returned unchanged. See OWASP, "CSV injection".
    """
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def write_files(sweep: SweepCommand, trials: Sequence[Trial], floor: Floor) -> None:
    """Write ``sweep.csv``, and ``best.json`` if a trial was evaluated, each with an atomic rename."""
    names = [parameter.name for parameter in sweep.space]
    metrics = sorted({name for trial in trials for name in trial.metrics}, key=lambda name: (name not in _SHORT, name))
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    heading = ["rank", "trial", "state", *names, *metrics, "seconds", "exit_code", "folder", "error"]
    lines.writerow(map(csv_cell, heading))
    for rank, trial in enumerate(ranked(trials, floor), 1):
        values = [trial.point.get(name, "") for name in names] + [trial.metrics.get(name, "") for name in metrics]
        folder = str(Place(sweep.out, trial.name).folder)
        end = [trial.seconds, trial.exit_code, folder, trial.error]
        shown = rank if trial.state == "complete" else ""
        ended = ("" if each is None else each for each in end)
        lines.writerow(map(csv_cell, [shown, trial.number, trial.state, *values, *ended]))
    write_whole(sweep.out / "sweep.csv", text.getvalue())
    best = best_of(trials, floor)
    if best is not None:
        write_whole(sweep.out / "best.json", json.dumps(_best(sweep, best, trials, floor), indent=2) + "\n")


def _best(sweep: SweepCommand, best: Trial, trials: Sequence[Trial], floor: Floor) -> dict[str, Any]:
    place = Place(sweep.out, best.name)
    words = [*sweep.words, *flag_words(best.point), "--output=best"]
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
    """Return a table of the trials, best first."""
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
    against = "" if known else f" ({floor.share:g} times the best trial's)"
    shown.caption = f"FQ: forget quality. MU: model utility; a trial below {least:.4g}{against} cannot win"
    return shown


def show_failures(trials: Sequence[Trial], console: Console) -> None:
    """Print the state and the error of each failed trial."""
    for trial in trials:
        if trial.state == "failed":
            console.print(f"{trial.name}: {_state(trial)}")
            console.print(trial.error)


def dry_run(sweep: SweepCommand) -> None:
    """Print the trials of the sweep with their steps and tokens, and run nothing."""
    say = str if sweep.options.json else open_console().print
    if sweep.sampler == "grid":
        listed = list(points(sweep.space))
    else:
        first = {parameter.name: parameter.some()[0] for parameter in sweep.space}
        for parameter in sweep.space:
            say(f"{parameter.name}: {parameter.described()}")
        say(f"{sweep.options.trials} trials drawn by {sweep.sampler}; steps and tokens at the lowest values:")
        listed = [first] * sweep.options.trials
    known: dict[str, dict[str, Any]] = {}
    counts: list[dict[str, Any]] = []
    for number, point in enumerate(listed):
        key = point_name({name: value for name, value in point.items() if name not in _STEP_INDEPENDENT})
        if key not in known:
            command, args, recipe = resolve(sweep.given, point)
            known[key] = describe(command, args, command.make_objective(), recipe)["run"]
        counts.append({what: known[key].get(what) for what in ("steps", "tokens")})
        if sweep.sampler == "grid":
            said = (_count(count, what) for what, count in counts[-1].items())
            say(f"{number:>4}  {_in_words(point)}  {'  '.join(said)}")
    if sweep.options.json:
        trials = [
            {"parameters": point if sweep.sampler == "grid" else None, **count}
            for point, count in zip(listed, counts, strict=True)
        ]
        show_json({"sampler": sweep.sampler, "trials": trials})
    totals = (_total([count[what] for count in counts], what) for what in ("steps", "tokens"))
    say(f"{len(listed)} trials, {', '.join(totals)}")


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
    return f"{what} not known: the data or the tokenizer is not on this machine; give --data"


def run(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    sweep = parse_sweep(argv)
    command = sweep.command
    check_output(
        sweep.out,
        overwrite=True,
        inputs={
            **model_inputs("--model", command.model, command.revision),
            **model_inputs("--reference-model", command.reference_model, command.reference_revision),
            **{f"--{name}": getattr(command, name) for name in ("forget", "retain", "data")},
        },
        replaced=("trials", RECORD, "sweep.csv", "best.json", "report.html"),
    )
    console = open_console(stderr=True)
    if sweep.options.dry_run:
        dry_run(sweep)
        return 0
    return carry_out(sweep, Subprocesses("efface.cli.sweep", sweep.evaluation), fill_in_a_process, console)


def carry_out(sweep: SweepCommand, launch: Launcher, fill: Fill, console: Console) -> int:
    """Run a sweep until every trial has ended, and show the results.

    Args:
        sweep: the command.
        launch: starts the process of a trial.
        fill: computes the shared reference; see ``fill_reference``.
        console: for progress and messages.

    Returns:
        0 if at least one trial is complete, else 1.

    Raises:
        FileExistsError: the folder or study contains a sweep with other settings. The message lists the differences.
        FileNotFoundError: ``--full-log`` does not exist.
        ImportError: Optuna is not installed.
        ValueError: ``--full-log`` has no Model Utility, or the reference cannot be computed.
    """
    optuna_module()
    floor = _floor(sweep)
    ledger = _ledger(sweep)

    bar = Bar(console, "sweep")
    say = bar.say

    def changed(what: str) -> None:
        trials = ledger.trials()
        ended, count = sum(trial.state in ("complete", "failed") for trial in trials), max(len(trials), ledger.count)
        say(f"{ended} of {count}  {what}")
        bar.follow("trials", ended, count)
        write_files(sweep, trials, floor)

    ledger.plan()
    if sweep.options.retry_failed:
        say(f"retrying {ledger.retry_failed()} failed trials")
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
        with closing(bar):
            if ledger.unfinished():
                fill_reference(sweep, fill, say)
            loop.run()
    except KeyboardInterrupt:
        say("stopped; run the same command again to continue: finished trials are kept, unfinished ones resume")
        raise
    trials = ledger.trials()
    write_files(sweep, trials, floor)
    if sweep.options.json:
        best = best_of(trials, floor)
        listed = [{**asdict(trial), "folder": Place(sweep.out, trial.name).folder} for trial in ranked(trials, floor)]
        show_json({"trials": listed, "best": None if best is None else _best(sweep, best, trials, floor)})
    else:
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
        raise ValueError(f"--full-log {options.full_log!r}: expected an evaluation with Model Utility, got none")
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
            f"{where} contains a sweep with other settings; choose another one. Differences: {'; '.join(changes)}"
        )
    return ledger


def _devices(sweep: SweepCommand) -> list[str | None]:
    """Return CUDA_VISIBLE_DEVICES of each worker: one GPU each, assigned round-robin if there are more workers."""
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
    """Write ``report.html``, or print why there is none."""
    from efface.evaluate import report

    page, options = sweep.out / "report.html", sweep.options
    log = sweep.command.retain_log
    try:
        report(sweep.out / "trials", page, full=options.full_log, retain_log=log, floor=options.floor)
    except (ValueError, OSError) as error:  # no trial was evaluated
        console.print(f"no report: {error}")


def run_trial(words: Sequence[str], evaluation: Sequence[str] | None) -> int:
    """Run ``efface unlearn``, then ``efface evaluate``, in this process. Return the exit code.

    Args:
        words: flags of ``efface unlearn`` with ``--output-dir=DIR``. A run that has finished in DIR is not repeated.
        evaluation: flags of ``efface evaluate``; None evaluates nothing.
    """
    folder = next(Path(word.partition("=")[2]) for word in reversed(words) if word.startswith("--output-dir="))
    code = 0 if _finished(folder) else main(["unlearn", *words])
    if code or evaluation is None:
        return code
    return main(["evaluate", f"--model={folder}", f"--output={folder / 'evaluation'}", *evaluation])


def _finished(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / RUN_RECORD).read_text(encoding="utf-8"))["finished"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def _stop_with_the_sweep() -> None:
    def wait() -> None:
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    _stop_with_the_sweep()
    sys.exit(run_trial(*json.loads(sys.argv[1])))
