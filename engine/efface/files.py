"""Atomic writes of files and folders, removal of leftover temporary files, file locks, and output folder checks."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from uuid import uuid4

# Prefix of files and folders that are being written or deleted. No pattern of transformers matches it as a checkpoint.
PARTIAL = ".partial-"


@contextmanager
def written_file(path: Path, *, durable: bool = True, private: bool = False) -> Iterator[Path]:
    """Yield the path of a temporary file, which is renamed to ``path`` when the block ends without an error.

    If two processes write at the same time, they use separate temporary files, and the last rename wins.

    Args:
        path: the file; its folder is created if it does not exist.
        durable: flush the content to disk (fsync) before the rename, so that a system crash cannot leave an empty
            file. Not needed for files whose readers detect damage.
        private: make the file, and any folder created for it, accessible only to the user, from creation on.
    """
    private_folder(path.parent) if private else path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{PARTIAL}{uuid4().hex}-{path.name}")
    with ExitStack() as stack:
        stack.callback(partial.unlink, missing_ok=True)
        if private:
            private_file(partial)
            stack.enter_context(held(partial))
        yield partial
        if durable:
            _sync(partial)
        partial.replace(path)


def private_file(path: Path) -> None:
    """Create an empty file that only the user can read and write; a no-op if the file exists.

    Raises:
        OSError: if the file cannot be created.
    """
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


def private_folder(path: Path) -> Path:
    """Create a folder and its missing parents, accessible only to the user, and return the folder.

    Folders that exist keep their permissions.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(mode=0o700, exist_ok=True)
    return path


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file atomically, text as UTF-8; if writing fails, the old file stays."""
    with written_file(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def written_folder(
    folder: Path, *, keeps: Callable[[Path], bool] | None = None, private: bool = False
) -> Iterator[Path]:
    """Yield an empty temporary folder, which replaces ``folder`` when the block ends without an error.

    Args:
        folder: the folder to write; its parent is created if it does not exist.
        keeps: called with ``folder`` if it exists when the block ends. If it returns true, that folder (which another
            process may have written in the meantime) is kept and the new one is deleted. None always replaces.
        private: make the folder and its contents accessible only to the user.
    """
    private_folder(folder.parent) if private else folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f"{PARTIAL}{uuid4().hex}")
    partial.mkdir(mode=0o700 if private else 0o777)  # the umask applies; tempfile.mkdtemp always uses 0o700
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, partial, ignore_errors=True)
        stack.enter_context(held(partial))
        yield partial
        if private:
            for path in partial.rglob("*"):
                path.chmod(0o700 if path.is_dir() else 0o600)
        _sync_all(partial)
        if keeps is None or not folder.exists() or not keeps(folder):
            _take_place(partial, folder)


@contextmanager
def written_whole(folder: Path, *, writes: bool = True, replaced: Sequence[str] = ()) -> Iterator[Path]:
    """Yield an empty temporary folder; its contents move into ``folder`` when the block ends without an error.

    Existing files and folders with the same names are replaced. If the block fails, ``folder`` is unchanged.

    Args:
        folder: the target folder; it is created if it does not exist.
        writes: whether this process writes. If not, because another rank does, ``folder`` itself is yielded.
        replaced: glob patterns of old files in ``folder`` that are deleted before the new files move in, even if no
            new file has the same name.
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
    """Flush a folder to disk (fsync), then rename it to ``target``; an existing ``target`` is replaced.

    The replacement takes two renames. If the process is killed between them, ``target`` does not exist, and the old
    folder has a temporary name that ``remove_leftovers`` finds.
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
    """Delete a folder; it is renamed first, so that an interrupted deletion leaves no partial folder at its path."""
    shutil.rmtree(_set_aside(folder), ignore_errors=True)


def _set_aside(folder: Path) -> Path:
    aside = folder.with_name(f"{PARTIAL}old-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    return folder.rename(aside)


def remove_leftovers(folder: str | Path, *, seconds: float = 0) -> None:
    """Delete the temporary files and folders that killed processes left in ``folder``.

    Entries whose lock a process holds are being written, and are kept.

    Args:
        folder: the folder to clean.
        seconds: delete only entries that were last modified more than this many seconds ago; 0 deletes all.
    """
    for path in Path(folder).glob(f"{PARTIAL}*"):
        if (seconds and not _is_older(path, seconds)) or is_held(path):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _is_older(path: Path, seconds: float) -> bool:
    try:
        return time.time() - path.stat().st_mtime > seconds
    except FileNotFoundError:  # another process has deleted it
        return False


def check_output(
    folder: str | Path,
    *,
    overwrite: bool,
    inputs: Mapping[str, str | Path | None] | None = None,
    replaced: Sequence[str] | None = None,
) -> Path:
    """Check that a run can write to an output folder, and return the folder as a path.

    Args:
        folder: the output folder.
        overwrite: whether the folder may contain files.
        inputs: inputs of the run by flag: paths, or names on the Hub. Names that are not existing paths are ignored.
        replaced: names of the files that the run replaces in the folder; None means that it can replace any of them.

    Raises:
        FileExistsError: if the folder is not empty and ``overwrite`` is false.
        FileNotFoundError: if the folder is a symbolic link to a path that does not exist.
        NotADirectoryError: if the path is a file.
        ValueError: if the run would replace one of its inputs.
    """
    path = Path(folder)
    refuse_inputs([path] if replaced is None else [path / name for name in replaced], inputs or {})
    if path.is_symlink() and not path.exists():
        raise FileNotFoundError(
            f"output {str(path)!r}: expected a folder, got a link to {str(path.readlink())!r}, which does not exist; "
            "create that folder, or choose another"
        )
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"output {str(path)!r}: expected a folder, got a file; choose another path")
    if path.exists() and any(path.iterdir()) and not overwrite:
        raise FileExistsError(f"output folder {str(path)!r} is not empty; choose another, or add --overwrite")
    return path


def refuse_inputs(outputs: Iterable[Path], inputs: Mapping[str, str | Path | None]) -> None:
    """Raise ValueError if an input is one of the outputs or is inside one; symbolic links are resolved first."""
    targets = [(output, output.expanduser().resolve()) for output in outputs if output.exists()]
    for flag, given in inputs.items():
        place = None if given is None else Path(given).expanduser()
        if place is None or not place.exists():  # a name on the Hub, or a path that fails later, when it is read
            continue
        place = place.resolve()
        for output, target in targets:
            if target == place or target in place.parents:
                how = "is" if target == place else "contains"
                raise ValueError(
                    f"output {str(output)!r} {how} the input {flag} {str(given)!r}, which would be replaced; choose "
                    "another output"
                )


def take_lock(path: Path, *, wait: bool = False, shared: bool = False) -> int | None:
    """Lock a file or folder (flock), and return the file descriptor that holds the lock.

    The lock is released when every copy of the descriptor, including those inherited by child processes, is closed.

    Args:
        path: a folder, or a file, which is created if it does not exist.
        wait: wait until the lock is free. If false, return None if another process holds it.
        shared: take a shared lock, which any number of processes can hold at a time. An exclusive lock is granted only
            while no other process holds a lock.

    Raises:
        OSError: if the file system does not support locks.
        ImportError: on Windows, which has no ``fcntl``.
    """
    import fcntl  # noqa: PLC0415 - Windows has none

    path.parent.mkdir(parents=True, exist_ok=True)
    # On a network file system, an exclusive lock needs a descriptor that is open for writing.
    writes = not path.is_dir() and not shared and not (path.exists() and not os.access(path, os.W_OK))
    handle = os.open(path, os.O_RDWR | os.O_CREAT if writes else os.O_RDONLY, 0o644)
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        os.close(handle)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return handle


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait for the exclusive lock of a file, and hold it while the block runs."""
    handle = take_lock(path, wait=True)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold the lock of an output folder while the block runs, so that no other run writes there.

    The system releases the lock when the process ends, also if it is killed.

    Args:
        folder: the folder. It is created if it does not exist; folders created here are deleted at the end if they
            are still empty.

    Raises:
        FileExistsError: if another process holds the lock.
    """
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with held(folder) as mine:
            if not mine:
                raise FileExistsError(
                    f"output folder {str(folder)!r}: another process is writing there; wait for it, or stop it"
                )
            yield
    finally:
        with suppress(OSError):  # rmdir fails for folders that are not empty, which stay
            for parent in missing:
                parent.rmdir()


@contextmanager
def held(path: Path) -> Iterator[bool]:
    """Try to hold the lock of a file or folder while the block runs; yield False if another process holds it.

    If the file system or the operating system does not support locks, this always yields True.
    """
    handle: int | None = -1  # stays -1 without support for locks
    with suppress(OSError, ImportError):
        handle = take_lock(path)
    try:
        yield handle is not None
    finally:
        if handle is not None and handle >= 0:
            os.close(handle)


def in_words(paths: Sequence[Path], shown: int = 6) -> str:
    """Return a summary of files and folders: number of files, total size and the first ``shown`` names of ``paths``."""
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()]
    names = [path.name for path in paths]
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    size = bytes_in_words(sum(file.stat().st_size for file in files))
    return f"{len(files)} {'file' if len(files) == 1 else 'files'}, {size}: {', '.join(names[:shown])}{more}"


def bytes_in_words(count: float) -> str:
    """Return a number of bytes in readable form, such as ``1.50 GiB``."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} bytes"


def is_held(path: Path) -> bool:
    """Return whether a process holds the lock of a file or folder; False if the path does not exist."""
    if not path.exists():
        return False
    with held(path) as mine:
        return not mine


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
