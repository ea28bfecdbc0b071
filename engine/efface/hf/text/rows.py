"""Rows of text: loading from files, the Hub and memory, reading of columns, and row filters."""

import difflib
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from itertools import combinations, islice
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

import datasets
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from efface.errors import in_words, reading
from efface.hf.text.row_files import IN_MEMORY, READERS, FileRows
from efface.hf.text.templates import Batch

Rows: TypeAlias = Sequence[Mapping[str, Any]]  # includes datasets.Dataset
Conditions: TypeAlias = str | Sequence[str] | Mapping[str, Any] | None

_ROWS_AT_A_TIME = 1000
_DOCUMENTS_AT_A_TIME = 16  # books of some 1 MB each
_SHOWN_VALUES = 10
_SUGGESTION_VALUES = 10_000  # distinct values compared with a filter value that no row has
_SURROGATE = re.compile("[\ud800-\udfff]")


# Suffixes of file types that are not supported. No name on the Hub ends in one, so such a source is a file.
_OTHER_FILES = {
    *(".txt", ".tsv", ".xls", ".xlsx", ".ndjson", ".arrow", ".feather", ".orc", ".xml", ".html", ".yaml", ".yml"),
    *(".pkl", ".npy", ".npz", ".db", ".sqlite", ".gz", ".bz2", ".xz", ".zst", ".zip", ".tar"),
}


def local_file(source: str | Path) -> Path | None:
    """Return the path if ``source`` is a file of rows; None if it can only be a name on the Hub.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: the path is a folder, or a file of an unsupported type.
    """
    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    if not path.exists():
        if suffix in READERS or suffix in _OTHER_FILES or str(source).startswith((".", "/", "~")) or path.is_symlink():
            got = f" (a link to {str(path.readlink())!r})" if path.is_symlink() else ""
            raise FileNotFoundError(f"data file {str(path)!r}{got} does not exist; check the path")
        return None
    if suffix not in READERS or not path.is_file():
        got = "a folder" if path.is_dir() else repr(path.suffix)
        raise ValueError(f"{str(path)!r}: expected a file of type {', '.join(READERS)}, got {got}")
    return path


def check_source(source: str | Path | None) -> None:
    """Check a data source before a model is loaded, by reading its file if that is at most 64 MiB.

    A name on the Hub is not checked, and None is accepted.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: as ``load_rows`` raises.
    """
    path = None if source is None else local_file(source)
    if path is not None and path.stat().st_size <= IN_MEMORY:
        FileRows(path)


