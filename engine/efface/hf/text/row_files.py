"""``FileRows``: the rows of a JSON, JSON-lines, CSV or Parquet file, read completely and without type guessing."""

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

IN_MEMORY = 64 << 20  # bytes of rows kept in memory; larger data go to an unnamed temporary file
_READ_BYTES = 1 << 20
_PARQUET_ROWS = 1000  # per batch
_LONGEST_FIELD = (1 << 31) - 1  # CSV field limit: Python's default is 128 KiB; this is the maximum on all systems
_UTF16 = (b"\xff\xfe", b"\xfe\xff")

Row = dict[str, Any]


class FileRows(Sequence[Row]):
    """The rows of a JSON, JSON-lines, CSV or Parquet file, as of the time of reading.

    Types are not guessed:

    - CSV: every field is text; an empty field is empty text. Blank lines are skipped.
    - JSON: numbers are text too, with the digits of the file; true, false, null, NaN, lists and objects become Python
      values. A column that a row lacks is None.
    - Parquet: Python values of the file's types.

    The rows are a copy, so later changes of the file have no effect. Rows beyond 64 MiB are kept in an unnamed
    temporary file in the cache folder, which the system deletes with the last reference, so they can exceed RAM. (A
    JSON array is read into memory at once; JSON lines are not.) No further copy is made, for example in the cache of
    ``datasets``.

    Args:
        path: a .json, .jsonl, .csv or .parquet file.
        cache_dir: see ``token_cache.cache_folder``.

    Attributes:
        suffix: suffix of the file, in lower case.
        digest: SHA-256 of the bytes that were read.
        names: column names.
        features: types of the columns as in ``datasets.Dataset.features``; empty unless the file records them.

    Raises:
        ValueError: the file does not have the format of its type (the message names the line), or it changes while it
            is read.
        OSError: the file cannot be read, or the cache folder has no space.
    """

    def __init__(self, path: Path, *, cache_dir: str | Path | None = None) -> None:
        source = repr(str(path))
        self.suffix = path.suffix.lower()
        self.names: tuple[str, ...] = ()
        self.features: Mapping[str, Any] = {}
        self._ends = array("q", [0])
        with path.open("rb") as file:
            # The open file stays the same if another file replaces it at this path; comparing the digest before and
            # after reading detects writes into it.
            self.digest = _digest(file)
            read = READERS[self.suffix]
            try:
                self._bytes = self._kept(read(self, file, source), cache_dir)
            except UnicodeDecodeError as error:
                raise _not_utf8(file, source) from error
            if _digest(file) != self.digest:
                raise ValueError(f"{source} changed while it was read; start again when it is completely written")

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
        file: Any = memory  # or a temporary file, whose class differs between systems
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
                    remedy = (
                        "add the missing fields"
                        if len(fields) < len(rows.names)
                        else 'put a field that contains a comma in double quotes: "In Ghent, Belgium"'
                    )
                    raise ValueError(
                        f"{source}, line {line}: expected {len(rows.names)} fields ({', '.join(rows.names)}), got "
                        f"{len(fields)}; {remedy}"
                    )
                yield dict(zip(rows.names, fields, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{source}, line {line}: expected CSV fields, got invalid CSV ({error}); close each quoted field, and "
            "double each quote within a quoted field"
        ) from error
    finally:
        csv.field_size_limit(limit)
        text.detach()  # otherwise closing the wrapper would close the file
    if not rows.names:
        raise ValueError(f"{source}: expected a line of column names, got an empty file; check the file")


def _header(names: Sequence[str], where: str) -> tuple[str, ...]:
    if not any(names):
        raise ValueError(f"{where}: expected column names, got a blank line; remove the line")
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise ValueError(f"{where}: expected distinct column names, got {twice[0]!r} twice; rename one")
    if any("\0" in name for name in names):
        raise ValueError(f"{where}: expected UTF-8, got bytes that look like UTF-16 or UTF-32; save the file as UTF-8")
    if len(names) == 1 and (other := {";", "\t", "|"} & set(names[0])):
        raise ValueError(
            f"{where}: expected column names separated by commas, got {names[0]!r}; save the file with commas instead "
            f"of {', '.join(map(repr, sorted(other)))}"
        )
    return tuple(names)


def _read_json(rows: FileRows, file: BinaryIO, source: str) -> Iterator[Row]:
    """Yield JSON objects, which are one per line or in one array."""
    names: dict[str, None] = {}
    first = next((line for line in file if line.removeprefix(b"\xef\xbb\xbf").strip()), None)
    if first is None:
        raise ValueError(f"{source}: expected rows, got an empty file; check the file")
    file.seek(0)
    whole = first.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    try:
        for row in _array(file, source) if whole else _lines(file, source):
            names.update(dict.fromkeys(row))
            yield row
    except RecursionError as error:
        raise ValueError(f"{source}: expected rows of text, got JSON nested too deeply; flatten it") from error
    rows.names = tuple(names)


def _array(file: BinaryIO, source: str) -> Iterator[Row]:
    try:
        found = _DECODER.decode(file.read().decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{source}, line {error.lineno}: expected an array of JSON objects, got invalid JSON ({error.msg} at "
            f"column {error.colno}); correct the line, or create the file again if it was cut off"
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
                f"{source}, line {number}: expected a JSON object, got invalid JSON ({error.msg} at column "
                f"{error.colno}); write one object per line or one array of objects, or create the file again if it "
                "was cut off"
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


# Numbers keep their text, such as 1.10; NaN and Infinity, which json.dumps writes, become floats.
_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=str, parse_int=str, parse_constant=float)


def _not_utf8(file: Any, source: str) -> ValueError:
    """Return the error for a file that is not UTF-8, with the line and offset of the first invalid byte."""
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
                f"{offset + error.start}, possibly Latin-1; save the file as UTF-8"
            )
        offset += len(line)
    return ValueError(f"{source}: expected UTF-8, got another encoding; save the file as UTF-8")


def _read_parquet(rows: FileRows, file: BinaryIO, source: str) -> Iterator[Row]:
    try:
        table = pq.ParquetFile(file)
        names = table.schema_arrow.names
        if twice := [name for i, name in enumerate(names) if name in names[:i]]:
            raise ValueError(f"expected distinct columns, got {twice[0]!r} twice")  # noqa: TRY301 - wrapped like the others
        rows.names = tuple(names)
        if b"huggingface" in (table.schema_arrow.metadata or {}):  # added by Dataset.to_parquet
            rows.features = datasets.Features.from_arrow_schema(table.schema_arrow)
        for batch in table.iter_batches(_PARQUET_ROWS):
            yield from batch.to_pylist()
    except (pa.ArrowException, ValueError, OverflowError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(
            f"{source}: expected a Parquet file, got invalid data ({error}); create the file again"
        ) from error


READERS: Mapping[str, Callable[[FileRows, BinaryIO, str], Iterator[Row]]] = {
    ".json": _read_json,
    ".jsonl": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
