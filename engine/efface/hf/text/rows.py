"""Rows of text: read from files, the Hub and objects in memory, and filtered by their columns."""

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

Rows: TypeAlias = Sequence[Mapping[str, Any]]  # a datasets.Dataset is rows, too
Conditions: TypeAlias = str | Sequence[str] | Mapping[str, Any] | None

_ROWS_AT_A_TIME = 1000
_DOCUMENTS_AT_A_TIME = 16  # books of some 1 MB each
_SHOWN_VALUES = 10
_LOOKED_AT_VALUES = 10_000  # for what was meant by a value that no row has
_SURROGATE = re.compile("[\ud800-\udfff]")


# No name on the Hub ends so; of these are files that are not read.
_OTHER_FILES = {
    *(".txt", ".tsv", ".xls", ".xlsx", ".ndjson", ".arrow", ".feather", ".orc", ".xml", ".html", ".yaml", ".yml"),
    *(".pkl", ".npy", ".npz", ".db", ".sqlite", ".gz", ".bz2", ".xz", ".zst", ".zip", ".tar"),
}


def local_file(source: str | Path) -> Path | None:
    """Return the path if ``source`` is a file of rows, None if it can only be a name on the Hub.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: a folder, or a file type that is not known.
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
    """Raise what reading the rows of a file would, before a model is loaded or the Hub asked; a large one is not read.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: as ``load_rows``.
    """
    path = None if source is None else local_file(source)
    if path is not None and path.stat().st_size <= IN_MEMORY:
        FileRows(path)


def load_rows(source: str | Path, *, cache_dir: str | Path | None = None) -> Rows:
    """Return the rows of a JSON, JSON-lines, CSV or Parquet file, or of a Hub data set ``name[:config[:split]]``.

    The split is "train" unless named. Rows of a file are ``FileRows``, a copy of it as it is now; those of a data set
    on the Hub are memory-mapped from the cache of ``datasets``. Either may exceed RAM.

    Args:
        source: a path or a name.
        cache_dir: the folder for large copies; see ``token_cache.cache_folder``.

    Raises:
        FileNotFoundError: a path that does not exist, a name that the Hub does not know.
        ValueError: a file type that is not known, a file that is not of its type; a Hub data set without the
            configuration or the split.
    """
    path = local_file(source)
    if path is not None:
        return FileRows(path, cache_dir=cache_dir)
    name, config, split, *more = [*str(source).split(":"), "", ""]
    if any(more):
        raise ValueError(f"{str(source)!r}: expected a file, or name:config:split of a Hub data set")
    if Path(name).expanduser().exists():  # datasets would read it by its path and time, and keep a copy
        kind = "a folder" if Path(name).expanduser().is_dir() else "a file, whose rows have no splits"
        raise ValueError(f"{str(source)!r}: expected a file, or the name of a Hub data set; {name!r} is {kind} here")
    if not name.strip():
        raise ValueError(f"{str(source)!r}: expected a file, or name:config:split of a Hub data set")
    try:
        with reading(f"data set {str(source)!r}", "a data set that `datasets` can load", "give a file of it"):
            try:
                rows: Rows = datasets.load_dataset(name, config or None, split=split or "train")
            except ValueError as error:
                raise ValueError(f"{str(source)!r}: {error}; name it as {name}:config:split") from error
    except (FileNotFoundError, ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        raise FileNotFoundError(
            f"{name!r} is neither a local file nor a data set on the Hub ({in_words(error)})"
        ) from error
    return rows


def as_text(value: Any) -> str | None:
    """Return a value as the text that it was written as; None for a missing one.

    ======================================================  ====================================================
    value                                                   text
    ======================================================  ====================================================
    str                                                     itself; refused with half of a surrogate pair
    int, NumPy integer                                      its digits
    Decimal                                                 its digits; refused where it has an exponent
    None, NaN of any type, pandas' NA and NaT, NumPy's NaT  missing
    float, NumPy float                                      refused: 1984.0 may be 1984 in a column with gaps
    bool, NumPy bool                                        refused: true, True, yes or 1
    date, time, bytes, list, mapping, array, all others     refused
    ======================================================  ====================================================

    Every place that reads text from rows goes by this one table. Files of text have text alone: a CSV field is the
    characters of the file, and so is a number in JSON (``1.10``, ``1e3``).

    Raises:
        ValueError: a value whose text is not known; the message says what it is and what to do.
    """
    if isinstance(value, str):
        text = str.__str__(value)  # of a subclass, the characters: an Enum's own __str__ returns the member's name
        if not text.isascii() and (half := _SURROGATE.search(text)):
            raise ValueError(
                f"got text with half of a surrogate pair (U+{ord(half[0]):04X} at character {half.start()}), as is "
                "left of an emoji that was cut; correct it"
            )
        return text
    if value is None or type(value).__name__ in ("NAType", "NaTType"):  # pandas', which need not be installed
        return None
    if isinstance(value, (bool, np.bool_)):
        raise ValueError(f"got bool, which could be spelled {str(value).lower()}, {value}, …; write it as text")  # noqa: TRY004 - a value of the data
    if isinstance(value, (int, np.integer)):
        return str(int(value))
    if isinstance(value, (float, np.floating, Decimal)):
        if value != value:  # noqa: PLR0124 - NaN
            return None
        if isinstance(value, Decimal) and value.is_finite() and "E" not in str(value):
            return str(value)
        raise ValueError(f"got {type(value).__name__} {value}, whose spelling is not known; write it as text")
    if isinstance(value, (np.datetime64, np.timedelta64)) and np.isnat(value):
        return None
    raise ValueError(f"got {_kind(value)}")


def _kind(value: Any) -> str:
    """What a value that is no text is, and the remedy."""
    name = type(value).__name__
    if isinstance(value, (date, time, timedelta, np.datetime64, np.timedelta64)):  # datetimes are dates
        return f"{name} {value}, whose spelling is not known; write it as text"
    if isinstance(value, (bytes, bytearray)):
        return f"{name}; decode it"
    if isinstance(value, (list, tuple)) and value and all(isinstance(turn, Mapping) for turn in value):
        return f"{name} of {len(value)} mappings, as a chat is; make a column of questions and one of answers of it"
    return f"{name}; drop the row, or name another column"


def check_rows(rows: Any, source: str) -> None:
    """Raise TypeError for what is not rows: a table of pandas, a stream, a mapping of columns."""
    if isinstance(rows, Mapping):
        raise TypeError(f"{source}: expected rows, got a mapping of {', '.join(map(repr, rows))}; choose one of them")
    if hasattr(rows, "iloc"):
        raise TypeError(
            f'{source}: expected rows, got a {type(rows).__name__}; give its .to_dict("records"), or '
            "datasets.Dataset.from_pandas of it"
        )
    if isinstance(rows, (str, bytes)) or not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
        remedy = "; give list(...) of it" if hasattr(rows, "__iter__") and not isinstance(rows, (str, bytes)) else ""
        raise TypeError(
            f"{source}: expected rows, as a list of mappings or a datasets.Dataset, got {type(rows).__name__}{remedy}"
        )


def check_columns(rows: Rows, names: Sequence[str], source: str) -> None:
    """Raise ValueError if the rows lack a column; of rows in memory, the first is asked."""
    check_rows(rows, source)
    present = present_columns(rows, source) if len(rows) else names
    for name in names:
        if name not in present:
            raise ValueError(f"{source}: expected a column {name!r}, got {', '.join(map(repr, present))}")


def table_digest(rows: datasets.Dataset, names: Sequence[str], source: str) -> str:
    """Return the SHA-256 of columns of a data set, in this order.

    Its own fingerprint is no key: it is made of what was done to make it (paths and times of files, functions of
    ``map``), so what it holds may differ under one fingerprint.

    Raises:
        ValueError: a column that it has not.
    """
    check_columns(rows, names, source)
    state = hashlib.sha256(json.dumps(list(names)).encode())
    for table in rows.with_format("arrow").select_columns(list(names)).iter(_ROWS_AT_A_TIME):
        bare = table.replace_schema_metadata(None).combine_chunks()  # the metadata holds the fingerprint
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, bare.schema) as writer:
            writer.write_table(bare)
        state.update(sink.getvalue())
    return state.hexdigest()


def is_table(rows: Any) -> TypeGuard[datasets.Dataset]:
    """Whether rows are a ``datasets.Dataset`` of values; what ``set_transform`` makes of one is computed row by row."""
    return isinstance(rows, datasets.Dataset) and rows.format["type"] != "custom"


def texts(rows: Rows, name: str, source: str, numbers: NDArray[np.int64] | None = None) -> list[str]:
    """Return a column of text.

    Args:
        rows: what ``load_rows`` returned, or a list of mappings.
        name: of the column.
        source: what messages call the data.
        numbers: of the rows to read; None reads all.

    Raises:
        ValueError: a row without it; a value that has no text, see ``as_text``.
    """
    return [text for _, (found,) in _text_columns(rows, [name], source, numbers) for text in found]


def optional_texts(rows: Rows, name: str, source: str) -> list[str | None]:
    """Return a column of text that rows may lack; None where one does, or where its value is missing.

    Raises:
        ValueError: a value that has no text, see ``as_text``.
    """
    return [_as_text(value, row, name, source) for row, value in enumerate(_optional(rows, name, source))]


def text_lists(
    rows: Rows, name: str, source: str, *, optional: bool = False, numbers: NDArray[np.int64] | None = None
) -> list[list[str]]:
    """Return a column of lists of texts.

    Args:
        rows: what ``load_rows`` returned, or a list of mappings.
        name: of the column.
        source: what messages call the data.
        optional: a row may lack it: then its list is empty, as it is where the value is missing or empty text.
        numbers: of the rows to read; None reads all.

    Raises:
        ValueError: a row without it; a value that is no list; an item that has no text, see ``as_text``, or is blank.
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
        f"{source}, row {row}: expected a list of texts in column {name!r}, got {type(value).__name__}; write a list, "
        "also of one text (a CSV file holds none: use JSON lines or Parquet)"
    )


