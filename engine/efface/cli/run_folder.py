"""The output folder of a resumable run: which run owns it, whether that run has finished, and where to resume."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from efface.files import PARTIAL, check_output, in_words, locked_folder, remove_leftovers, remove_whole, write_whole
from efface.hf.train.checkpoints import REPLACED, checkpoints, newest_checkpoint, set_aside

RECORD = "run.json"


class RunFolder:
    """An output folder with ``run.json``, which records the identity of the run and whether it has finished.

    Args:
        folder: the output folder.
        overwrite: allow replacing a finished run, the run of another command, or other files.
        inputs: files that the run reads, by flag. They must not be in the folder; see ``check_output``.

    Raises:
        FileExistsError: the folder contains other files or a finished run, and ``overwrite`` is False.
        NotADirectoryError: the path is a file.
        ValueError: an input is in the folder.
    """

    def __init__(self, folder: Path, *, overwrite: bool, inputs: Mapping[str, str | Path | None] | None = None) -> None:
        self.path = folder
        self.removed = ""  # what ``begin`` has removed, as text for the user
        self._overwrite = overwrite
        check_output(folder, overwrite=True, inputs=inputs)
        self._check()

    def _check(self) -> None:
        folder, overwrite = self.path, self._overwrite
        self._record = self._read()
        if self._record is None:
            # A run that was killed while it wrote its first record leaves only that partial file.
            if not (folder.is_dir() and all(path.name.startswith(PARTIAL) for path in folder.iterdir())):
                check_output(folder, overwrite=overwrite)
        elif self._record["finished"] and not overwrite:
            raise FileExistsError(
                f"output folder {str(folder)!r} is not empty: it contains a finished run, so there is nothing to "
                "continue; choose another, or add --overwrite"
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the file lock of the folder. The system releases it when the process ends, even if it is killed.

        Raises:
            FileExistsError: another process holds the lock, or has finished the run in the meantime.
        """
        with locked_folder(self.path):
            self._check()  # another process may have finished the run in the meantime
            yield

    def begin(self, identity: dict[str, Any]) -> Path | None:
        """Record the run as the owner of the folder. Return the checkpoint to resume from, or None to start.

        A run of the same identity continues even with ``overwrite``, because its result is bitwise the same.

        Raises:
            FileExistsError: the folder contains an unfinished run of another identity, and ``overwrite`` is False. The
                message lists the differences.
        """
        identity = json.loads(json.dumps(identity, default=str))
        if self._record is not None and not self._record["finished"]:
            if self.continues(identity):
                remove_leftovers(self.path)
                return newest_checkpoint(self.path)
            if not self._overwrite:
                changes = differences(self._record["identity"], identity)
                raise FileExistsError(
                    f"output folder {str(self.path)!r} contains an unfinished run of another command; choose another "
                    f"folder, or add --overwrite. Differences: {'; '.join(changes)}"
                )
        remove_leftovers(self.path)
        if self._overwrite:
            # When this run resumes later, it must not find a checkpoint of the other run.
            self.removed = set_aside(self.path)
        self._write({"finished": False, "identity": identity})
        return None

    def replaced_in_words(self, *also: str) -> str:
        """Return, as text, the files of another run that will be removed when this run has written its model.

        Args:
            also: glob patterns of further files that this run replaces.
        """
        there = sorted((self.path / REPLACED).glob("*"))
        there += sorted({path for pattern in also for path in self.path.glob(pattern)})
        return in_words(there) if there and self._overwrite else ""

    def settle(self) -> None:
        """Remove the checkpoints of the replaced run. Call it when the new model is completely written."""
        if (aside := self.path / REPLACED).is_dir():
            remove_whole(aside)

    def continues(self, identity: dict[str, Any]) -> bool:
        """Return whether the folder contains an unfinished run of this identity."""
        identity = json.loads(json.dumps(identity, default=str))
        record = self._record
        return record is not None and not record["finished"] and not differences(record["identity"], identity)

    def continue_from(self, identity: dict[str, Any]) -> None:
        """Record the run as the owner of the folder, whatever the folder contains.

        For runs with ``--resume-from-checkpoint``, where the user has named the checkpoint.
        """
        self._write({"finished": False, "identity": json.loads(json.dumps(identity, default=str))})

    def abandon(self) -> None:
        """Restore the previous record, unless there is a checkpoint. Call it after an error that would occur again."""
        if (self.path / REPLACED).is_dir() or checkpoints(self.path):
            return
        if self._record is None:
            (self.path / RECORD).unlink(missing_ok=True)
        else:
            self._write(self._record)

    def finish(self) -> None:
        """Record the run as finished."""
        record = self._read()
        if record is not None:
            self._write({**record, "finished": True})

    def _read(self) -> dict[str, Any] | None:
        try:
            record = json.loads((self.path / RECORD).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
        return record if isinstance(record, dict) and {"finished", "identity"} <= record.keys() else None

    def _write(self, record: dict[str, Any]) -> None:
        write_whole(self.path / RECORD, json.dumps(record, indent=2))


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """Return the differences between two identities, each as ``name: was X, is Y``.

    An argument that only one of them has is not a difference: another version of transformers added or removed it.
    """
    if isinstance(before, dict) and isinstance(now, dict):
        keys = before.keys() & now.keys() if name == "arguments" else before.keys() | now.keys()
        prefix = "" if name in ("", "arguments", "plan") else f"{name}."
        return [change for key in sorted(keys) for change in differences(before.get(key), now.get(key), prefix + key)]
    return [] if before == now else [f"{name}: was {before!r}, is {now!r}"]