def load_rows(source: str | Path, *, cache_dir: str | Path | None = None) -> Rows:
    """Return the rows of a JSON, JSON-lines, CSV or Parquet file, or of a Hub data set ``name[:config[:split]]``.

    The default split is "train". The rows of a file are ``FileRows``, a copy of the file's current content. The rows of
    a Hub data set are memory-mapped from the cache of ``datasets``. Both can exceed RAM.

    Args:
        source: a path or a name.
        cache_dir: folder for large copies; see ``token_cache.cache_folder``.

    Raises:
        FileNotFoundError: the path does not exist, or the name is not on the Hub.
        ValueError: the file is of an unsupported type or does not have the format of its type, or the Hub data set does
            not have the configuration or split.
    """
    path = local_file(source)
    if path is not None:
        return FileRows(path, cache_dir=cache_dir)
    name, config, split, *more = [*str(source).split(":"), "", ""]
    if any(more):
        raise ValueError(f"{str(source)!r}: expected a file or name:config:split of a Hub data set; correct it")
    if Path(name).expanduser().exists():  # datasets would identify it by path and time, and keep a copy
        kind = "a folder" if Path(name).expanduser().is_dir() else "a file, which has no configurations or splits"
        raise ValueError(f"{str(source)!r}: expected a file or the name of a Hub data set; {name!r} is {kind}")
    if not name.strip():
        raise ValueError(f"{str(source)!r}: expected a file or name:config:split of a Hub data set; correct it")
    try:
        with reading(f"data set {str(source)!r}", "a data set that `datasets` can load", "pass a file instead"):
            try:
                rows: Rows = datasets.load_dataset(name, config or None, split=split or "train")
            except ValueError as error:
                raise ValueError(f"{str(source)!r}: {error}; use {name}:config:split") from error
    except (FileNotFoundError, ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        raise FileNotFoundError(
            f"{name!r} is neither a local file nor a data set on the Hub ({in_words(error)})"
        ) from error
    return rows


def as_text(value: Any) -> str | None:
    """Return the text of a value; None for a missing value.

    ======================================================  ====================================================
    value                                                   text
    ======================================================  ====================================================
    str                                                     unchanged; an error if it has a lone surrogate
    int, NumPy integer                                      its digits
    Decimal                                                 its digits; an error if it has an exponent
    None, NaN of any type, pandas' NA and NaT, NumPy's NaT  missing
    float, NumPy float                                      an error: 1984.0 can be 1984 in a column with gaps
    bool, NumPy bool                                        an error: could be true, True, yes or 1
    date, time, bytes, list, mapping, array, all others     an error
    ======================================================  ====================================================

    All code that reads text from rows uses this function. Text files contain only text: a CSV field is the characters
    in the file, and so is a number in JSON (``1.10``, ``1e3``).

    Raises:
        ValueError: the value has no unique text; the message names its type and a remedy.
    """
    if isinstance(value, str):
        text = str.__str__(value)  # the characters, also for a subclass; the __str__ of an Enum returns its name
        if not text.isascii() and (half := _SURROGATE.search(text)):
            raise ValueError(
                f"got text with a lone surrogate (U+{ord(half[0]):04X} at character {half.start()}), such as half of "
                "an emoji that was cut; correct it"
            )
        return text
    if value is None or type(value).__name__ in ("NAType", "NaTType"):  # pandas is optional, so compare names
        return None
    if isinstance(value, (bool, np.bool_)):
        raise ValueError(f"got bool, which can be written {str(value).lower()}, {value}, …; convert it to text")  # noqa: TRY004 - a value of the data
    if isinstance(value, (int, np.integer)):
        return str(int(value))
    if isinstance(value, (float, np.floating, Decimal)):
        if value != value:  # noqa: PLR0124 - NaN
            return None
        if isinstance(value, Decimal) and value.is_finite() and "E" not in str(value):
            return str(value)
        raise ValueError(
            f"got {type(value).__name__} {value}, which can be written in several ways; convert it to text"
        )
    if isinstance(value, (np.datetime64, np.timedelta64)) and np.isnat(value):
        return None
    raise ValueError(f"got {_kind(value)}")


def _kind(value: Any) -> str:
    """Return the type of a value that is not text, with a remedy, for an error message."""
    name = type(value).__name__
    if isinstance(value, (date, time, timedelta, np.datetime64, np.timedelta64)):  # datetimes are dates
        return f"{name} {value}, which can be written in several ways; convert it to text"
    if isinstance(value, (bytes, bytearray)):
        return f"{name}; decode it"
    if isinstance(value, (list, tuple)) and value and all(isinstance(turn, Mapping) for turn in value):
        return f"{name} of {len(value)} mappings, such as a chat; convert it to a question and an answer column"
    return f"{name}; drop the row, or choose another column"


def check_rows(rows: Any, source: str) -> None:
    """Raise TypeError if ``rows`` is not a sequence of mappings, for example a pandas table, a stream or a mapping."""
    if isinstance(rows, Mapping):
        raise TypeError(
            f"{source}: expected rows, got a mapping of {', '.join(map(repr, rows))}; pass one of its values"
        )
    if hasattr(rows, "iloc"):
        raise TypeError(
            f'{source}: expected rows, got a {type(rows).__name__}; pass its .to_dict("records") or '
            "datasets.Dataset.from_pandas(...)"
        )
    if isinstance(rows, (str, bytes)) or not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
        remedy = "; pass list(...) of it" if hasattr(rows, "__iter__") and not isinstance(rows, (str, bytes)) else ""
        raise TypeError(
            f"{source}: expected rows (a list of mappings or a datasets.Dataset), got {type(rows).__name__}{remedy}"
        )


def check_columns(rows: Rows, names: Sequence[str], source: str) -> None:
    """Raise ValueError if a column is missing; for rows in memory, only the first row is checked."""
    check_rows(rows, source)
    present = present_columns(rows, source) if len(rows) else names
    for name in names:
        if name not in present:
            raise ValueError(
                f"{source}: expected a column {name!r}, got {', '.join(map(repr, present))}; rename the column, or "
                "name another (such as --question-column, --answer-column)"
            )


def table_digest(rows: datasets.Dataset, names: Sequence[str], source: str) -> str:
    """Return the SHA-256 of columns of a data set, in the given order.

    The data set's own fingerprint cannot serve as a cache key. It is made from the operations that built the data set
    (paths and times of files, functions of ``map``), so the content can differ under one fingerprint.

    Raises:
        ValueError: a column is missing.
    """
    check_columns(rows, names, source)
    state = hashlib.sha256(json.dumps(list(names)).encode())
    for table in rows.with_format("arrow").select_columns(list(names)).iter(_ROWS_AT_A_TIME):
        bare = table.replace_schema_metadata(None).combine_chunks()  # the metadata contains the fingerprint
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, bare.schema) as writer:
            writer.write_table(bare)
        state.update(sink.getvalue())
    return state.hexdigest()