def _is_missing(value: Any) -> bool:
    try:
        return not (as_text(value) or "").strip()
    except ValueError:
        return False


def column(rows: Rows, name: str, source: str, numbers: NDArray[np.int64] | None = None) -> list[Any]:
    """Return one column of the rows, or of those of these numbers.

    Raises:
        ValueError: a row without it.
    """
    return [value for _, (values,) in _columns(rows, [name], source, numbers) for value in values]


def _optional(rows: Rows, name: str, source: str, numbers: NDArray[np.int64] | None = None) -> list[Any]:
    """Return one column that any row may lack."""
    check_rows(rows, source)
    if is_table(rows) or isinstance(rows, FileRows):
        if name in present_columns(rows, source):
            return column(rows, name, source, numbers)
        return [None] * (len(rows) if numbers is None else len(numbers))
    return [_mapping(rows[i], i, source).get(name) for i in (range(len(rows)) if numbers is None else numbers.tolist())]


def present_columns(rows: Rows, source: str) -> Sequence[str]:
    """Names of the columns; of rows in memory, those of the first."""
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
    """What a row must meet: its value is one of ``values``, or none of them. Values are compared as written."""

    column: str
    values: tuple[str, ...]
    negated: bool = False

    def __str__(self) -> str:
        return f"{self.column}{'!=' if self.negated else '='}{','.join(map(_quoted, self.values))}"


