"""Output folders: never mixed with what is there by accident, never left half written."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


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