def is_table(rows: Any) -> TypeGuard[datasets.Dataset]:
    """Return whether ``rows`` is a ``datasets.Dataset`` without ``set_transform``, which would compute each row."""
    return isinstance(rows, datasets.Dataset) and rows.format["type"] != "custom"


def texts(rows: Rows, name: str, source: str, numbers: NDArray[np.int64] | None = None) -> list[str]:
    """Return a column of text.

    Args:
        rows: the result of ``load_rows``, or a list of mappings.
        name: name of the column.
        source: name of the data in messages.
        numbers: row numbers to read; None reads all rows.

    Raises:
        ValueError: a row lacks the column, or a value has no text (see ``as_text``).
    """
    return [text for _, (found,) in _text_columns(rows, [name], source, numbers) for text in found]


def optional_texts(rows: Rows, name: str, source: str) -> list[str | None]:
    """Return an optional column of text; None for a row without the column or with a missing value.

    Raises:
        ValueError: a value has no text (see ``as_text``).
    """
    return [_as_text(value, row, name, source) for row, value in enumerate(_optional(rows, name, source))]


def text_lists(
    rows: Rows, name: str, source: str, *, optional: bool = False, numbers: NDArray[np.int64] | None = None
) -> list[list[str]]:
    """Return a column of lists of texts.

    Args:
        rows: the result of ``load_rows``, or a list of mappings.
        name: name of the column.
        source: name of the data in messages.
        optional: return an empty list for a row without the column, with a missing value, or with blank text.
        numbers: row numbers to read; None reads all rows.

    Raises:
        ValueError: a row lacks the column, a value is not a list, or an item is blank or has no text (see ``as_text``).
    """
    values = _optional(rows, name, source, numbers) if optional else column(rows, name, source, numbers)
    where = range(len(rows)) if numbers is None else numbers.tolist()
    return [_text_list(value, row, name, source, optional) for row, value in zip(where, values, strict=True)]


def _text_list(value: Any, row: int, name: str, source: str, optional: bool) -> list[str]:
    if isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.ndim == 1):
        found = [_text(item, row, name, source, f", item {i}") for i, item in enumerate(value)]
        if (blank := next((i for i, text in enumerate(found) if not text.strip()), None)) is not None:
            raise ValueError(
                f"{source}, row {row}: expected text in column {name!r}, item {blank}, got {found[blank]!r}; drop it"
            )
        return found
    if optional and _is_missing(value):
        return []
    raise ValueError(
        f"{source}, row {row}: expected a list of texts in column {name!r}, got {type(value).__name__}; write a list "
        "even for one text (CSV files cannot contain lists: use JSON lines or Parquet)"
    )


def _is_missing(value: Any) -> bool:
    try:
        return not (as_text(value) or "").strip()
    except ValueError:
        return False


def column(rows: Rows, name: str, source: str, numbers: NDArray[np.int64] | None = None) -> list[Any]:
    """Return one column of the rows, or of the rows in ``numbers``.

    Raises:
        ValueError: a row lacks the column.
    """
    return [value for _, (values,) in _columns(rows, [name], source, numbers) for value in values]


