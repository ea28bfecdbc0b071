"""Files of rows: read as they are written, and whole, before the first row is handed out."""

import csv
import hashlib
import io
import json
import mmap
import pickle
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, overload

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from efface.files import private_folder
from efface.hf.text.token_cache import cache_folder

IN_MEMORY = 64 << 20  # bytes of rows that are kept in memory; more are in a file without a name
_READ_BYTES = 1 << 20
_PARQUET_ROWS = 1000  # at a time
_LONGEST_FIELD = (1 << 31) - 1  # of CSV: Python's limit is 128 KiB, and the largest there is on all systems is this
_UTF16 = (b"\xff\xfe", b"\xfe\xff")

Row = dict[str, Any]


class FileRows(Sequence[Row]):
    """The rows of a JSON, JSON-lines, CSV or Parquet file, as it was when they were read.

    Values are what the file holds, with nothing guessed:

    - CSV: every field is text, an empty one is empty text. Blank lines are no rows.
    - JSON: numbers are text as well, digit by digit; true, false, null and NaN, lists and objects are Python's.
      What a row lacks is None.
    - Parquet: Python's values of the file's types.

    The rows are a copy: what becomes of the file afterwards does not matter. Beyond 64 MiB they are in a file of the
    cache folder that has no name, and is gone with the last reference; so they may exceed RAM (a JSON array, unlike
    JSON lines, is read at once). No other copy is made, in the cache of ``datasets`` for one.

    Args:
        path: of type .json, .jsonl, .csv or .parquet.
        cache_dir: see ``token_cache.cache_folder``.

    Attributes:
        suffix: of the file, in lower case.
        digest: SHA-256 of the bytes that were read.
        names: the columns.
        features: their types where the file holds types, as ``datasets.Dataset.features``.

    Raises:
        ValueError: a file that is not of its type, with the line; one that changes while it is read.
        OSError: a file that cannot be read; no space in the cache folder.
    """

    def __init__(self, path: Path, *, cache_dir: str | Path | None = None) -> None:
        source = repr(str(path))
        self.suffix = path.suffix.lower()
        self.names: tuple[str, ...] = ()
        self.features: Mapping[str, Any] = {}
        self._ends = array("q", [0])
        with path.open("rb") as file:
            # The open file stays the same one if another takes its path, and two digests show what is written into it.
            self.digest = _digest(file)
            read = READERS[self.suffix]
            try:
                self._bytes = self._kept(read(self, file, source), cache_dir)
            except UnicodeDecodeError as error:
                raise _not_utf8(file, source) from error
            if _digest(file) != self.digest:
                raise ValueError(f"{source} changed while it was read; wait until it is written, and start again")

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, place: int) -> Row: ...

    @overload
    def __getitem__(self, place: slice) -> list[Row]: ...

    def __getitem__(self, place: int | slice) -> Row | list[Row]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        i = range(len(self))[place]
        row: Row = pickle.loads(self._bytes[self._ends[i] : self._ends[i + 1]])  # noqa: S301 - written by this process
        return row if len(row) == len(self.names) else {**dict.fromkeys(self.names), **row}

    def _kept(self, rows: Iterable[Row], cache_dir: str | Path | None) -> memoryview | mmap.mmap:
        memory = io.BytesIO()
        file: Any = memory  # or a temporary file, of a class that differs between systems
        for row in rows:
            file.write(pickle.dumps(row, pickle.HIGHEST_PROTOCOL))
            self._ends.append(file.tell())
            if file is memory and memory.tell() > IN_MEMORY:
                folder = cache_folder(cache_dir)
                file = tempfile.TemporaryFile(dir=private_folder(folder))  # noqa: SIM115 - closed once it is mapped
                file.write(memory.getbuffer())
        if file is memory:
            return memoryview(memory.getvalue())
        with file:
            file.flush()
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _digest(file: BinaryIO) -> str:
    state = hashlib.sha256()
    file.seek(0)
    while block := file.read(_READ_BYTES):
        state.update(block)
    file.seek(0)
    return state.hexdigest()