def parse_conditions(conditions: Conditions) -> tuple[Condition, ...]:
    """Read the conditions of a row filter, all of which a row must meet.

    Args:
        conditions: ``column=value[,value…]`` or ``column!=value[,value…]``, one or several; or a mapping of columns
            to a value or a list of values; None for none. In text, a value with commas, or with spaces or quotes at
            its ends, stands in double quotes, in which ``""`` is one: ``client="Acme, Inc.",Boreal``. The values of a
            mapping are taken as they are.

    Raises:
        ValueError: a condition that cannot be read, a value or condition that is given twice, conditions that no value
            can meet.
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
    """Refuse two conditions on a column of which one says nothing, or which no value can meet."""
    both, pair = set(one.values) & set(other.values), f"row filter {str(one)!r} and {str(other)!r}"
    if one.negated and other.negated:
        if both:
            raise ValueError(f"{pair}: expected each value once, got {min(both)!r} in both")
    elif one.negated or other.negated:
        kept, dropped = (other, one) if one.negated else (one, other)
        if set(kept.values) <= set(dropped.values):
            raise ValueError(f"{pair}: expected conditions that a row can meet, got two that contradict")
    else:
        either = Condition(one.column, tuple(dict.fromkeys((*one.values, *other.values))))
        raise ValueError(f"{pair}: a row must meet both, and has one value; write {str(either)!r} for either of them")


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
                f"row filter {text!r}: expected a closing quote before a comma or the end, and a quote within quotes "
                f"twice, got {right[place:].strip()!r}"
            )
        values.append(found[2].strip() if found[1] is None else found[1].replace('""', '"'))
        place, more = found.end(), found[3]
    return Condition(name, tuple(values), negated)


def _quoted(value: str) -> str:
    """Write a value as ``_parse`` reads it."""
    plain = value == value.strip() and "," not in value and not value.startswith('"')
    return value if plain else '"' + value.replace('"', '""') + '"'


def _wanted(name: str, value: Any) -> Condition:
    values = list(value) if isinstance(value, (list, tuple, set, frozenset)) else [value]
    if not values:
        raise ValueError(f"row filter: expected a value of column {name!r}, or several, got an empty list")
    return Condition(name, tuple(_spellings(one)[-1] for one in values))


def _spellings(value: Any) -> tuple[str, ...]:
    """How a condition may write a value: as ``as_text`` has it, or in ways that can mean nothing else in its column.

    A missing value is written as nothing. True is also true. 3.0 is also 3: to many readers an integer column with gaps
    is one of floats. A date is written as in ISO 8601, a time of day after a T or a space.

    Raises:
        ValueError: a value that no condition can name, such as a list.
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
    """Return the numbers of the rows that meet all conditions, in order; None if there are no conditions.

    Raises:
        ValueError: an unknown column, a value in a condition that no row has, no row that meets all conditions.
    """
    if not conditions:
        return None
    names = list(dict.fromkeys(condition.column for condition in conditions))
    wanted = {name: {v for one in conditions if one.column == name for v in one.values} for name in names}
    seen: dict[str, set[str]] = {name: set() for name in names}  # of the wanted ones
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
        raise ValueError(f"{source}: no row of {len(rows)} meets {' and '.join(map(str, conditions))} together")
    return numbers


