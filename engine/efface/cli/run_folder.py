"""The output folder of a run that can be killed: whose it is, whether it is done, and where to go on."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from efface.files import PARTIAL, check_output, in_words, locked_folder, remove_leftovers, remove_whole, write_whole
from efface.hf.train.checkpoints import REPLACED, checkpoints, newest_checkpoint, set_aside

RECORD = "run.json"


class RunFolder:
    """An output folder with ``run.json``, which holds the identity of its run and whether it is finished.

    Args:
        folder: of the run.
        overwrite: whether the files of another or a finished run may be replaced.
        inputs: what the run reads, which must not be in the folder; see ``check_output``.

    Raises:
        FileExistsError: a folder with other things in it, or with a finished run, without ``overwrite``.
        NotADirectoryError: a file of that name.
        ValueError: an input in the folder.
    """

    def __init__(self, folder: Path, *, overwrite: bool, inputs: Mapping[str, str | Path | None] | None = None) -> None:
        self.path = folder
        self.removed = ""  # by ``begin`` already, in words
        self._overwrite = overwrite
        check_output(folder, overwrite=True, inputs=inputs)
        self._look()

    def _look(self) -> None:
        folder, overwrite = self.path, self._overwrite
        self._record = self._read()
        if self._record is None:
            # A run killed in its first moments leaves nothing but its half-written record.
            if not (folder.is_dir() and all(path.name.startswith(PARTIAL) for path in folder.iterdir())):
                check_output(folder, overwrite=overwrite)
        elif self._record["finished"] and not overwrite:
            raise FileExistsError(
                f"output folder {str(folder)!r} is not empty; choose another, or add --overwrite: it holds a finished "
                "run, so there is nothing to continue"
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from the folder; the system lets go of it when this one ends, however it does.

        Raises:
            FileExistsError: another process works on it.
        """
        with locked_folder(self.path):
            self._look()  # another process may have finished the run in the meantime
            yield

    def begin(self, identity: dict[str, Any]) -> Path | None:
        """Return the checkpoint to continue from, or None to start; the folder is this run's from now on.

        A run of equal identity continues, also with ``overwrite``: the result is the same, bit for bit.

        Raises:
            FileExistsError: the folder of another run, without ``overwrite``; says what differs.
        """
        identity = json.loads(json.dumps(identity, default=str))
        if self._record is not None and not self._record["finished"]:
            if self.continues(identity):
                remove_leftovers(self.path)
                return newest_checkpoint(self.path)
            if not self._overwrite:
                changes = differences(self._record["identity"], identity)
                raise FileExistsError(
                    f"output folder {str(self.path)!r} holds an unfinished run of another command; choose another "
                    f"folder, or add --overwrite. What differs: {'; '.join(changes)}"
                )
        remove_leftovers(self.path)
        if self._overwrite:
            # A later continuation must not take another run's checkpoint for its own.
            self.removed = set_aside(self.path)
        self._write({"finished": False, "identity": identity})
        return None

    def replaced_in_words(self, *also: str) -> str:
        """Return what of another run goes when this one is whole; ``also`` are patterns of files that it replaces."""
        there = sorted((self.path / REPLACED).glob("*"))
        there += sorted({path for pattern in also for path in self.path.glob(pattern)})
        return in_words(there) if there and self._overwrite else ""

    def settle(self) -> None:
        """Remove the checkpoints of the run that this one replaces, whose model is whole now."""
        if (aside := self.path / REPLACED).is_dir():
            remove_whole(aside)

    def continues(self, identity: dict[str, Any]) -> bool:
        """Whether the folder holds an unfinished run of this identity."""
        identity = json.loads(json.dumps(identity, default=str))
        record = self._record
        return record is not None and not record["finished"] and not differences(record["identity"], identity)

    def continue_from(self, identity: dict[str, Any]) -> None:
        """Make the folder this run's, whatever is in it: the checkpoint to start from was named."""
        self._write({"finished": False, "identity": json.loads(json.dumps(identity, default=str))})

    def abandon(self) -> None:
        """Leave the folder as it was: a run that was wrong from the start is none to continue."""
        if (self.path / REPLACED).is_dir() or checkpoints(self.path):
            return
        if self._record is None:
            (self.path / RECORD).unlink(missing_ok=True)
        else:
            self._write(self._record)

    def finish(self) -> None:
        """Note that everything is written."""
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
    """Return what differs between two identities, one ``name: before, now after`` each.

    Arguments that only one of them has came or went with a version of transformers, and are no difference.
    """
    if isinstance(before, dict) and isinstance(now, dict):
        keys = before.keys() & now.keys() if name == "arguments" else before.keys() | now.keys()
        prefix = "" if name in ("", "arguments", "plan") else f"{name}."
        return [change for key in sorted(keys) for change in differences(before.get(key), now.get(key), prefix + key)]
    return [] if before == now else [f"{name}: was {before!r}, is {now!r}"]