def _optional(rows: Rows, name: str, source: str, numbers: NDArray[np.int64] | None = None) -> list[Any]:
    """Return one column, with None for rows that lack it."""
    check_rows(rows, source)
    if is_table(rows) or isinstance(rows, FileRows):
        if name in present_columns(rows, source):
            return column(rows, name, source, numbers)
        return [None] * (len(rows) if numbers is None else len(numbers))
    return [_mapping(rows[i], i, source).get(name) for i in (range(len(rows)) if numbers is None else numbers.tolist())]


def present_columns(rows: Rows, source: str) -> Sequence[str]:
    """Return the column names; for rows in memory, those of the first row."""
    if isinstance(rows, FileRows):
        return rows.names
    if is_table(rows):
        return list(rows.column_names)
    return list(_mapping(rows[0], 0, source))


def _mapping(row: Any, number: int, source: str) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise TypeError(f"{source}, row {number}: expected a mapping of columns to values, got {type(row).__name__}")
    return row


@dataclass(frozen=True)
class Condition:
    """Condition on a row: its value in ``column`` is one of ``values``, or with ``negated`` none of them.

    Values are compared as written.
    """

    column: str
    values: tuple[str, ...]
    negated: bool = False

    def __str__(self) -> str:
        return f"{self.column}{'!=' if self.negated else '='}{','.join(map(_quoted, self.values))}"


def parse_conditions(conditions: Conditions) -> tuple[Condition, ...]:
    """Parse the conditions of a row filter; a row must meet all of them.

    Args:
        conditions: one or several of ``column=value[,value…]`` and ``column!=value[,value…]``; or a mapping of columns
            to a value or a list of values; or None for no condition. In text, put a value with commas, or with spaces
            or quotes at its ends, in double quotes, and write a quote within quotes as ``""``:
            ``client="Acme, Inc.",Boreal``. The values of a mapping are used as they are.

    Raises:
        ValueError: a condition cannot be parsed, a value or condition occurs twice, or no value can meet the
        conditions.
    """
    if conditions is None:
        return ()
    if isinstance(conditions, Mapping):
        parsed = tuple(_wanted(name, value) for name, value in conditions.items())
    else:
        parsed = tuple(map(_parse, [conditions] if isinstance(conditions, str) else conditions))
    for condition in parsed:
        value, count = Counter(condition.values).most_common(1)[0]
        if count > 1:
            raise ValueError(f"row filter {str(condition)!r}: expected each value once, got {value!r} {count} times")
    for one, other in combinations(parsed, 2):
        if one.column == other.column:
            _check_together(one, other)
    return parsed


def _check_together(one: Condition, other: Condition) -> None:
    """Raise ValueError for two conditions on one column that are redundant or contradict each other."""
    both, pair = set(one.values) & set(other.values), f"row filter {str(one)!r} and {str(other)!r}"
    if one.negated and other.negated:
        if both:
            raise ValueError(f"{pair}: expected each value once, got {min(both)!r} in both; remove one")
    elif one.negated or other.negated:
        kept, dropped = (other, one) if one.negated else (one, other)
        if set(kept.values) <= set(dropped.values):
            raise ValueError(f"{pair}: expected conditions that a row can meet, got two that contradict; remove one")
    else:
        either = Condition(one.column, tuple(dict.fromkeys((*one.values, *other.values))))
        raise ValueError(
            f"{pair}: expected one condition, a row cannot have both values; write {str(either)!r} for either"
        )


_VALUE = re.compile(r'\s*(?:"((?:[^"]|"")*)"|([^,]*))\s*(,|$)')


def _parse(text: str) -> Condition:
    left, equals, right = text.partition("=")
    negated = left.endswith("!")
    name = left.removesuffix("!").strip()
    if not equals or not name:
        raise ValueError(f"row filter: expected column=value[,value] or column!=value[,value], got {text!r}")
    values, place, more = [], 0, ","
    while more:
        found = _VALUE.match(right, place)
        if found is None or (found[1] is None and found[2].startswith('"')):
            raise ValueError(
                f"row filter {text!r}: expected a closing quote before a comma or the end, and doubled quotes within "
                f"quotes, got {right[place:].strip()!r}"
            )
        values.append(found[2].strip() if found[1] is None else found[1].replace('""', '"'))
        place, more = found.end(), found[3]
    return Condition(name, tuple(values), negated)


