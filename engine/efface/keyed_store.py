"""SQLite files that processes fill and read at the same time, and that are checked before they are believed."""

import sqlite3
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_VARIABLES = 900  # of one query; SQLite before 3.32 takes 999
_CHECKED_BYTES = 8 << 20  # files up to this size are checked as they are opened: 8 ms at most
_BUSY_SECONDS = 60.0  # how long to wait for another process that writes
# SQLite's words for trouble with the place, not with the content; Python 3.10 tells no error codes.
_PLACE = ("locked", "locking", "readonly", "unable to open", "is full", "I/O", "permission")


class Database:
    """A file with the tables of one program and version; what a transaction has put there survives the process.

    Args:
        path: the file; it and its folder are made if they are not there.
        schema: the statement that makes its table.
        application: four bytes that tell the program's files from those of others.
        version: of the format.
        name: what messages call the file.
        remedy: what they advise where it cannot be used.

    Raises:
        OSError: a place that cannot be read or written, or a full disk.
        ValueError: a damaged file, or one of another program or version. Nothing is deleted.
    """

    def __init__(
        self, path: str | Path, *, schema: str, application: int, version: int, name: str, remedy: str
    ) -> None:
        self.path = Path(path).expanduser()
        self._schema, self._application, self._version = schema, application, version
        self._name, self._remedy = name, remedy
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.explained():
            self._connection = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, isolation_level=None)
        try:
            with self.explained():
                self._open()
        except BaseException:
            self.close()
            raise

    def execute(self, query: str, values: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        """Run a query, within ``explained``."""
        return self._connection.execute(query, values)

    def rows(self, query: str, fixed: bytes, keys: Sequence[bytes]) -> Iterator[tuple[Any, ...]]:
        """Run a query for a fixed value and any number of keys, within ``explained``; rows come in the file's order.

        Args:
            query: compares one column with ``?`` and another with ``IN ({keys})``.
            fixed: the value of the first.
            keys: those of the second.
        """
        wanted = sorted(set(keys))  # so that neighbours are read together
        for first in range(0, len(wanted), _VARIABLES):
            some = wanted[first : first + _VARIABLES]
            yield from self.execute(query.format(keys=",".join("?" * len(some))), (fixed, *some))

    def change(self, query: str, rows: Iterator[tuple[Any, ...]]) -> None:
        """Run a query that writes for each of the rows, all or none."""
        with self.explained(), self._transaction():
            self._connection.executemany(query, rows)

    def drop_damaged(self, query: str, fixed: bytes, keys: Sequence[Any]) -> None:
        """Delete rows whose checksum does not fit, so that they are made anew, and warn.

        Args:
            query: deletes the row of a fixed value and a key.
            fixed: the value.
            keys: of the rows, as they were read.
        """
        if not keys:
            return
        self.change(query, ((fixed, key) for key in keys))
        warnings.warn(
            f"{self._name} {str(self.path)!r}: {len(keys)} damaged {'row is' if len(keys) == 1 else 'rows are'} made "
            "anew; if that happens again, look after the disk",
            stacklevel=3,
        )

    def close(self) -> None:
        """Close the file; closing twice changes nothing."""
        self._connection.close()

    def refused(self, reason: str) -> ValueError:
        """Return the error that says why the content cannot be used."""
        return ValueError(f"{self._name} {str(self.path)!r}: {reason}; {self._remedy}")

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Tell the errors of the place from those of the content."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError) and any(word in str(error) for word in _PLACE):
                raise OSError(f"{self._name} {str(self.path)!r}: {error}") from error
            raise self.refused(str(error)) from error
        except UnicodeDecodeError as error:  # SQLite's own words quote what is damaged
            raise self.refused("its text is damaged") from error

    def _open(self) -> None:
        self.execute("PRAGMA cell_size_check = ON")
        if self._is_new():
            with self._transaction():
                if self._is_new():  # still, now that nobody else writes
                    self.execute(self._schema)
                    self.execute(f"PRAGMA application_id = {self._application}")
                    self.execute(f"PRAGMA user_version = {self._version}")
        if self._read("PRAGMA application_id") != self._application:
            raise self.refused("it is a database of another program")
        if (version := self._read("PRAGMA user_version")) != self._version:
            raise self.refused(f"expected format {self._version}, got {version}, of another version of efface")
        if self._schemas() != [self._schema]:
            raise self.refused("its tables are not those that efface makes")
        if self.path.stat().st_size <= _CHECKED_BYTES and (verdict := self._read("PRAGMA quick_check(1)")) != "ok":
            raise self.refused(str(verdict))
        self._write_ahead()
        self.execute("PRAGMA synchronous = NORMAL")

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
        return [sql for (sql,) in self.execute("SELECT sql FROM sqlite_master")]

    def _read(self, query: str) -> Any:
        return self.execute(query).fetchone()[0]

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.execute("COMMIT")
        finally:
            if self._connection.in_transaction:
                self.execute("ROLLBACK")
