"""Listing and purging of cache entries, with the data set each was built from where it is recorded.

=====================  ===========================================================================================
kind                   content
=====================  ===========================================================================================
tokens                 the rows of a data set as tokens, which anyone with the tokenizer can convert to text
reference              log-probabilities, keyed by digests of models and sequences; no text and no tokens
taught model           a small model that ``efface unlearn --scale`` trained on the data set
leftover               an incomplete file or folder of a killed process
=====================  ===========================================================================================
"""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from efface.files import PARTIAL, held, remove_whole
from efface.hf.text.token_cache import (
    DIGITS,
    REFERENCE,
    TAUGHT,
    TOKENS,
    cache_folder,
    file_digest,
    read,
    source_of,
)
from efface.keyed_store import remove_store, store_files
from efface.reference.cache import LogprobStore, sequence_keys

KINDS = ("tokens", "reference", "taught model", "leftover")
_NAME = re.compile(rf"(?:([0-9a-f]{{{DIGITS}}})-)?[0-9a-f]{{{DIGITS}}}")  # [digest of the data]-key


@dataclass(frozen=True)
class CacheEntry:
    """A file or folder of the cache.

    Attributes:
        kind: one of ``KINDS``.
        path: path of the file or folder.
        size: size in bytes.
        used: time of last use or modification, in seconds since 1970.
        data: digest of the data it was built from; "" if unknown.
        source: path or name of the data it was built from; "" if unknown.
    """

    kind: str
    path: Path
    size: int
    used: float
    data: str = ""
    source: str = ""

    @property
    def is_read(self) -> bool:
        """Whether this version of efface uses the entry; token files of old versions do not record their data."""
        return self.kind != "leftover" and (self.kind != "tokens" or bool(self.data))

    def days(self) -> float:
        """Return the days since the last use."""
        return max(0.0, time.time() - self.used) / 86_400


def entries(cache_dir: str | Path | None = None) -> list[CacheEntry]:
    """Return efface's entries in the cache folder; other files are ignored.

    Args:
        cache_dir: see ``token_cache.cache_folder``.
    """
    root = cache_folder(cache_dir)
    found = [entry for path in sorted((root / TOKENS).glob("*")) for entry in _entry_of_tokens(path)]
    if (store := root / REFERENCE).exists():
        found += _entry("reference", store, store_files(store))
    for path in sorted((root / TAUGHT).glob("*")):
        if path.is_dir():
            found += _entry("leftover" if path.name.startswith(PARTIAL) else "taught model", path, path.rglob("*"))
    return found


def _entry_of_tokens(path: Path) -> Iterator[CacheEntry]:
    if path.name.startswith(PARTIAL):
        yield from _entry("leftover", path, [path])
    elif path.suffix == ".arrow" and (match := _NAME.fullmatch(path.stem)):
        data = match[1] or ""
        yield from _entry("tokens", path, [path], data, source_of(path) if data else "")


def _entry(
    kind: str, path: Path, files: Sequence[Path] | Iterator[Path], data: str = "", source: str = ""
) -> Iterator[CacheEntry]:
    with suppress(FileNotFoundError):  # another process removed it meanwhile
        stats = [file.stat() for file in files if file.is_file()]
        used = max((stat.st_mtime for stat in stats), default=path.stat().st_mtime)
        yield CacheEntry(kind, path, sum(stat.st_size for stat in stats), used, data, source)


def of_data(found: Sequence[CacheEntry], given: Sequence[str | Path]) -> list[CacheEntry]:
    """Return the entries built from the given data; files match by content or path, other sources by name."""
    known: set[str] = set()
    for source in given:
        file = Path(source).expanduser()
        known |= {str(source), str(file.resolve())}
        if file.is_file():
            known.add(file_digest(file)[:DIGITS])
    return [entry for entry in found if not {entry.data, entry.source}.isdisjoint(known - {""})]


def purge(chosen: Sequence[CacheEntry], cache_dir: str | Path | None = None) -> list[CacheEntry]:
    """Remove entries, and return those that were kept because a running process uses them.

    The log-probabilities of the removed token sequences are removed from the reference cache too.

    Args:
        chosen: entries that ``entries`` returned.
        cache_dir: see ``token_cache.cache_folder``.
    """
    store = cache_folder(cache_dir) / REFERENCE
    kept: list[CacheEntry] = []
    keys: set[bytes] = set()
    for entry in chosen:
        found = _keys(entry.path) if entry.kind == "tokens" and entry.is_read else ()
        if _REMOVE[entry.kind](entry.path):
            keys.update(found)
        else:
            kept.append(entry)
    if keys and store.exists():
        with suppress(ValueError):  # a damaged store raises its error where it is used
            values = LogprobStore(store)
            try:
                values.remove(sorted(keys))
            finally:
                values.close()
    return kept


def _keys(path: Path) -> Sequence[bytes]:
    try:
        return sequence_keys(read(path))
    except (OSError, ValueError):
        return ()


def _remove_unless_held(path: Path) -> bool:
    if not path.exists():
        return True
    with held(path) as mine:
        if not mine:
            return False
        if path.is_dir():
            remove_whole(path)
        else:
            path.unlink(missing_ok=True)
    return True


_REMOVE: dict[str, Callable[[Path], bool]] = {**dict.fromkeys(KINDS, _remove_unless_held), "reference": remove_store}