def _quoted(value: str) -> str:
    """Return a value in the quoting that ``_parse`` reads."""
    plain = value == value.strip() and "," not in value and not value.startswith('"')
    return value if plain else '"' + value.replace('"', '""') + '"'


def _wanted(name: str, value: Any) -> Condition:
    values = list(value) if isinstance(value, (list, tuple, set, frozenset)) else [value]
    if not values:
        raise ValueError(f"row filter: expected one or more values of column {name!r}, got an empty list; add a value")
    return Condition(name, tuple(_spellings(one)[-1] for one in values))


def _spellings(value: Any) -> tuple[str, ...]:
    """Return the spellings of a value that a condition can use; the last one is preferred.

    These are the text of ``as_text``, and for other types the spellings that are unambiguous within one column. A
    missing value is the empty text. True is also true. 3.0 is also 3, because many readers turn an integer column with
    gaps into floats. A date is written as in ISO 8601, with a T or a space before the time of day.

    Raises:
        ValueError: no condition can name the value, for example a list.
    """
    if isinstance(value, (np.bool_, np.integer, np.floating)):
        value = value.item()
    if isinstance(value, bool):
        return (str(value).lower(), str(value))
    if isinstance(value, float) and not math.isnan(value):
        return (str(value), str(int(value))) if value.is_integer() else (str(value),)
    if isinstance(value, (date, time)):
        return (str(value), value.isoformat())
    if isinstance(value, Decimal) and value.is_finite():
        return (str(value),)
    text = as_text(value)
    return ("",) if text is None else (text,)


def matching(rows: Rows, conditions: Sequence[Condition], source: str) -> NDArray[np.int64] | None:
    """Return the numbers of the rows that meet all conditions, ascending; None if there are no conditions.

    Raises:
        ValueError: a column is unknown, no row has a value of a condition, or no row meets all conditions.
    """
    if not conditions:
        return None
    names = list(dict.fromkeys(condition.column for condition in conditions))
    wanted = {name: {v for one in conditions if one.column == name for v in one.values} for name in names}
    seen: dict[str, set[str]] = {name: set() for name in names}  # wanted values that occur
    found: list[NDArray[np.int64]] = []
    for first, columns in _columns(rows, names, source):
        met = np.ones(len(columns[0]), np.bool_)
        for name, values in zip(names, columns, strict=True):
            try:
                hits = [wanted[name].intersection(_spellings(value)) for value in values]
            except ValueError as error:
                raise ValueError(f"{source}: expected values to filter by in column {name!r}, {error}") from None
            seen[name].update(*hits)
            for condition in conditions:
                if condition.column == name:
                    met &= [hit.isdisjoint(condition.values) == condition.negated for hit in hits]
        found.append(first + np.flatnonzero(met))
    for condition in conditions:
        if missing := [value for value in condition.values if value not in seen[condition.column]]:
            raise ValueError(_no_row_has(missing[0], condition, rows, source))
    numbers = np.concatenate([np.empty(0, np.int64), *found])
    if not len(numbers):
        raise ValueError(f"{source}: none of {len(rows)} rows meets {' and '.join(map(str, conditions))} together")
    return numbers


def _no_row_has(value: str, condition: Condition, rows: Rows, source: str) -> str:
    present: dict[str, str] = {}  # in order of appearance
    for _, (values,) in _columns(rows, [condition.column], source):
        for one in values:
            if len(present) < _SUGGESTION_VALUES:
                present.setdefault(_spellings(one)[-1], repr(one))
    shown = ", ".join(islice(present.values(), _SHOWN_VALUES)) or "none"
    others = " and others" if len(present) > _SHOWN_VALUES else ""
    near = _nearest(value, list(present))
    hint = "" if near is None else f"; did you mean {str(Condition(condition.column, (near,), condition.negated))!r}?"
    return (
        f"{source}: row filter {str(condition)!r}: none of {len(rows)} rows has {value!r} in column "
        f"{condition.column!r}, which has {shown}{others}{hint} (values are compared as written, including zeros, case "
        'and spaces; put a value with commas or outer spaces in double quotes: column="a, b")'
    )


def _nearest(value: str, present: Sequence[str]) -> str | None:
    """Return the value that differs only in zeros, case or spaces, else the most similar value, else None."""
    plain = _plain(value)
    same = next((other for other in present if _plain(other) == plain), None)
    return same or next(iter(difflib.get_close_matches(value, present, n=1)), None)