def _read_csv(rows: FileRows, file: BinaryIO, source: str) -> Iterator[Row]:
    limit = csv.field_size_limit(_LONGEST_FIELD)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    reader = csv.reader(text, strict=True)
    line = 1
    try:
        for fields in reader:
            if not rows.names:
                rows.names = _header(fields, f"{source}, line {line}")
            elif fields:
                if len(fields) != len(rows.names):
                    raise ValueError(
                        f"{source}, line {line}: expected {len(rows.names)} fields ({', '.join(rows.names)}), got "
                        f'{len(fields)}; write a field that holds a comma in double quotes: "In Ghent, Belgium"'
                    )
                yield dict(zip(rows.names, fields, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{source}, line {line}: expected fields of CSV, got something else ({error}); close each quoted field, "
            "and write a double quote within one as two"
        ) from error
    finally:
        csv.field_size_limit(limit)
        text.detach()  # or the file would be closed with it
    if not rows.names:
        raise ValueError(f"{source}: expected a line of column names, got an empty file")


def _header(names: Sequence[str], where: str) -> tuple[str, ...]:
    if not any(names):
        raise ValueError(f"{where}: expected column names, got a blank line")
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise ValueError(f"{where}: expected distinct column names, got {twice[0]!r} twice; rename one")
    if any("\0" in name for name in names):
        raise ValueError(f"{where}: expected UTF-8, got what UTF-16 or UTF-32 looks like; save the file as UTF-8")
    if len(names) == 1 and (other := {";", "\t", "|"} & set(names[0])):
        raise ValueError(
            f"{where}: expected column names with commas between, got {names[0]!r}; save the file with commas for "
            f"{', '.join(map(repr, sorted(other)))}"
        )
    return tuple(names)


def _read_json(rows: FileRows, file: BinaryIO, source: str) -> Iterator[Row]:
    """Objects, one a line or in an array."""
    names: dict[str, None] = {}
    first = next((line for line in file if line.removeprefix(b"\xef\xbb\xbf").strip()), None)
    if first is None:
        raise ValueError(f"{source}: expected rows, got an empty file")
    file.seek(0)
    whole = first.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    try:
        for row in _array(file, source) if whole else _lines(file, source):
            names.update(dict.fromkeys(row))
            yield row
    except RecursionError as error:
        raise ValueError(f"{source}: expected rows of text, got JSON that is nested too deep") from error
    rows.names = tuple(names)


def _array(file: BinaryIO, source: str) -> Iterator[Row]:
    try:
        found = _DECODER.decode(file.read().decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{source}, line {error.lineno}: expected an array of JSON objects, got something else ({error.msg} at "
            f"column {error.colno}); correct it there, or write the file anew if it was cut off"
        ) from error
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    for number, row in enumerate(found):
        if not isinstance(row, dict):
            raise ValueError(f"{source}, row {number}: expected a JSON object, got {type(row).__name__}")  # noqa: TRY004 - a file's content is a value
        yield row


def _lines(file: BinaryIO, source: str) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        if not text:
            continue
        try:
            row = _DECODER.decode(text)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{source}, line {number}: expected a JSON object, got something else ({error.msg} at column "
                f"{error.colno}); write one object a line or an array of objects, and write the file anew if it was "
                "cut off"
            ) from error
        except ValueError as error:
            raise ValueError(f"{source}, line {number}: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{source}, line {number}: expected a JSON object, got {type(row).__name__}")  # noqa: TRY004 - a file's content is a value
        yield row


def _object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise ValueError(f"expected distinct names in an object, got {twice!r} twice; rename one")
    return row


# Numbers stay as they are written, 1.10 for one; NaN and Infinity, which json.dumps writes, are floats.
_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=str, parse_int=str, parse_constant=float)


def _not_utf8(file: Any, source: str) -> ValueError:
    """Say where a file is not UTF-8."""
    file.seek(0)
    offset = 0
    for number, line in enumerate(file, 1):
        if number == 1 and line.startswith(_UTF16):
            return ValueError(f"{source}: expected UTF-8, got UTF-16; save the file as UTF-8")
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            return ValueError(
                f"{source}, line {number}: expected UTF-8, got byte 0x{line[error.start]:02x} at offset "
                f"{offset + error.start}, as of Latin-1; save the file as UTF-8"
            )
        offset += len(line)
    return ValueError(f"{source}: expected UTF-8; save the file as UTF-8")


def _read_parquet(rows: FileRows, file: BinaryIO, source: str) -> Iterator[Row]:
    try:
        table = pq.ParquetFile(file)
        names = table.schema_arrow.names
        if twice := [name for i, name in enumerate(names) if name in names[:i]]:
            raise ValueError(f"expected distinct columns, got {twice[0]!r} twice")  # noqa: TRY301 - told as the others
        rows.names = tuple(names)
        if b"huggingface" in (table.schema_arrow.metadata or {}):  # what Dataset.to_parquet adds
            rows.features = datasets.Features.from_arrow_schema(table.schema_arrow)
        for batch in table.iter_batches(_PARQUET_ROWS):
            yield from batch.to_pylist()
    except (pa.ArrowException, ValueError, OverflowError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{source}: expected a Parquet file, got something else ({error}); write it anew") from error


READERS: Mapping[str, Callable[[FileRows, BinaryIO, str], Iterator[Row]]] = {
    ".json": _read_json,
    ".jsonl": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
