"""Files and folders that are whole or not there at all: atomic writes, folders that change places, locks."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from uuid import uuid4

# What is being written, or is on its way out: no pattern of transformers takes it for a checkpoint.
PARTIAL = ".partial-"


@contextmanager
def written_file(path: Path, *, durable: bool = True, private: bool = False) -> Iterator[Path]:
    """Yield the path of a file to write, which is renamed to ``path`` when the block ends without an error.

    Two that write at once do not see each other, and the last one's file stays.

    Args:
        path: the file; its folder is made if it is not there.
        durable: wait until the content is on the disk, so that a machine that fails leaves no empty file either. For
            files whose readers tell a damaged one, that is not needed.
        private: let nobody but the user read it, at no time, nor look into a folder that is made for it.
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
    """Make an empty file that nobody but the user can read; one that is there stays as it is.

    Raises:
        OSError: it cannot be made.
    """
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


def private_folder(path: Path) -> Path:
    """Make a folder, and those above it that are missing, that nobody but the user can look into, and return it.

    One that is there stays as it is: whoever made it has chosen who may look.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(mode=0o700, exist_ok=True)
    return path


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that it is there whole or as it was; text in UTF-8."""
    with written_file(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def written_folder(
    folder: Path, *, keeps: Callable[[Path], bool] | None = None, private: bool = False
) -> Iterator[Path]:
    """Yield an empty folder, which takes the place of ``folder`` when the block ends without an error.

    Args:
        folder: the folder; the one that it is in is made if it is not there.
        keeps: whether a folder that another process has put there meanwhile stays, and the new one goes.
        private: let nobody but the user look into it.
    """
    private_folder(folder.parent) if private else folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f"{PARTIAL}{uuid4().hex}")
    partial.mkdir(mode=0o700 if private else 0o777)  # less the user's umask, unlike that of a temporary folder
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
    """Remove what killed processes left half written or half deleted, if it is so old; not what is being written."""
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
    except FileNotFoundError:  # another process was faster
        return False


def check_output(
    folder: str | Path,
    *,
    overwrite: bool,
    inputs: Mapping[str, str | Path | None] | None = None,
    replaced: Sequence[str] | None = None,
) -> Path:
    """Return the folder as a path, if a run may write there.

    Args:
        folder: the output folder.
        overwrite: whether it may hold other things.
        inputs: what the run reads, by flags: paths, or names on the Hub, which are no paths here.
        replaced: names of what the run replaces in the folder; None is anything in it.

    Raises:
        FileExistsError: a folder that is not empty, without ``overwrite``.
        FileNotFoundError: a link to what does not exist.
        NotADirectoryError: a file of that name.
        ValueError: an input that would be replaced.
    """
    path = Path(folder)
    refuse_inputs([path] if replaced is None else [path / name for name in replaced], inputs or {})
    if path.is_symlink() and not path.exists():
        raise FileNotFoundError(
            f"output {str(path)!r} is a link to {str(path.readlink())!r}, which does not exist; make that folder, or "
            "choose another"
        )
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"output {str(path)!r} is a file; choose a folder")
    if path.exists() and any(path.iterdir()) and not overwrite:
        raise FileExistsError(f"output folder {str(path)!r} is not empty; choose another, or add --overwrite")
    return path


def refuse_inputs(outputs: Iterable[Path], inputs: Mapping[str, str | Path | None]) -> None:
    """Raise ValueError for an input that is one of the outputs, or lies in one; links are followed."""
    targets = [(output, output.expanduser().resolve()) for output in outputs if output.exists()]
    for flag, given in inputs.items():
        place = None if given is None else Path(given).expanduser()
        if place is None or not place.exists():  # a name on the Hub, or what is refused when it is read
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
    """Return a descriptor that holds the lock of a file or folder as long as any process has it open.

    Args:
        path: a folder, or a file that is made if it is not there.
        wait: until no other process has the lock; else return None where one has.
        shared: a lock that others may share, and that one who is to be alone has to wait for.

    Raises:
        OSError: a file system without locks.
    """
    import fcntl  # noqa: PLC0415 - Windows has none

    path.parent.mkdir(parents=True, exist_ok=True)
    # Where locks are those of a network, one that is to be alone has to be able to write.
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
    """Wait for the lock of a file, and hold it."""
    handle = take_lock(path, wait=True)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Keep other processes from an output folder; the system lets go of it when this one ends, however it does.

    Args:
        folder: is made if it is not there, and is gone again where nothing came to be in it.

    Raises:
        FileExistsError: another process works on it.
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
        with suppress(OSError):  # those with something in them stay
            for parent in missing:
                parent.rmdir()


@contextmanager
def held(path: Path) -> Iterator[bool]:
    """Hold the lock of what is there; yield False if another has it. Without locks, it is held by nobody."""
    handle: int | None = -1  # of a file system or a system without locks
    with suppress(OSError, ImportError):
        handle = take_lock(path)
    try:
        yield handle is not None
    finally:
        if handle is not None and handle >= 0:
            os.close(handle)


def in_words(paths: Sequence[Path], shown: int = 6) -> str:
    """Return how many files there are in files and folders, how large they are, and their names."""
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()]
    names = [path.name for path in paths]
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    size = bytes_in_words(sum(file.stat().st_size for file in files))
    return f"{len(files)} {'file' if len(files) == 1 else 'files'}, {size}: {', '.join(names[:shown])}{more}"


def bytes_in_words(count: float) -> str:
    """Return ``1.50 GiB`` for a number of bytes."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} bytes"


def is_held(path: Path) -> bool:
    """Whether anybody has the lock of what is there."""
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
