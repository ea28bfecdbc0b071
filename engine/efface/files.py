"""Checkpoints: whole or not there at all, and complete enough that a killed run continues bit for bit."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

PARTIAL = (
    ".partial-"  # what is being written, or is on its way out: no pattern of transformers takes it for a checkpoint
)


def remove_leftovers(folder: str | Path) -> None:
    """Remove what killed processes left half written or half deleted."""
    for path in Path(folder).glob(f"{PARTIAL}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def remove_whole(folder: Path) -> None:
    """Remove a folder so that a process killed meanwhile leaves no part of it under its name."""
    condemned = folder.with_name(f"{PARTIAL}old-{folder.name}")
    shutil.rmtree(condemned, ignore_errors=True)
    folder.rename(condemned)
    shutil.rmtree(condemned, ignore_errors=True)


def move_whole(source: Path, target: Path) -> None:
    """Move a folder to its name once all of it is on the disk; a folder of that name gives way only then."""
    for parent, _, names in os.walk(source):
        for name in names:
            _sync(Path(parent, name))
        _sync(Path(parent))
    if target.exists():
        remove_whole(target)
    source.rename(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_folder(new: Path, folder: Path) -> None:
    """Put ``new`` in the place of ``folder``, in two renames; killed between them, the old one is ``.<name>-old``."""
    old = folder.with_name(f".{folder.name}-old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)  # noqa: PTH105 - atomic within one file system
    os.replace(new, folder)  # noqa: PTH105
    shutil.rmtree(old, ignore_errors=True)


def check_output(folder: str | Path, *, overwrite: bool) -> Path:
    """Return the folder as a path, if a run may write there.

    Raises:
        FileExistsError: a folder that is not empty, without ``overwrite``.
        NotADirectoryError: a file of that name.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"output {str(path)!r} is a file; choose a folder")
    if path.exists() and any(path.iterdir()) and not overwrite:
        raise FileExistsError(f"output folder {str(path)!r} is not empty; choose another, or add --overwrite")
    return path


@contextmanager
def written_whole(folder: Path, *, writes: bool = True, replaced: Sequence[str] = ()) -> Iterator[Path]:
    """Yield an empty folder; its contents move into ``folder`` when the block ends without an error.

    Files of the same names are replaced. If the block fails, ``folder`` is as it was. A process that ``writes``
    nothing, because another one does, is handed ``folder`` itself.

    Args:
        folder: is made if it is not there.
        writes: whether this process writes.
        replaced: patterns of files that must not stay beside new ones, though none of these has their name.
    """
    if not writes:
        yield folder
        return
    folder.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
    try:
        yield partial
        fresh = sorted(partial.iterdir())
        for pattern in replaced:
            for path in folder.glob(pattern):
                path.unlink()
        for item in fresh:
            target = folder / item.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(item, target)  # noqa: PTH105 - atomic within one file system
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait for a lock file of this machine, and hold it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there whole or as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
