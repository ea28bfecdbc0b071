"""The study of a sweep in Optuna's storage: its trials, the workers that run them, and their results.

A worker claims a trial with Optuna's atomic change of state from WAITING to RUNNING, which only one process can make.
If the worker of a running trial is gone, the trial is marked as failed, and a successor with the same name is added. It
has the same folder, so its run resumes from the newest checkpoint. If two processes act at the same time, there can be
two trials for one point, or two successors. Then only the one with the lowest number counts.
"""

import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from efface.errors import reading
from efface.extras import check_extras
from efface.files import alone
from efface.sweep.ranking import Floor, Trial, objective
from efface.sweep.results import Place, Result
from efface.sweep.space import Point, Space, point_name, points

if TYPE_CHECKING:
    import optuna

SAMPLERS = ("grid", "tpe", "random")
NAME, POINT, WORKER, BEAT, AFTER, SURPLUS, RESULT = "name", "point", "worker", "beat", "after", "surplus", "result"
RETRY = "retry"
_SETTINGS = "sweep"
GRACE = 300.0  # seconds without a heartbeat after which a worker on another machine is considered gone


def optuna_module() -> Any:
    """Import Optuna, with its log level set to WARNING, and return the module.

    Raises:
        ImportError: Optuna is not installed.
    """
    check_extras("a sweep", "sweep")
    import optuna  # noqa: PLC0415 - an optional package

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


@dataclass
class Claim:
    """A trial that this process runs."""

    number: int
    name: str
    point: Point
    place: Place
    lock: int | None = None  # file descriptor of the lock; None while another process holds it


