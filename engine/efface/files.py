"""Files and folders that are whole or not there at all: atomic writes, folders that change places, locks."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

# What is being written, or is on its way out: no pattern of transformers takes it for a checkpoint.
PARTIAL = ".partial-"


@contextmanager
def written_file(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield the path of a file to write, which is renamed to ``path`` when the block ends without an error.

    Two that write at once do not see each other, and the last one's file stays.

    Args:
        path: the file; its folder is made if it is not there.
        durable: wait until the content is on the disk, so that a machine that fails leaves no empty file either. For
            files whose readers tell a damaged one, that is not needed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{PARTIAL}{uuid4().hex}-{path.name}")
    try:
        yield partial
        if durable:
            _sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that it is there whole or as it was; text in UTF-8."""
    with written_file(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def written_folder(folder: Path, *, keeps: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """Yield an empty folder, which takes the place of ``folder`` when the block ends without an error.

    Args:
        folder: the folder; the one that it is in is made if it is not there.
        keeps: whether a folder that another process has put there meanwhile stays, and the new one goes.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=folder.parent))
    partial.chmod(0o755)  # a temporary folder is for its owner alone
    try:
        yield partial
        _sync_all(partial)
        if keeps is None or not folder.exists() or not keeps(folder):
            _take_place(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
    partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=folder))
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
            item.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def move_whole(source: Path, target: Path) -> None:
    """Move a folder to its name once all of it is on the disk; a folder of that name gives way only then.

    A process that is killed between the two renames leaves no folder of that name, and the old one under a name that
    ``remove_leftovers`` knows.
    """
    _sync_all(source)
    _take_place(source, target)


def _sync_all(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            _sync(Path(parent, name))
        _sync(Path(parent))


def _take_place(source: Path, target: Path) -> None:
    old = _set_aside(target) if target.exists() else None
    source.rename(target)
    _sync(target.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def remove_whole(folder: Path) -> None:
    """Remove a folder so that a process killed meanwhile leaves no part of it under its name."""
    shutil.rmtree(_set_aside(folder), ignore_errors=True)


def _set_aside(folder: Path) -> Path:
    condemned = folder.with_name(f"{PARTIAL}old-{folder.name}")
    shutil.rmtree(condemned, ignore_errors=True)
    return folder.rename(condemned)


def remove_leftovers(folder: str | Path, *, seconds: float = 0) -> None:
    """Remove what killed processes left half written or half deleted, if it is so old."""
    for path in Path(folder).glob(f"{PARTIAL}*"):
        if seconds and not _is_older(path, seconds):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _is_older(path: Path, seconds: float) -> bool:
    try:
        return time.time() - path.stat().st_mtime > seconds
    except FileNotFoundError:  # another process was faster
        return False


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


def take_lock(path: Path, *, wait: bool = False) -> int | None:
    """Return a descriptor that holds the lock of a file or folder as long as any process has it open.

    Args:
        path: a folder, or a file that is made if it is not there.
        wait: until no other process has the lock; else return None where one has.

    Raises:
        OSError: a file system without locks.
    """
    import fcntl  # noqa: PLC0415 - Windows has none

    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        os.close(handle)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return handle


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait for the lock of a file, and hold it."""
    handle = take_lock(path, wait=True)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
