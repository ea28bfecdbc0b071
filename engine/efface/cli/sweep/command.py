"""``efface sweep``: many runs of one recipe, ranked."""

import os
from collections.abc import Sequence

from rich.console import Console

from efface.cli.console import open_console
from efface.cli.run import terminated_as_interrupted
from efface.cli.run_folder import differences
from efface.cli.sweep import show
from efface.cli.sweep.flags import SweepCommand, parse_sweep, parser
from efface.cli.sweep.reference import Fill, fill_in_a_process, fill_reference
from efface.cli.sweep.trial import Subprocesses
from efface.sweep import Floor, Launcher, Ledger, Loop
from efface.sweep.ledger import optuna_module

__all__ = ["carry_out", "parser", "run"]


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    sweep = parse_sweep(argv)
    console = open_console(stderr=True)
    if sweep.options.dry_run:
        show.dry_run(sweep, open_console())
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
        show.write_files(sweep, trials, floor)

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
    show.write_files(sweep, trials, floor)
    open_console().print(show.table(sweep, trials, floor))
    show.show_failures(trials, console)
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
