"""Search for the files of runs (evaluations, training logs, audits) in folders, and assignment of files to runs."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from efface.evaluate.logs import EVAL, SUMMARY
from efface.hf.train.checkpoints import REPLACED

# In order of preference: logs with rows before means.
LOGS = (EVAL, "eval_log_aggregated.json", SUMMARY)
AUDIT = "AUDIT.json"
HISTORY = "trainer_state.json"

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# Folder in which `efface evaluate --retain-model` writes the evaluation of the retain model; it is not a run.
RETAIN = "retain_model"
# Folders of efface, open-unlearning and TOFU that contain the evaluation of the model in the parent folder.
_INSIDE = re.compile(r"evals?|evaluation|eval_results|audits?|ds_size\d+")


@dataclass
class RunFiles:
    """The files of one run.

    Attributes:
        folder: folder of the run, or the log itself if the path of a log was given.
        name: name of the run, unique in a report.
        logs: evaluation logs by step of the checkpoint; None is the final model.
        audit: file of the leak audit; None if there is no audit.
        histories: training logs by step of the checkpoint; None is the log of the whole run.
    """

    folder: Path
    name: str = ""
    logs: dict[int | None, Path] = field(default_factory=dict)
    audit: Path | None = None
    histories: dict[int | None, Path] = field(default_factory=dict)

    @property
    def is_run(self) -> bool:
        """Whether there is a log or a training log. An audit alone is not a run: it can cover several models."""
        return bool(self.logs or self.histories)

    @property
    def history(self) -> Path | None:
        """The training log of the whole run or, if there is none, that of the last checkpoint."""
        if None in self.histories or not self.histories:
            return self.histories.get(None)
        return self.histories[max(step for step in self.histories if step is not None)]


def find_runs(paths: Iterable[str | Path], *, without: Iterable[Path] = ()) -> list[RunFiles]:
    """Return the runs in folders, at any depth, sorted by name.

    A run is a folder with an evaluation, an audit or a training log. The files in its checkpoint folders belong to the
    run. A path to a file is read as a log, independent of the file's name.

    Args:
        paths: folders and logs.
        without: logs whose runs are excluded, such as those of the full and the retain model.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a folder contains nothing to report.
    """
    hidden = {_evaluation(path.resolve()) for path in without}
    runs: dict[Path, RunFiles] = {}
    for given in map(Path, paths):
        if not given.exists():
            raise FileNotFoundError(f"{str(given)!r} does not exist; pass a folder of runs, or an evaluation log")
        root = given.resolve()
        if root.is_file():
            runs.setdefault(root, RunFiles(root, logs={None: root}))
            continue
        files = list(_files(root))
        if not files:
            raise ValueError(
                f"{str(given)!r}: expected {', '.join(LOGS)}, {AUDIT} or {HISTORY} in the folder or its subfolders, "
                "got none; write the first by `efface evaluate --model DIR --output DIR`"
            )
        for path in files:
            _add(runs, path, root)
    shown = [run for run in runs.values() if hidden.isdisjoint(map(_evaluation, run.logs.values()))]
    _name(shown)
    return sorted(shown, key=lambda run: _natural(run.name))


def find_log(path: str | Path) -> Path:
    """Return ``path`` if it is a file, or the preferred log in the folder ``path``.

    Raises:
        FileNotFoundError: the path does not exist, or the folder contains no log.
    """
    path = Path(path)
    if path.is_dir():
        logs = [file for file in _files(path) if file.name in LOGS]
        # prefer the final model to checkpoints, short paths to long ones, and rows to means
        logs.sort(key=lambda file: (_step(file) is not None, len(file.parts), LOGS.index(file.name)))
        if logs:
            return logs[0]
    elif path.is_file():
        return path
    raise FileNotFoundError(f"{str(path)!r}: expected an evaluation log, or a folder with one of {', '.join(LOGS)}")


def find_retain_log(paths: Iterable[str | Path]) -> Path | None:
    """Return the log of the retain model that was evaluated together with the runs in the folders.

    Return None if there is no such log, or if there are several different ones. In the second case, each evaluation's
    stored Forget Quality refers to its own retain model.
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
    """Return the run's folder and the step of the checkpoint. The folder is ``root`` or below it."""
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
        # another evaluation of the same model, perhaps on another split, becomes a separate run
        runs.setdefault(path.parent, RunFiles(path.parent)).logs.setdefault(step, path)


def _evaluation(log: Path) -> Path:
    """Return the path that identifies a log's evaluation: its folder, or the log itself if its name is not standard."""
    return log.parent if log.name in LOGS else log


def _name(runs: Sequence[RunFiles]) -> None:
    """Name each run by its folder relative to the common parent of all runs. Audits alone do not affect the parent."""
    common = [run.folder.parent for run in runs if run.is_run] or [run.folder.parent for run in runs]
    base = Path(os.path.commonpath(common)) if common else Path()
    for run in runs:
        name = run.folder.relative_to(base).as_posix() if base in run.folder.parents else run.folder.name
        name = name.removesuffix(".json") if run.folder.is_file() else name
        run.name = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name)


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Return a sort key that puts ``run-2`` before ``run-10``."""
    parts = re.split(r"(\d+)", name)
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in parts]
