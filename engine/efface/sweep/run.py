"""The loop of a sweep: claim a trial, start its process, see how it ends, rank, make room on the disk."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from efface.flags import flag_words
from efface.sweep.ledger import Claim, Ledger
from efface.sweep.ranking import Floor, best_of
from efface.sweep.results import RETAIN_LOG, Place, Result

KEEP = ("best", "all", "none")
POLL = 0.2
BEAT = 30.0


class Process(Protocol):
    """A trial's process."""

    def poll(self) -> int | None:
        """Return its exit code, or None while it runs."""

    def stop(self) -> None:
        """Ask it to end so that it can go on later, and wait until it has."""


class Launcher(Protocol):
    """Starts trials."""

    def __call__(self, words: Sequence[str], log: Path, environment: Mapping[str, str], lock: int) -> Process:
        """Start ``efface unlearn`` with the words; what it says is added to the log, and it inherits the lock."""


class TrialProcess:
    """A trial's process."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process

    def poll(self) -> int | None:
        """Return its exit code, or None while it runs."""
        return self._process.poll()

    def stop(self) -> None:
        """Ask it to end, and wait; one that does not listen is killed."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()


@dataclass(frozen=True)
class Subprocesses:
    """Starts every trial in a process of its own: what fails, or runs out of memory, ends that trial and nothing else.

    Attributes:
        module: is run with the words of ``efface unlearn`` and of ``efface evaluate``, as JSON. When its standard input
            ends, because the sweep is gone, however that went, it has to stop as by Ctrl-C.
        evaluation: words of ``efface evaluate``, for runs without a recipe that says how they are judged.
    """

    module: str
    evaluation: Sequence[str] | None = None

    def __call__(self, words: Sequence[str], log: Path, environment: Mapping[str, str], lock: int) -> TrialProcess:
        """Start a trial; see ``Launcher``."""
        command = [sys.executable, "-m", self.module, json.dumps([list(words), self.evaluation])]
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            process = subprocess.Popen(  # noqa: S603 - our own command
                command,
                stdin=subprocess.PIPE,  # never written to: it ends when this process does
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                pass_fds=(lock,),
                start_new_session=True,  # Ctrl-C is for the sweep, which then stops its trials
            )
        return TrialProcess(process)


@dataclass
class _Work:
    """A trial in a slot; without a process it waits until another trial of the same folder is done."""

    claim: Claim
    device: str | None
    process: Process | None = None
    began: float = 0.0


@dataclass(frozen=True)
class Loop:
    """What all trials share.

    Attributes:
        ledger: the study.
        launch: starts a trial.
        words: of ``efface unlearn``, what is varied and the output folder left out.
        devices: CUDA_VISIBLE_DEVICES of each worker; None leaves it as it is.
        evaluated: whether a trial leaves figures.
        retain_log: whether trials can use the retain model's evaluation that the first of them made.
        floor: for the ranking.
        keep: which models stay on the disk: "best", "all" or "none".
        changed: is called with what happened, when a trial starts or ends.
    """

    ledger: Ledger
    launch: Launcher
    words: Sequence[str]
    devices: Sequence[str | None]
    evaluated: bool
    retain_log: bool
    floor: Floor
    keep: str
    changed: Callable[[str], None]

    def run(self) -> None:
        """Work until every trial has ended; those of other machines too."""
        work: list[_Work] = []
        free = list(self.devices)
        beaten = time.monotonic()
        try:
            while True:
                claimed = True
                while free and claimed:
                    claim = self.ledger.claim()
                    claimed = claim is not None
                    if claim is not None:
                        work.append(_Work(claim, free.pop(0)))
                        self._start(work[-1])
                ended = [each for each in work if self._ended(each)]
                for each in ended:
                    work.remove(each)
                    free.append(each.device)
                if ended:
                    continue
                if not work and not self.ledger.unfinished():
                    return
                if not self.ledger.local and time.monotonic() - beaten > BEAT:
                    self.ledger.beat([each.claim for each in work])
                    beaten = time.monotonic()
                time.sleep(POLL if work else 5 * POLL)
        finally:
            for each in work:
                if each.process is not None:
                    each.process.stop()
                _release(each.claim)

    def _start(self, work: _Work) -> None:
        """Start a trial's process, unless it has ended before and its worker could not say so."""
        claim = work.claim
        if claim.lock is None:
            claim.lock = claim.place.lock()
        if claim.lock is None or claim.place.result() is not None:
            return
        words = [*self.words, *flag_words(claim.point), f"--output-dir={claim.place.folder}"]
        shared = self.ledger.out / RETAIN_LOG
        if self.retain_log and shared.is_file():
            words.append(f"--retain-log={shared}")
        environment = {} if work.device is None else {"CUDA_VISIBLE_DEVICES": work.device}
        work.began = time.monotonic()
        self.changed(f"{claim.name}: started")
        work.process = self.launch(words, claim.place.log, environment, claim.lock)

    def _ended(self, work: _Work) -> bool:
        """Return whether the trial has ended, and note how."""
        claim = work.claim
        if work.process is None and claim.place.result() is None:
            self._start(work)
            if work.process is None and claim.place.result() is None:
                return False
        result = claim.place.result()
        if result is None:
            code = None if work.process is None else work.process.poll()
            if code is None:
                return False
            seconds = round(time.monotonic() - work.began, 1)
            result = claim.place.read(code, seconds, evaluated=self.evaluated)
            if self.retain_log:
                claim.place.share_retain_log(self.ledger.out)
            claim.place.finish(result)
        self.ledger.tell(claim, result, self.floor)
        _release(claim)
        self._tidy()
        self.changed(f"{claim.name}: {_in_words(result)}")
        return True

    def _tidy(self) -> None:
        """Remove the models that need not stay; what failed stays, to be continued by ``--retry-failed``."""
        if self.keep == "all":
            return
        trials = self.ledger.trials()
        best = best_of(trials, self.floor) if self.keep == "best" else None
        for trial in trials:
            if trial.state == "complete" and (best is None or trial.name != best.name):
                # without figures there is no best to be known
                if self.keep == "best" and not trial.metrics:
                    continue
                Place(self.ledger.out, trial.name).remove_weights()


def _release(claim: Claim) -> None:
    if claim.lock is not None:
        os.close(claim.lock)
        claim.lock = None


def _in_words(result: Result) -> str:
    if result.error:
        how = "diverged" if result.exit_code == 3 else f"failed, exit code {result.exit_code}"
        return f"{how}: {result.error.splitlines()[-1]}"
    figures = [
        f"{name} {result.metrics[name]:.4g}" for name in ("forget_quality", "model_utility") if name in result.metrics
    ]
    return ", ".join(["done", *figures])
