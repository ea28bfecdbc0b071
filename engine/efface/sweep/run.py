"""The main loop of a sweep: claim trials, run them in subprocesses, record results, and remove weights."""

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
    """Interface of the process of a trial."""

    def poll(self) -> int | None:
        """Return the exit code, or None while the process runs."""

    def stop(self) -> None:
        """Terminate the process in a way that allows a later resume, and wait until it has ended."""


class Launcher(Protocol):
    """Interface of a function that starts trials."""

    def __call__(self, words: Sequence[str], log: Path, environment: Mapping[str, str], lock: int) -> Process:
        """Start ``efface unlearn``.

        Args:
            words: its command line.
            log: file to which its output is appended.
            environment: additional environment variables.
            lock: file descriptor of the trial's lock, which the process inherits.
        """


class TrialProcess:
    """The process of a trial as a ``subprocess.Popen``."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process

    def poll(self) -> int | None:
        """Return the exit code, or None while the process runs."""
        return self._process.poll()

    def stop(self) -> None:
        """Send SIGTERM and wait. If the process still runs after 60 seconds, kill it."""
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
    """A launcher that starts every trial in a subprocess, so that an error or a lack of memory ends only that trial.

    Attributes:
        module: module to run. Its argument is a JSON list: the words of ``efface unlearn`` and those of ``efface
            evaluate``. The module must stop as by Ctrl-C when its standard input is closed, which happens when the
            sweep ends for any reason, even if it is killed.
        evaluation: words of ``efface evaluate`` for runs without a recipe that evaluates them, or None.
    """

    module: str
    evaluation: Sequence[str] | None = None

    def __call__(self, words: Sequence[str], log: Path, environment: Mapping[str, str], lock: int) -> TrialProcess:
        """Start a trial; arguments as for ``Launcher``."""
        command = [sys.executable, "-m", self.module, json.dumps([list(words), self.evaluation])]
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            process = subprocess.Popen(  # noqa: S603 - our own command
                command,
                stdin=subprocess.PIPE,  # never written to; closed when this process ends
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                pass_fds=(lock,),
                start_new_session=True,  # Ctrl-C reaches only the sweep, which then stops its trials
            )
        return TrialProcess(process)


@dataclass
class _Work:
    """A claimed trial. ``process`` is None while another trial holds the lock of the same folder."""

    claim: Claim
    device: str | None
    process: Process | None = None
    began: float = 0.0


@dataclass(frozen=True)
class Loop:
    """The main loop of a sweep, with the settings that all trials share.

    Attributes:
        ledger: the study.
        launch: starts the process of a trial.
        words: flags of ``efface unlearn`` for every trial, without the varied ones and the output folder.
        devices: CUDA_VISIBLE_DEVICES of each worker; None leaves the variable unchanged.
        evaluated: whether a complete trial has an evaluation.
        retain_log: whether later trials reuse the evaluation of the retain model from the first one.
        floor: the floor of the ranking.
        keep: the models that are kept on the disk: "best", "all" or "none".
        changed: callback that receives a message when a trial starts or ends.
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
        """Run trials until all have ended, including those on other machines."""
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
        """Start the process of a trial, unless the lock is taken or a record shows that the trial has already ended."""
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
        """Return whether the trial has ended. If it has, store its result and release its lock."""
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
        self._remove_weights()
        self.changed(f"{claim.name}: {_in_words(result)}")
        return True

    def _remove_weights(self) -> None:
        """Remove models that ``keep`` does not keep. Failed trials keep theirs, for ``--retry-failed`` to resume."""
        if self.keep == "all":
            return
        trials = self.ledger.trials()
        best = best_of(trials, self.floor) if self.keep == "best" else None
        for trial in trials:
            if trial.state == "complete" and (best is None or trial.name != best.name):
                # Without metrics no best trial can be chosen, so keep the model.
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
