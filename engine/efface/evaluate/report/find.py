"""Which files belong to which run: evaluations, a training log, an audit, in folders as tools leave them."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from efface.evaluate.logs import EVAL, SUMMARY
from efface.hf.train.checkpoints import REPLACED

# Most telling first: rows before means.
LOGS = (EVAL, "eval_log_aggregated.json", SUMMARY)
AUDIT = "AUDIT.json"
HISTORY = "trainer_state.json"

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# Where `efface evaluate --retain-model` puts what it compares with: no run.
RETAIN = "retain_model"
# Folders that hold what was found out about the model beside them, not a model: those of efface, open-unlearning, TOFU.
_INSIDE = re.compile(r"evals?|evaluation|eval_results|audits?|ds_size\d+")


@dataclass
class RunFiles:
    """The files of one run.

    Attributes:
        folder: of the run, or the log itself where one was named.
        name: unique in a report.
        logs: by step; None is the final model.
        audit: of the leak audit.
        histories: training logs, by step; None is that of the whole run.
    """

    folder: Path
    name: str = ""
    logs: dict[int | None, Path] = field(default_factory=dict)
    audit: Path | None = None
    histories: dict[int | None, Path] = field(default_factory=dict)

    @property
    def is_run(self) -> bool:
        """Whether there is more than an audit, which may be of several models."""
        return bool(self.logs or self.histories)

    @property
    def history(self) -> Path | None:
        """The training log that knows most."""
        if None in self.histories or not self.histories:
            return self.histories.get(None)
        return self.histories[max(step for step in self.histories if step is not None)]


def find_runs(paths: Iterable[str | Path], *, without: Iterable[Path] = ()) -> list[RunFiles]:
    """Return the runs in folders, at any depth, in the order of their names.

    A run is a folder with an evaluation, an audit or a training log; what lies in its checkpoint folders is part of it.
    A file that is named itself is taken for a log, whatever it is called.

    Args:
        paths: folders and logs.
        without: logs whose runs are left out: of the full and the retain model.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: nothing to report in one of the folders.
    """
    hidden = {_evaluation(path.resolve()) for path in without}
    runs: dict[Path, RunFiles] = {}
    for given in map(Path, paths):
        if not given.exists():
            raise FileNotFoundError(f"{str(given)!r} does not exist; expected a folder of runs, or an evaluation log")
        root = given.resolve()
        if root.is_file():
            runs.setdefault(root, RunFiles(root, logs={None: root}))
            continue
        files = list(_files(root))
        if not files:
            raise ValueError(
                f"{str(given)!r}: expected {', '.join(LOGS)}, {AUDIT} or {HISTORY} there or in folders below, got "
                "none; `efface evaluate --model DIR --output DIR` writes the first"
            )
        for path in files:
            _add(runs, path, root)
    shown = [run for run in runs.values() if hidden.isdisjoint(map(_evaluation, run.logs.values()))]
    _name(shown)
    return sorted(shown, key=lambda run: _natural(run.name))


def find_log(path: str | Path) -> Path:
    """Return the log that a file or folder stands for.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(path)
    if path.is_dir():
        logs = [file for file in _files(path) if file.name in LOGS]
        # the final model's before those of checkpoints, rows before means
        logs.sort(key=lambda file: (_step(file) is not None, len(file.parts), LOGS.index(file.name)))
        if logs:
            return logs[0]
    elif path.is_file():
        return path
    raise FileNotFoundError(f"{str(path)!r}: expected an evaluation log, or a folder with one of {', '.join(LOGS)}")


def find_retain_log(paths: Iterable[str | Path]) -> Path | None:
    """Return the log of the retain model that was evaluated with runs in the folders.

    None also where there are several: which of them a run was compared with shows in what its evaluation stored.
    """
    found: list[Path] = []
    for root in map(Path, paths):
        for folder, folders, names in os.walk(root):
            folders.sort()
            if Path(folder).name == RETAIN and LOGS[0] in names:
                found.append(Path(folder, LOGS[0]))
    return found[0] if len({path.read_bytes() for path in found}) == 1 else None


def _files(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in (RETAIN, REPLACED))
        yield from (Path(folder, name) for name in (*LOGS, AUDIT, HISTORY) if name in names)


def _step(path: Path) -> int | None:
    matches = [_CHECKPOINT.fullmatch(part) for part in path.parts]
    return next((int(match[1]) for match in reversed(matches) if match), None)


def _owner(path: Path, root: Path) -> tuple[Path, int | None]:
    """Return the run's folder and the step of the checkpoint; never a folder above the one that was given."""
    folder, step = path.parent, None
    while _INSIDE.fullmatch(folder.name) and folder != root:
        folder = folder.parent
    if match := _CHECKPOINT.fullmatch(folder.name):
        step = int(match[1])
        folder = folder if folder == root else folder.parent
    return folder, step


def _add(runs: dict[Path, RunFiles], path: Path, root: Path) -> None:
    folder, step = _owner(path, root)
    run = runs.setdefault(folder, RunFiles(folder))
    if path.name == HISTORY:
        run.histories.setdefault(step, path)
    elif path.name == AUDIT:
        run.audit = run.audit or path
    elif run.logs.setdefault(step, path).parent != path.parent:
        # another evaluation of the same model, on another split perhaps: a row of its own
        runs.setdefault(path.parent, RunFiles(path.parent)).logs.setdefault(step, path)


def _evaluation(log: Path) -> Path:
    """Return what names the evaluation that a log is of: its folder, or a file of a name that tells nothing."""
    return log.parent if log.name in LOGS else log


def _name(runs: Sequence[RunFiles]) -> None:
    """Name runs by their folders, from where these part; what is only an audit does not count there."""
    common = [run.folder.parent for run in runs if run.is_run] or [run.folder.parent for run in runs]
    base = Path(os.path.commonpath(common)) if common else Path()
    for run in runs:
        name = run.folder.relative_to(base).as_posix() if base in run.folder.parents else run.folder.name
        name = name.removesuffix(".json") if run.folder.is_file() else name
        run.name = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name)


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Order ``run-2`` before ``run-10``."""
    parts = re.split(r"(\d+)", name)
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in parts]