def _plain(value: str) -> str | float:
    try:
        return float(value)
    except ValueError:
        return " ".join(value.split()).casefold()


def text_batches(
    rows: Rows,
    question_column: str | None,
    answer_column: str,
    *,
    source: str,
    numbers: NDArray[np.int64] | None = None,
    documents: bool = False,
) -> Iterator[Batch]:
    """Read questions and answers in batches, in the form that ``encode_batches`` takes.

    Args:
        rows: the result of ``load_rows``, or a list of mappings.
        question_column: column of the questions; None gives empty questions.
        answer_column: column of the answers or documents.
        source: name of the data in messages.
        numbers: row numbers to read; None reads all rows.
        documents: whether texts are long, so that batches have 16 rows instead of 1000.

    Yields:
        Row numbers, questions, answers.

    Raises:
        ValueError: a column is missing, or a value is not text.
    """
    names = [answer_column] if question_column is None else [answer_column, question_column]
    size = _DOCUMENTS_AT_A_TIME if documents else _ROWS_AT_A_TIME
    for where, columns in _text_columns(rows, names, source, numbers, size):
        yield where, columns[1] if len(names) == 2 else [""] * len(where), columns[0]


def _text_columns(
    rows: Rows,
    names: Sequence[str],
    source: str,
    numbers: NDArray[np.int64] | None = None,
    size: int = _ROWS_AT_A_TIME,
) -> Iterator[tuple[Sequence[int], list[list[str]]]]:
    """Yield row numbers and columns of text, ``size`` rows at a time."""
    features: Mapping[str, Any] = rows.features if isinstance(rows, (datasets.Dataset, FileRows)) else {}
    for name in names:
        if isinstance(features.get(name), datasets.ClassLabel):
            raise ValueError(  # noqa: TRY004 - a value of the data
                f"{source}: expected text in column {name!r}, got class numbers (ClassLabel); convert them to text, as "
                "numbers or as class names"
            )
    for first, columns in _columns(rows, names, source, numbers, size):
        count = len(columns[0])
        where = range(first, first + count) if numbers is None else numbers[first : first + count].tolist()
        yield (
            where,
            [
                [_text(value, row, name, source) for row, value in zip(where, values, strict=True)]
                for name, values in zip(names, columns, strict=True)
            ],
        )


def _as_text(value: Any, row: int, name: str, source: str, place: str = "") -> str | None:
    try:
        return as_text(value)
    except ValueError as error:
        raise ValueError(f"{source}, row {row}: expected text in column {name!r}{place}, {error}") from None


def _text(value: Any, row: int, name: str, source: str, place: str = "") -> str:
    text = _as_text(value, row, name, source, place)
    if text is None:
        got = "NoneType" if value is None else f"{type(value).__name__} {value}, a missing value"
        raise ValueError(
            f"{source}, row {row}: expected text in column {name!r}{place}, got {got}; drop the row, or choose another "
            "column"
        )
    return text


def _columns(
    rows: Rows,
    names: Sequence[str],
    source: str,
    numbers: NDArray[np.int64] | None = None,
    size: int = _ROWS_AT_A_TIME,
) -> Iterator[tuple[int, list[list[Any]]]]:
    """Yield columns of the rows in ``numbers``, ``size`` rows at a time, each with the position of its first row."""
    check_columns(rows, names, source)
    if is_table(rows):
        if not len(rows):
            return
        chosen = rows.with_format(None).select_columns(list(names))
        chosen = chosen if numbers is None else chosen.select(numbers)
        for k, batch in enumerate(chosen.iter(size)):
            yield k * size, [batch[name] for name in names]
        return
    where: Sequence[int] = range(len(rows)) if numbers is None else numbers.tolist()
    for first in range(0, len(where), size):
        some = [_mapping(rows[i], i, source) for i in where[first : first + size]]
        for i, row in zip(where[first : first + size], some, strict=True):
            if lacking := [name for name in names if name not in row]:
                raise ValueError(f"{source}, row {i}: expected a column {lacking[0]!r}; add it, or drop the row")
        yield first, [[row[name] for row in some] for name in names]