class Ledger:
    """A study in an Optuna storage, which is created if it does not exist.

    Args:
        out: folder of the sweep on this machine.
        storage: URL of a database that machines share; None uses ``study.db`` in the folder.
        study: name of the study in the storage.
        space: the parameters that are varied.
        sampler: "grid", "tpe" or "random".
        count: number of trials that "tpe" and "random" draw.
        settings: all settings that the results depend on, as JSON values.

    Attributes:
        before: the settings stored in an existing study; None for a new one.

    Raises:
        ImportError: Optuna is not installed.
        ValueError: Optuna cannot open the storage or the study.
    """

    def __init__(
        self,
        out: Path,
        storage: str | None,
        study: str,
        *,
        space: Space,
        sampler: str,
        count: int,
        settings: Mapping[str, Any],
    ) -> None:
        library = optuna_module()
        self.out, self.space, self.count = out, space, count
        self.grid, self.local = sampler == "grid", storage is None
        self._states = library.trial.TrialState
        out.mkdir(parents=True, exist_ok=True)
        url = storage or f"sqlite:///{out.resolve() / 'study.db'}"
        wait = {"connect_args": {"timeout": 120}} if url.startswith("sqlite") else {"pool_pre_ping": True}
        drawn = library.samplers.TPESampler() if sampler == "tpe" else library.samplers.RandomSampler()
        self._worker = f"{socket.gethostname()}:{out.resolve()}"
        self._seen: dict[int, tuple[Any, float]] = {}  # trial -> (last heartbeat, our time when we first saw it)
        # The message does not contain the URL, which can contain a password.
        place = f"study {study!r}" if storage else f"study {str(out / 'study.db')!r}"
        with self._alone(), reading(place, "one that Optuna can open", "choose another --output or --storage"):
            self._study: optuna.Study = library.create_study(
                storage=library.storages.RDBStorage(url, engine_kwargs=wait),
                study_name=study,
                direction="maximize",
                sampler=drawn,
                load_if_exists=True,
            )
            before = self._study.user_attrs.get(_SETTINGS)
            if before is None:
                self._study.set_user_attr(_SETTINGS, json.loads(json.dumps(settings, default=str)))
        self.before: dict[str, Any] | None = before

    def _alone(self) -> Any:
        return alone(self.out / "study.lock")

    def plan(self) -> None:
        """Add a waiting trial for every point of the grid that has none yet."""
        if not self.grid:
            return
        with self._alone():
            there = {trial.user_attrs.get(NAME) for trial in self._counted()}
            for point in points(self.space):
                if (name := point_name(point)) not in there:
                    self._study.enqueue_trial(dict(point), user_attrs={NAME: name, POINT: point})

    def retry_failed(self) -> int:
        """Add a waiting successor for every failed trial. Return their number."""
        with self._alone():
            failed = [trial for trial in self._counted() if trial.state == self._states.FAIL]
            for trial in failed:
                self._succeed(trial, RETRY)
            return len(failed)

    def claim(self) -> Claim | None:
        """Claim a waiting trial, or draw a new one. Return None if no trial is left to start."""
        with self._alone():
            self._take_over()
            counted = self._counted()
            waiting = any(trial.state == self._states.WAITING for trial in counted)
            if not waiting and (self.grid or len(counted) >= self.count):
                return None
            trial = self._study.ask()
            if trial.number not in {each.number for each in self._counted()}:
                # Another machine added the same or the last trial at the same time; the lower number counts.
                trial.set_user_attr(SURPLUS, True)
                self._study.tell(trial, state=self._states.FAIL)
                return None
            point = {parameter.name: parameter.suggest(trial) for parameter in self.space}
            name = trial.user_attrs.get(NAME) or point_name(point)
            for key, value in ((POINT, point), (WORKER, self._worker), (NAME, name)):
                trial.set_user_attr(key, value)
            predecessor = trial.user_attrs.get(AFTER)
            if predecessor is not None:  # still RUNNING if the process that added the successor then died
                self._study.tell(predecessor, state=self._states.FAIL, skip_if_finished=True)
            place = Place(self.out, name)
            lock = place.lock()
            if trial.user_attrs.get(RETRY) and lock is not None:
                place.forget()  # delete the record of the failure, if it is on this machine
            return Claim(trial.number, name, point, place, lock)

    def beat(self, claims: Sequence[Claim]) -> None:
        """Write a heartbeat for the trials, so that other machines do not take them over."""
        for trial in self._open(claims):
            trial.set_user_attr(BEAT, time.time())

    def tell(self, claim: Claim, result: Result, floor: Floor) -> None:
        """Store the result of a trial in the study."""
        for trial in self._open([claim]):
            trial.set_user_attr(RESULT, vars(result))
        metrics = [trial.metrics for trial in self.trials()]
        if result.error:
            self._study.tell(claim.number, state=self._states.FAIL, skip_if_finished=True)
        else:
            value = objective(result.metrics, floor.of([*metrics, result.metrics]))
            self._study.tell(claim.number, value, skip_if_finished=True)

    def trials(self) -> list[Trial]:
        """Return the trials in order of their numbers, without replaced and surplus ones."""
        words = {self._states.COMPLETE: "complete", self._states.FAIL: "failed", self._states.WAITING: "waiting"}
        shown = []
        for trial in self._counted():
            if NAME not in trial.user_attrs:
                continue
            result = trial.user_attrs.get(RESULT, {})
            shown.append(
                Trial(
                    number=trial.number,
                    name=trial.user_attrs[NAME],
                    point=trial.user_attrs[POINT],
                    state=words.get(trial.state, "running"),
                    metrics=result.get("metrics", {}),
                    error=result.get("error", ""),
                    exit_code=result.get("exit_code"),
                    seconds=result.get("seconds"),
                )
            )
        return shown

    def unfinished(self) -> bool:
        """Return whether a trial is waiting, running on any machine, or still to be drawn."""
        counted = self._counted()
        left = not self.grid and len(counted) < self.count
        return left or any(not trial.state.is_finished() for trial in counted)

    def _open(self, claims: Sequence[Claim]) -> "list[optuna.Trial]":
        """Return the trials of claims that are still RUNNING. Another machine can have marked some as failed."""
        optuna = optuna_module()
        numbers = {claim.number for claim in claims}
        running = self._study.get_trials(deepcopy=False, states=(self._states.RUNNING,))
        return [optuna.Trial(self._study, trial._trial_id) for trial in running if trial.number in numbers]  # noqa: SLF001 - optuna.Trial needs the id, which has no public name

    def _counted(self) -> "list[optuna.trial.FrozenTrial]":
        """Return the trials, without those that have a successor and those that duplicate an earlier one."""
        trials = self._study.get_trials(deepcopy=False)
        succeeded = {trial.user_attrs.get(AFTER) for trial in trials}
        counted: list[optuna.trial.FrozenTrial] = []
        taken: set[Any] = set()
        for trial in trials:
            attributes = trial.user_attrs
            nameless = NAME not in attributes
            if trial.number in succeeded or attributes.get(SURPLUS) or (nameless and trial.state.is_finished()):
                continue
            key = attributes.get(NAME) if self.grid else attributes.get(AFTER)
            if (key is not None and key in taken) or (self.grid and nameless):
                continue
            taken.add(key)
            if self.grid or len(counted) < self.count:
                counted.append(trial)
        return counted

    def _take_over(self) -> None:
        """Replace each running trial whose worker is gone by a waiting successor."""
        for trial in self._study.get_trials(deepcopy=False, states=(self._states.RUNNING,)):
            if not self._abandoned(trial):
                continue
            if NAME in trial.user_attrs and trial.number in {each.number for each in self._counted()}:
                self._succeed(trial)
            self._study.tell(trial.number, state=self._states.FAIL, skip_if_finished=True)

    def _succeed(self, trial: "optuna.trial.FrozenTrial", *marks: str) -> None:
        point, name = trial.user_attrs[POINT], trial.user_attrs[NAME]
        attributes = {NAME: name, POINT: point, AFTER: trial.number, **dict.fromkeys(marks, True)}
        self._study.enqueue_trial(point, user_attrs=attributes)

    def _abandoned(self, trial: "optuna.trial.FrozenTrial") -> bool:
        """Return whether the worker of a running trial is gone.

        The lock of the trial shows this on the same machine, and its heartbeats on other machines.
        """
        name, worker = trial.user_attrs.get(NAME), trial.user_attrs.get(WORKER)
        if worker == self._worker or self.local:  # all locks of a local study are here, even if the host name changes
            handle = Place(self.out, name).lock() if name is not None else None
            if handle is not None:
                os.close(handle)
            return name is None or handle is not None
        # Measure with our own clock, because the clocks of machines differ.
        beat, now = trial.user_attrs.get(BEAT), time.monotonic()
        if trial.number not in self._seen or self._seen[trial.number][0] != beat:
            self._seen[trial.number] = (beat, now)
        return now - self._seen[trial.number][1] > GRACE
