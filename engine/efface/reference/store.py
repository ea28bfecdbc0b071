"""Log-probabilities in one SQLite file, shared by processes that fill and read it at the same time."""

import math
import sqlite3
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

APPLICATION_ID = 0x65666663  # "effc": tells our files from other programs'
FORMAT = 1
_SCHEMA = (
    "CREATE TABLE logprobs (model BLOB NOT NULL, sequence BLOB NOT NULL, value REAL NOT NULL, "
    "checksum INTEGER NOT NULL, PRIMARY KEY (model, sequence)) WITHOUT ROWID"
)
_VARIABLES = 900  # of one query; SQLite before 3.32 takes 999
_CHECKED_BYTES = 8 << 20  # files up to this size are checked as they are opened: 8 ms at most
_BUSY_SECONDS = 60.0  # how long to wait for another process that writes
# SQLite's words for trouble with the place, not with the content; Python 3.10 tells no error codes.
_PLACE = ("locked", "locking", "readonly", "unable to open", "is full", "I/O", "permission")


class LogprobStore:
    """A file of sequence log-probabilities: (model fingerprint, sequence key) -> L, in float64.

    What ``put`` has returned from is there, also after the process was killed. Any number of processes may read and
    write at once. SQLite has no checksums, so every row carries one: a value is what was put, or it is refused.

    Args:
        path: the file; it and its folder are made if they are not there.

    Raises:
        OSError: a place that cannot be read or written, or a full disk; from every method.
        ValueError: a damaged file, or one of another program or version; from every method. Nothing is deleted.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._explained():
            self._database = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, isolation_level=None)
        try:
            with self._explained():
                self._open()
        except BaseException:
            self.close()
            raise

    def get(self, model: bytes, keys: Sequence[bytes]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Return the values (len(keys),) of a model's sequences, NaN where there is none, and where there is one."""
        there: list[bytes] = []
        numbers: list[float] = []
        checksums: list[int] = []
        wanted = sorted(set(keys))  # in the order of the file, so that neighbours are read together
        with self._explained():
            for first in range(0, len(wanted), _VARIABLES):
                some = wanted[first : first + _VARIABLES]
                places = ",".join("?" * len(some))
                query = f"SELECT sequence, value, checksum FROM logprobs WHERE model = ? AND sequence IN ({places})"  # noqa: S608 - question marks
                # Row by row: 10,000 tuples alive at once start a garbage collection, which takes 70 ms beside torch.
                for key, number, checksum in self._database.execute(query, (model, *some)):
                    there.append(key)
                    numbers.append(number)
                    checksums.append(checksum)
        try:
            values = np.array(numbers, np.float64)
        except (TypeError, ValueError) as error:
            raise self._refused("it holds what is no number") from error
        if _checksums(model, there, values) != checksums:
            raise self._refused("a checksum does not fit its row")
        found = dict(zip(there, numbers, strict=True))
        result = np.array([found.get(key, math.nan) for key in keys], np.float64)
        return result, ~np.isnan(result)

    def put(self, model: bytes, keys: Sequence[bytes], values: NDArray[np.float64]) -> None:
        """Add values of a model's sequences, all or none; of a key that is there already, the value stays.

        Raises:
            ValueError: as many values as keys are needed, and finite ones.
        """
        if len(keys) != len(values):
            raise ValueError(f"`values`: expected {len(keys)} entries, got {len(values)}")
        if not np.isfinite(values).all():
            raise ValueError("`values`: expected finite log-probabilities, got NaN or infinity")
        values = values + 0.0  # SQLite keeps no sign of a zero, which is the log-probability of a sure answer
        checksums = _checksums(model, keys, values)
        rows = ((model, *row) for row in zip(keys, values.tolist(), checksums, strict=True))
        with self._explained(), self._transaction():
            self._database.executemany("INSERT OR IGNORE INTO logprobs VALUES (?, ?, ?, ?)", rows)

    def close(self) -> None:
        """Close the file; closing twice changes nothing."""
        self._database.close()

    def _open(self) -> None:
        self._database.execute("PRAGMA cell_size_check = ON")
        if self._is_new():
            with self._transaction():
                if self._is_new():  # still, now that nobody else writes
                    self._database.execute(_SCHEMA)
                    self._database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                    self._database.execute(f"PRAGMA user_version = {FORMAT}")
        if self._read("PRAGMA application_id") != APPLICATION_ID:
            raise self._refused("it is a database of another program")
        if (version := self._read("PRAGMA user_version")) != FORMAT:
            raise self._refused(f"expected format {FORMAT}, got {version}, of another version of efface")
        if self._schemas() != [_SCHEMA]:
            raise self._refused("its tables are not those that efface makes")
        if self.path.stat().st_size <= _CHECKED_BYTES and (verdict := self._read("PRAGMA quick_check(1)")) != "ok":
            raise self._refused(str(verdict))
        self._write_ahead()
        self._database.execute("PRAGMA synchronous = NORMAL")

    def _write_ahead(self) -> None:
        """Let readers go on beside a writer: a property of the file, until somebody changes it.

        Where the file system cannot do that, SQLite stays with its rollback journal, which is as safe.
        """
        try:
            self._read("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):  # not waited for: another process uses the file, and has asked the same
                raise

    def _is_new(self) -> bool:
        return not self._read("PRAGMA application_id") and not self._schemas()

    def _schemas(self) -> list[str]:
        return [sql for (sql,) in self._database.execute("SELECT sql FROM sqlite_master")]

    def _read(self, query: str) -> Any:
        return self._database.execute(query).fetchone()[0]

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._database.execute("COMMIT")
        finally:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError) and any(word in str(error) for word in _PLACE):
                raise OSError(f"reference cache {str(self.path)!r}: {error}") from error
            raise self._refused(str(error)) from error

    def _refused(self, reason: str) -> ValueError:
        return ValueError(
            f"reference cache {str(self.path)!r}: {reason}; delete the file, or choose another with --reference_cache"
        )


def _checksums(model: bytes, keys: Sequence[bytes], values: NDArray[np.float64]) -> list[int]:
    """Return the CRC-32 of each whole row."""
    start, content = zlib.crc32(model), np.ascontiguousarray(values, "<f8").tobytes()
    return [zlib.crc32(content[8 * i : 8 * i + 8], zlib.crc32(key, start)) for i, key in enumerate(keys)]
