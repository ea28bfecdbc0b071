"""Data sets of the Hub, and the files that stand for them in a folder."""

from pathlib import Path

_SUFFIXES = (".json", ".jsonl", ".parquet", ".csv")


def check_source(source: str, where: str) -> None:
    """Raise ValueError for more parts than ``name:config:split``."""
    if source.count(":") > 2:
        raise ValueError(f"{where}: expected a file or name:config:split of a Hub data set, got {source!r}")


def file_stem(source: str) -> str:
    """Return what the file of a Hub data set is called in a folder: its configuration, else the end of its name."""
    name, _, rest = source.partition(":")
    return rest.partition(":")[0] or name.rpartition("/")[2]


def local_source(source: str, folder: str | Path, flag: str) -> str:
    """Return the file in ``folder`` that stands for a Hub data set; a source that is a file already stays.

    Raises:
        FileNotFoundError: no such folder, or no such file in it.
    """
    if Path(source).expanduser().suffix.lower() in _SUFFIXES:
        return source
    place = Path(folder).expanduser()
    if not place.is_dir():
        raise FileNotFoundError(f"--data: expected a folder, got {str(folder)!r}; check the path")
    stem = file_stem(source)
    for suffix in _SUFFIXES:
        if (file := place / f"{stem}{suffix}").is_file():
            return str(file)
    raise FileNotFoundError(
        f"--data {str(folder)!r}: expected {stem}{'|'.join(_SUFFIXES)} in it, for {flag} {source}; put the file there, "
        f"or give {flag} its path"
    )
