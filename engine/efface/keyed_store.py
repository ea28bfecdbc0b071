"""A key-value store in a SQLite file, with concurrent readers and writers and a checksum in every row."""

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

_VARIABLES = 900  # parameters per query; SQLite before 3.32 allows 999
_CHECKED_BYTES = 8 << 20  # files up to this size get PRAGMA quick_check when opened, which takes 8 ms at most
_BUSY_SECONDS = 60.0  # how long to wait for another process that writes
# Parts of SQLite's messages about the file system, not the content. Python 3.10 has no sqlite_errorcode.
_FILE_SYSTEM_ERRORS = ("locked", "locking", "readonly", "unable to open", "is full", "I/O", "permission")


@dataclass(frozen=True)
class KeyedTable:
    """The description of a store's only table, (model, key) -> value, and of the file that contains it.

    Attributes:
        name: name of the table.
        key: name of the key column.
        value: name of the value column.
        kind: SQLite type of a value: "REAL" or "TEXT". TEXT is read as bytes, because damaged text may not decode.
        application: SQLite application_id, four bytes that identify files of this kind.
        version: version of the file format (SQLite user_version).
        file: name of the kind of file in messages.
        remedy: advice in messages if the file cannot be used.
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
        """The SQL statement that creates the table."""
        return (
            f"CREATE TABLE {self.name} (model BLOB NOT NULL, {self.key} BLOB NOT NULL, {self.value} {self.kind} "
            f"NOT NULL, checksum INTEGER NOT NULL, PRIMARY KEY (model, {self.key})) WITHOUT ROWID"
        )


class KeyedStore(ABC):
    """A SQLite file that maps (model fingerprint, key) to a value.

    Values survive a kill of the process once ``write`` has returned. Any number of processes can read and write at
    the same time. SQLite has no checksums, so every row has a CRC-32 of its own. A row whose checksum does not match
    is deleted, with a warning, and is not returned.

    Args:
        path: the file; the file and its folder are created if they do not exist.

    Attributes:
        table: description of the table; defined by the subclass.

    Raises:
        OSError: from every method, if the file cannot be read or written, or the disk is full.
        ValueError: from every method, if the structure of the file is damaged, or another program or version wrote
            it. The file is not changed.
    """

    table: ClassVar[KeyedTable]

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):  # SQLite reports the error when it opens the file
            # Stored results contain texts, so only the user can read them. SQLite's own files (WAL) get the same mode.
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
        """Return the bytes of each value that go into its checksum; values are of the type that SQLite returns."""

    def read(self, model: bytes, keys: Sequence[bytes]) -> dict[bytes, Any]:
        """Return the stored values of a model by key: floats, or texts as bytes. Keys without a value are left out."""
        table, stored, values, checksums, damaged_keys = self.table, [], [], [], []
        column, kind = (table.value, float) if table.kind == "REAL" else (f"CAST({table.value} AS BLOB)", bytes)
        query = f"SELECT {table.key}, {column}, checksum FROM {table.name} WHERE model = ? AND {table.key} IN "  # noqa: S608 - the names are constants
        wanted = sorted(set(keys))  # sorted, so that one query reads neighbouring rows
        with self._explained():
            for first in range(0, len(wanted), _VARIABLES):
                some = wanted[first : first + _VARIABLES]
                rows = self._execute(f"{query} ({','.join('?' * len(some))})", (model, *some))
                # Row by row: 10,000 tuples alive at once trigger a garbage collection, 70 ms if torch is loaded.
                for key, value, checksum in rows:
                    if not isinstance(key, bytes) or not isinstance(value, kind):  # the stored type is damaged
                        damaged_keys.append(key)
                        continue
                    stored.append(key)
                    values.append(value)
                    checksums.append(checksum)
        expected_checksums = self._checksums(model, stored, values)
        found = dict(zip(stored, values, strict=True))
        if expected_checksums != checksums:
            damaged = [key for key, a, b in zip(stored, expected_checksums, checksums, strict=True) if a != b]
            damaged_keys += damaged
            for key in damaged:
                del found[key]
        if damaged_keys:
            self._drop(model, damaged_keys)
        return found

    def write(self, model: bytes, keys: Sequence[bytes], values: Sequence[Any]) -> None:
        """Add values of a model in one transaction; keys that are already stored keep their value."""
        checksums = self._checksums(model, keys, values)
        rows = ((model, *row) for row in zip(keys, values, checksums, strict=True))
        self._change(f"INSERT OR IGNORE INTO {self.table.name} VALUES (?, ?, ?, ?)", rows)  # noqa: S608 - the names are constants

    def remove(self, keys: Sequence[bytes]) -> None:
        """Delete the values of ``keys`` for every model, and overwrite the deleted content in the file with zeros."""
        name = self.table.name
        with self._explained():
            self._execute("PRAGMA secure_delete = ON")
            models = [model for (model,) in self._execute(f"SELECT DISTINCT model FROM {name}")]  # noqa: S608 - the names are constants
        rows = ((model, key) for model in models for key in keys)
        self._change(f"DELETE FROM {name} WHERE model = ? AND {self.table.key} = ?", rows)  # noqa: S608 - the names are constants
        with self._explained():
            self._read("PRAGMA wal_checkpoint(TRUNCATE)")  # the write-ahead log would still contain the values

    def close(self) -> None:
        """Close the file; closing twice is a no-op."""
        self._connection.close()

    def _checksums(self, model: bytes, keys: Sequence[bytes], values: Sequence[Any]) -> list[int]:
        """Return the CRC-32 of each row: of the model, the key and the value."""
        start = zlib.crc32(model)
        return [
            zlib.crc32(value, zlib.crc32(key, start)) for key, value in zip(keys, self.encoded(values), strict=True)
        ]

    def _drop(self, model: bytes, keys: Sequence[Any]) -> None:
        """Delete damaged rows, so that they are computed again, and warn."""
        rows = ((model, key) for key in keys)
        self._change(f"DELETE FROM {self.table.name} WHERE model = ? AND {self.table.key} = ?", rows)  # noqa: S608 - the names are constants
        warnings.warn(
            f"{self.table.file} {str(self.path)!r}: {len(keys)} damaged {'row is' if len(keys) == 1 else 'rows are'} "
            "computed again; if this happens repeatedly, check the disk",
            stacklevel=4,
        )

    def _change(self, query: str, rows: Iterator[tuple[Any, ...]]) -> None:
        """Run a writing query once per row, in one transaction."""
        with self._explained(), self._transaction():
            self._connection.executemany(query, rows)

    def _execute(self, query: str, values: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        return self._connection.execute(query, values)

    def _refused(self, reason: str) -> ValueError:
        """Return the ValueError for a file whose content cannot be used."""
        return ValueError(f"{self.table.file} {str(self.path)!r}: {reason}; {self.table.remedy}")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Convert SQLite errors: OSError for the file system, ValueError for the content."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError) and any(word in str(error) for word in _FILE_SYSTEM_ERRORS):
                raise OSError(f"{self.table.file} {str(self.path)!r}: {error}") from error
            raise self._refused(str(error)) from error
        except UnicodeDecodeError as error:  # SQLite's message quotes the damaged text
            raise self._refused("its text is damaged") from error

    def _open(self) -> None:
        self._execute("PRAGMA cell_size_check = ON")
        if self._is_new():
            with self._transaction():
                if self._is_new():  # checked again, now with the write lock
                    self._execute(self.table.schema)
                    self._execute(f"PRAGMA application_id = {self.table.application}")
                    self._execute(f"PRAGMA user_version = {self.table.version}")
        if self._read("PRAGMA application_id") != self.table.application:
            raise self._refused("expected a file written by efface, got a database of another program")
        if (version := self._read("PRAGMA user_version")) != self.table.version:
            raise self._refused(f"expected format {self.table.version}, got {version}, of another version of efface")
        if self._schemas() != [self.table.schema]:
            raise self._refused("expected the table that efface creates, got other tables")
        if self.path.stat().st_size <= _CHECKED_BYTES and (verdict := self._read("PRAGMA quick_check(1)")) != "ok":
            raise self._refused(str(verdict))
        self._write_ahead()
        self._execute("PRAGMA synchronous = NORMAL")

    def _write_ahead(self) -> None:
        """Switch the file to write-ahead logging, so that readers do not wait for a writer; the setting persists.

        If the file system does not support it, SQLite keeps its rollback journal, which is equally safe.
        """
        try:
            self._read("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):  # if locked, another process has the file open and makes the same switch
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
    """Delete a store and SQLite's additional files; return False, without deleting, if a process is using it."""
    try:
        with closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode = DELETE").fetchone()  # needs exclusive access to the file
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            return False
    except sqlite3.DatabaseError:  # a damaged file, which can be deleted
        pass
    for file in store_files(path):
        file.unlink(missing_ok=True)
    return True


def store_files(path: Path) -> list[Path]:
    """Return the paths of a store: its file and the files that SQLite can create next to it; not all need exist."""
    return [path.with_name(path.name + end) for end in ("", "-wal", "-shm", "-journal")]