def _no_row_has(value: str, condition: Condition, rows: Rows, source: str) -> str:
    present: dict[str, str] = {}  # in order of appearance
    for _, (values,) in _columns(rows, [condition.column], source):
        for one in values:
            if len(present) < _LOOKED_AT_VALUES:
                present.setdefault(_spellings(one)[-1], repr(one))
    shown = ", ".join(islice(present.values(), _SHOWN_VALUES)) or "none"
    others = " and others" if len(present) > _SHOWN_VALUES else ""
    near = _nearest(value, list(present))
    hint = "" if near is None else f"; did you mean {str(Condition(condition.column, (near,), condition.negated))!r}?"
    return (
        f"{source}: row filter {str(condition)!r}: no row of {len(rows)} has {value!r} in column {condition.column!r}, "
        f"which has {shown}{others}{hint} (values are compared as written, with zeros, case and spaces; one with "
        'commas or outer spaces stands in double quotes: column="a, b")'
    )


def _nearest(value: str, present: Sequence[str]) -> str | None:
    """Return the value that is the same but for zeros, case and spaces, else the most similar one."""
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
    """Read questions and answers batch by batch, as ``encode_batches`` takes them.

    Args:
        rows: what ``load_rows`` returned, or a list of mappings.
        question_column: None reads empty questions.
        answer_column: the answers, or the documents.
        source: what messages call the data.
        numbers: of the rows to read; None reads all.
        documents: texts are long, read few at a time.

    Yields:
        Row numbers, questions, answers.

    Raises:
        ValueError: a missing column, a value that is not text.
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
                f"{source}: expected text in column {name!r}, got numbers of classes (ClassLabel), which have names, "
                "too; write the one or the other as text"
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
            f"{source}, row {row}: expected text in column {name!r}{place}, got {got}; drop the row, or name another "
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
    """Yield columns of the numbered rows, ``size`` rows at a time, with the place of the first."""
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
