"""Question-answer rows from files, Hub data sets, and objects in memory."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from efface.batching import TokenStore
from efface.hf.templates import AUTO, encode

_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}

# What a trainer takes as a forget or retain set: tokens, a file or Hub name, or rows (a datasets.Dataset is rows).
QuestionAnswers = TokenStore | str | Path | Sequence[Mapping[str, Any]]


def load_rows(source: str | Path, *, split: str = "train") -> Sequence[Mapping[str, Any]]:
    """Return the rows of a JSON, JSON-lines, CSV or Parquet file, or of a Hub data set (``name`` or ``name:config``).

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: a file type that is not known.
    """
    import datasets  # noqa: PLC0415 - heavy, and needed only for files

    path = Path(source)
    builder = _BUILDERS.get(path.suffix.lower())
    if builder is not None or path.exists():
        if not path.is_file():
            raise FileNotFoundError(f"data file {str(path)!r} does not exist; check the path")
        if builder is None:
            raise ValueError(f"{str(path)!r}: expected a file of type {', '.join(_BUILDERS)}, got {path.suffix!r}")
        rows: Sequence[Mapping[str, Any]] = datasets.load_dataset(builder, data_files=str(path), split="train")
        return rows
    name, _, config = str(source).partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split=split)
    except (FileNotFoundError, ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        raise FileNotFoundError(f"{name!r} is neither a local file nor a data set on the Hub ({error})") from error
    return rows


def column(rows: Sequence[Mapping[str, Any]], name: str, source: str) -> list[Any]:
    """Return one column of the rows.

    Raises:
        ValueError: a row without it.
    """
    for row in rows:
        if name not in row:
            raise ValueError(f"{source}: expected a column {name!r}, got {', '.join(map(repr, row))}")
        break
    try:
        return [row[name] for row in rows]
    except KeyError as error:
        raise ValueError(f"{source}: some rows have no column {name!r}") from error


def token_store(
    data: QuestionAnswers,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    name: str,
    question_column: str = "question",
    answer_column: str = "answer",
    template: str = AUTO,
    max_length: int | None = None,
) -> TokenStore:
    """Tokenise question-answer rows, or hand a ``TokenStore`` through.

    Raises:
        FileNotFoundError: a file that does not exist.
        ValueError: no tokenizer, a missing column, or an empty set.
    """
    if isinstance(data, TokenStore):
        store = data
    else:
        if tokenizer is None:
            raise ValueError(f"`{name}`: text needs a tokenizer; give `processing_class`, or a TokenStore")
        source = f"{name} data {str(data)!r}" if isinstance(data, (str, Path)) else f"{name} data"
        rows = load_rows(data) if isinstance(data, (str, Path)) else data
        questions, answers = column(rows, question_column, source), column(rows, answer_column, source)
        store = encode(tokenizer, questions, answers, template=template, max_length=max_length)
    if not len(store):
        raise ValueError(f"the {name} set is empty; expected at least one row")
    return store
