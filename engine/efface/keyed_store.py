"""SQLite files that processes fill and read at the same time, and that are checked before they are believed."""

import os
import sqlite3
import warnings
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

_VARIABLES = 900  # of one query; SQLite before 3.32 takes 999
_CHECKED_BYTES = 8 << 20  # files up to this size are checked as they are opened: 8 ms at most
_BUSY_SECONDS = 60.0  # how long to wait for another process that writes
# SQLite's words for trouble with the place, not with the content; Python 3.10 tells no error codes.
_PLACE = ("locked", "locking", "readonly", "unable to open", "is full", "I/O", "permission")


@dataclass(frozen=True)
class KeyedTable:
    """The one table of a file: (model, key) -> value, and what tells the file from those of others.

    Attributes:
        name: of the table.
        key: of the column of keys.
        value: of the column of values.
        kind: SQLite's type of a value: "REAL", or "TEXT", which is read as bytes, since a damaged one need not be text.
        application: four bytes that tell the program's files from those of others.
        version: of the format.
        file: what messages call the file.
        remedy: what they advise where it cannot be used.
    """

    name: str
    key: str
    value: str
    kind: str
    application: int
    version: int
    file: str
    remedy: str

    @property
    def schema(self) -> str:
        """The statement that makes the table."""
        return (
            f"CREATE TABLE {self.name} (model BLOB NOT NULL, {self.key} BLOB NOT NULL, {self.value} {self.kind} "
            f"NOT NULL, checksum INTEGER NOT NULL, PRIMARY KEY (model, {self.key})) WITHOUT ROWID"
        )


class KeyedStore(ABC):
    """A file of values by the fingerprint of a model and a key.

    What ``write`` has returned from is there, also after the process was killed. Any number of processes may read and
    write at once. SQLite has no checksums, so every row carries one: a value is what was written, or the row is
    dropped, with a warning, and found no more.

    Args:
        path: the file; it and its folder are made if they are not there.

    Attributes:
        table: what the file holds.

    Raises:
        OSError: a place that cannot be read or written, or a full disk; from every method.
        ValueError: a file whose structure is damaged, or of another program or version; from every method. It is left
            as it is.
    """

    table: ClassVar[KeyedTable]

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):  # of which SQLite has its own to say
            # Results hold texts: nobody but the user reads them. SQLite gives the files beside it the same mode.
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        with self._explained():
            self._connection = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, isolation_level=None)
        try:
            with self._explained():
                self._open()
        except BaseException:
            self.close()
            raise

    @staticmethod
    @abstractmethod
    def encoded(values: Sequence[Any]) -> Sequence[bytes]:
        """Return the bytes of each value, as SQLite gives them back, that its checksum is of."""

    def read(self, model: bytes, keys: Sequence[bytes]) -> dict[bytes, Any]:
        """Return the values of a model that are there, by key: numbers, or the bytes of texts."""
        table, there, values, checksums, wrong = self.table, [], [], [], []
        column, kind = (table.value, float) if table.kind == "REAL" else (f"CAST({table.value} AS BLOB)", bytes)
        query = f"SELECT {table.key}, {column}, checksum FROM {table.name} WHERE model = ? AND {table.key} IN "  # noqa: S608 - the names are ours
        wanted = sorted(set(keys))  # so that neighbours are read together
        with self._explained():
            for first in range(0, len(wanted), _VARIABLES):
                some = wanted[first : first + _VARIABLES]
                rows = self._execute(f"{query} ({','.join('?' * len(some))})", (model, *some))
                # Row by row: 10,000 tuples alive at once start a garbage collection, which takes 70 ms beside torch.
                for key, value, checksum in rows:
                    if not isinstance(key, bytes) or not isinstance(value, kind):  # where its type was damaged
                        wrong.append(key)
                        continue
                    there.append(key)
                    values.append(value)
                    checksums.append(checksum)
        right = self._checksums(model, there, values)
        found = dict(zip(there, values, strict=True))
        if right != checksums:
            damaged = [key for key, a, b in zip(there, right, checksums, strict=True) if a != b]
            wrong += damaged
            for key in damaged:
                del found[key]
        if wrong:
            self._drop(model, wrong)
        return found

    def write(self, model: bytes, keys: Sequence[bytes], values: Sequence[Any]) -> None:
        """Add values of a model, all or none; of a key that is there already, the value stays."""
        checksums = self._checksums(model, keys, values)
        rows = ((model, *row) for row in zip(keys, values, checksums, strict=True))
        self._change(f"INSERT OR IGNORE INTO {self.table.name} VALUES (?, ?, ?, ?)", rows)  # noqa: S608 - the names are ours

    def remove(self, keys: Sequence[bytes]) -> None:
        """Delete the values of keys, those of every model, and overwrite them in the file."""
        name = self.table.name
        with self._explained():
            self._execute("PRAGMA secure_delete = ON")
            models = [model for (model,) in self._execute(f"SELECT DISTINCT model FROM {name}")]  # noqa: S608 - the names are ours
        rows = ((model, key) for model in models for key in keys)
        self._change(f"DELETE FROM {name} WHERE model = ? AND {self.table.key} = ?", rows)  # noqa: S608 - the names are ours
        with self._explained():
            self._read("PRAGMA wal_checkpoint(TRUNCATE)")  # or the log beside the file would hold them still

    def close(self) -> None:
        """Close the file; closing twice changes nothing."""
        self._connection.close()

    def _checksums(self, model: bytes, keys: Sequence[bytes], values: Sequence[Any]) -> list[int]:
        """Return the CRC-32 of each whole row."""
        start = zlib.crc32(model)
        return [
            zlib.crc32(value, zlib.crc32(key, start)) for key, value in zip(keys, self.encoded(values), strict=True)
        ]

    def _drop(self, model: bytes, keys: Sequence[Any]) -> None:
        """Delete rows whose checksum does not fit, so that they are made anew, and warn."""
        rows = ((model, key) for key in keys)
        self._change(f"DELETE FROM {self.table.name} WHERE model = ? AND {self.table.key} = ?", rows)  # noqa: S608 - the names are ours
        warnings.warn(
            f"{self.table.file} {str(self.path)!r}: {len(keys)} damaged {'row is' if len(keys) == 1 else 'rows are'} "
            "made anew; if that happens again, look after the disk",
            stacklevel=4,
        )

    def _change(self, query: str, rows: Iterator[tuple[Any, ...]]) -> None:
        """Run a query that writes for each of the rows, all or none."""
        with self._explained(), self._transaction():
            self._connection.executemany(query, rows)

    def _execute(self, query: str, values: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        return self._connection.execute(query, values)

    def _refused(self, reason: str) -> ValueError:
        """Return the error that says why the content cannot be used."""
        return ValueError(f"{self.table.file} {str(self.path)!r}: {reason}; {self.table.remedy}")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Tell the errors of the place from those of the content."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError) and any(word in str(error) for word in _PLACE):
                raise OSError(f"{self.table.file} {str(self.path)!r}: {error}") from error
            raise self._refused(str(error)) from error
        except UnicodeDecodeError as error:  # SQLite's own words quote what is damaged
            raise self._refused("its text is damaged") from error

    def _open(self) -> None:
        self._execute("PRAGMA cell_size_check = ON")
        if self._is_new():
            with self._transaction():
                if self._is_new():  # still, now that nobody else writes
                    self._execute(self.table.schema)
                    self._execute(f"PRAGMA application_id = {self.table.application}")
                    self._execute(f"PRAGMA user_version = {self.table.version}")
        if self._read("PRAGMA application_id") != self.table.application:
            raise self._refused("it is a database of another program")
        if (version := self._read("PRAGMA user_version")) != self.table.version:
            raise self._refused(f"expected format {self.table.version}, got {version}, of another version of efface")
        if self._schemas() != [self.table.schema]:
            raise self._refused("its tables are not those that efface makes")
        if self.path.stat().st_size <= _CHECKED_BYTES and (verdict := self._read("PRAGMA quick_check(1)")) != "ok":
            raise self._refused(str(verdict))
        self._write_ahead()
        self._execute("PRAGMA synchronous = NORMAL")

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
        return [sql for (sql,) in self._execute("SELECT sql FROM sqlite_master")]

    def _read(self, query: str) -> Any:
        return self._execute(query).fetchone()[0]

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._execute("BEGIN IMMEDIATE")
        try:
            yield
            self._execute("COMMIT")
        finally:
            if self._connection.in_transaction:
                self._execute("ROLLBACK")


def remove_store(path: Path) -> bool:
    """Remove a file of values and what SQLite keeps beside it; return False, and do nothing, while it is in use."""
    try:
        with closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode = DELETE").fetchone()  # which needs the file for itself
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            return False
    except sqlite3.DatabaseError:  # a damaged one
        pass
    for file in store_files(path):
        file.unlink(missing_ok=True)
    return True


def store_files(path: Path) -> list[Path]:
    """Return the file of a store and those that SQLite keeps beside it."""
    return [path.with_name(path.name + end) for end in ("", "-wal", "-shm", "-journal")]
