"""Token stores from question-answer data: tokenisation of a trainer's data sets, overlap checks, and descriptions."""

import hashlib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from efface.batching import TokenStore
from efface.batching.store import Chunk, Taken
from efface.hf.text import token_cache
from efface.hf.text.row_files import FileRows
from efface.hf.text.rows import (
    Conditions,
    Rows,
    check_rows,
    is_table,
    load_rows,
    local_file,
    matching,
    parse_conditions,
    present_columns,
    table_digest,
    text_batches,
)
from efface.hf.text.templates import AUTO, Batch, Template, encode_batches, get_template, probe

# The accepted types of a forget or retain set: tokens, a file or Hub name, or rows (such as a datasets.Dataset).
QuestionAnswers: TypeAlias = TokenStore | str | Path | Rows


_SAMPLED_TOKENS = 8  # tokens of a sequence that _samples hashes
_SHOWN = 3  # pairs of rows that an error message lists


@dataclass(frozen=True)
class Refusals:
    """Alternate answers such as "I don't know."; each row gets one, drawn with the seed and the row's number.

    Attributes:
        lines: the answers.
        seed: seed of the draws.
        every: give each row all answers, as one sequence each, for a caller that draws each time a row is read.
    """

    lines: tuple[str, ...]
    seed: int = 0
    every: bool = False

    @classmethod
    def read(cls, path: str | Path, seed: int = 0, *, every: bool = False) -> "Refusals":
        """Read a text file with one answer per line, the format of open-unlearning's idk files.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file has no line of text, or is not UTF-8.
        """
        file = Path(path).expanduser()
        if not file.is_file():
            raise FileNotFoundError(f"refusal file {str(path)!r} does not exist; check the path")
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"refusal file {str(path)!r}: expected UTF-8, got {error}; save it as UTF-8") from error
        # Not splitlines(), which also ends a line at other characters, such as U+2028.
        lines = tuple(line.strip() for line in text.split("\n") if line.strip())
        if not lines:
            raise ValueError(f"refusal file {str(path)!r}: expected one answer per line, got no text; add lines")
        return cls(lines, seed, every)

    def answers(self, rows: Sequence[int]) -> list[str]:
        """Return the drawn answer of each row number in ``rows``, counted from 0."""
        # Each row has its own generator, so its answer does not depend on which other rows are used.
        draws = (np.random.Generator(np.random.Philox(key=self.seed, counter=row)) for row in rows)
        return [self.lines[draw.integers(len(self.lines))] for draw in draws]

    def batch(self, rows: Sequence[int], questions: Sequence[str]) -> Batch:
        """Return row numbers, questions and answers; with ``every``, each row is repeated once per answer."""
        if not self.every:
            return rows, questions, self.answers(rows)
        count = len(self.lines)
        spread = [(row, question) for row, question in zip(rows, questions, strict=True) for _ in range(count)]
        return [row for row, _ in spread], [question for _, question in spread], list(self.lines) * len(rows)


def token_store(
    data: QuestionAnswers,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    name: str,
    question_column: str | None = None,
    answer_column: str | None = None,
    template: str | Template = AUTO,
    system_prompt: str | None = None,
    date_string: str | None = None,
    compat: str | None = None,
    max_length: int | None = None,
    rows_filter: Conditions = None,
    refusals: Refusals | None = None,
    cache_dir: str | Path | None = None,
) -> TokenStore:
    """Tokenise question-answer rows or documents; return a ``TokenStore`` unchanged.

    Files, Hub data sets and ``datasets.Dataset`` are tokenised once. Their tokens are kept in a memory-mapped file in
    the cache folder, under a key made from the content of the data, the tokenizer, the template and the options. The
    tokens of a list of rows, and of a ``datasets.Dataset`` with a transform, are kept in memory.

    Args:
        data: a JSON, JSON-lines, CSV or Parquet file, ``name[:config[:split]]`` on the Hub, rows, or a ``TokenStore``.
        tokenizer: required for text.
        name: name of the set in messages.
        question_column: None is "question"; for documents, "prompt" if the data has that column, else no prompt.
        answer_column: None is "answer"; for documents, "text".
        template: a name or a ``Template``; see ``efface.hf.text.templates.get_template``.
        system_prompt: replaces the template's own system prompt; "" for none.
        date_string: replaces the template's own date.
        compat: "open-unlearning" or "tofu" for the prompts and labels of that code; None for efface's.
        max_length: maximum tokens of a sequence; longer answers are cut, longer documents are split. None is no limit.
        rows_filter: conditions that rows must meet; see ``efface.hf.text.rows.parse_conditions``.
        refusals: answers that replace the rows' own answers.
        cache_dir: cache folder; None is ``$EFFACE_CACHE``, or ``efface`` in the user's cache folder.

    Raises:
        FileNotFoundError: a file does not exist.
        TypeError: ``data`` is not rows, for example a ``datasets.DatasetDict`` or a pandas table.
        ValueError: no tokenizer, a missing column, a filter that matches no row, an empty set, a row without a label, a
            value without a text (see ``efface.hf.text.rows.as_text``), a file that is not of its type, or a file that
            changes while it is read.
    """
    conditions = parse_conditions(rows_filter)
    empty = f"the {name} set is empty; expected at least one row"
    if isinstance(data, TokenStore):
        if conditions:
            raise ValueError(f"`{name}`: expected rows to filter, got a TokenStore; filter the rows before tokenising")
        if not len(data):
            raise ValueError(empty)
        return data
    if tokenizer is None:
        raise ValueError(
            f"`{name}`: expected a tokenizer for text, got none; pass `processing_class`, or a TokenStore as data"
        )
    chosen = get_template(template, tokenizer, system_prompt=system_prompt, date_string=date_string, compat=compat)
    source = f"{name} data {str(data)!r}" if isinstance(data, (str, Path)) else f"{name} data"

    def names(rows: Rows) -> tuple[str | None, str]:
        if not len(rows):
            raise ValueError(empty)
        return _column_names(rows, question_column, answer_column, chosen)

    def chunks(rows: Rows) -> tuple[Iterable[Chunk], Taken]:
        question, answer = names(rows)
        numbers = matching(rows, conditions, source)
        batches = text_batches(rows, question, answer, source=source, numbers=numbers, documents=chosen.documents)
        if refusals is not None:
            batches = (refusals.batch(where, questions) for where, questions, _ in batches)
        taken = Taken(len(rows) if numbers is None else len(numbers), len(rows))
        place = f"{source}, column {answer!r}, "
        return encode_batches(tokenizer, batches, template=chosen, max_length=max_length, where=place), taken

    def key(identity: Sequence[str]) -> str:
        return token_cache.digest(
            identity,
            [question_column, answer_column, max_length],
            [[condition.column, sorted(condition.values), condition.negated] for condition in conditions],
            [] if refusals is None else [refusals.lines, refusals.seed, *(["every"] if refusals.every else [])],
            [astuple(chosen), probe(tokenizer, chosen)],
            token_cache.tokenizer_digest(tokenizer),
        )

    if isinstance(data, (str, Path)) and (file := local_file(data)) is not None:
        digest = token_cache.file_digest(file)

        def read() -> tuple[Iterable[Chunk], Taken]:
            rows = FileRows(file, cache_dir=cache_dir)
            if rows.digest != digest:  # otherwise the cache would keep these tokens under the key of other content
                raise ValueError(f"{str(file)!r} changed while it was read; start again when it is completely written")
            return chunks(rows)

        place = str(file.resolve())
        return token_cache.stored(key([file.suffix.lower(), digest]), read, cache_dir, data=digest, source=place)
    rows = load_rows(data) if isinstance(data, (str, Path)) else data
    if isinstance(rows, FileRows):
        content = key([rows.suffix, rows.digest])
        return token_cache.stored(content, lambda: chunks(rows), cache_dir, data=rows.digest)
    check_rows(rows, f"`{name}`")
    if is_table(rows):
        asked = [condition.column for condition in conditions]
        asked += [column for column in names(rows) if column is not None]
        digest = table_digest(rows, list(dict.fromkeys(asked)), source)
        origin = str(data) if isinstance(data, (str, Path)) else ""
        content = key(["dataset", digest])
        return token_cache.stored(content, lambda: chunks(rows), cache_dir, data=digest, source=origin)
    return TokenStore(*chunks(rows))


def _column_names(rows: Rows, question: str | None, answer: str | None, template: Template) -> tuple[str | None, str]:
    if not template.documents:
        return question or "question", answer or "answer"
    if question is None and "prompt" in present_columns(rows, "rows"):
        question = "prompt"
    return question, answer or "text"


def shared_sequences(
    forget: TokenStore, retain: TokenStore, *, prompts: bool = False
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the forget sequences that are also in the retain set, each with the first equal retain sequence.

    Hashes of a few tokens rule out nearly all pairs, in NumPy; the remaining sequences are compared in full.

    Args:
        forget: forget sequences.
        retain: retain sequences.
        prompts: compare only the tokens before the labels.

    Returns:
        (K,) sequence numbers in ``forget``, ascending, and the (K,) matching numbers in ``retain``.
    """
    ours, theirs = _samples(forget, prompts), _samples(retain, prompts)
    candidates = np.flatnonzero(np.isin(theirs, ours))
    first: dict[bytes, int] = {}
    for i in candidates.tolist():
        if key := _content(retain, i, prompts):
            first.setdefault(key, i)
    numbers = np.flatnonzero(np.isin(ours, theirs[candidates])).tolist() if first else []
    pairs = [(i, first[key]) for i in numbers if (key := _content(forget, i, prompts)) in first]
    found = np.array(pairs, np.int64).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def refuse_overlap(forget: TokenStore, retain: TokenStore, *, prompts: bool = False) -> None:
    """Raise ValueError if some rows are in both sets; only warn if both sets are the same.

    The same set for both is likely intended, for example in a test run. A partial overlap is likely a mistake in a
    filter or a file.

    Args:
        forget: forget sequences.
        retain: retain sequences.
        prompts: compare only the tokens before the labels.
    """
    numbers, others = shared_sequences(forget, retain, prompts=prompts)
    if not len(numbers):
        return
    what = "question" if prompts else "row"
    if len(numbers) == len(forget) and len(shared_sequences(retain, forget, prompts=prompts)[0]) == len(retain):
        warnings.warn(
            f"the forget and the retain set are the same {len(retain)} rows, so each row is both forgotten and "
            "retained; if this is intended, add --allow-overlap (UnlearnArguments(allow_overlap=True))",
            stacklevel=2,
        )
        return
    pairs = [f"{i} and {j}" for i, j in zip(numbers[:_SHOWN].tolist(), others[:_SHOWN].tolist(), strict=True)]
    raise ValueError(
        f"expected forget and retain sets without a common {what}, got {len(numbers)} of {len(forget)} forget rows in "
        f"both: rows {', '.join(pairs)}{' and more' if len(numbers) > _SHOWN else ''} (forget and retain row, counted "
        f"from 0 after filtering) have the same {'question' if prompts else 'tokens'}; remove them from one set with "
        "--retain-filter or in its file, or add --allow-overlap (UnlearnArguments(allow_overlap=True))"
    )


def _samples(store: TokenStore, prompts: bool) -> NDArray[np.uint64]:
    """Return a hash of each sequence, (sequences,) uint64, made of its length and some of its tokens."""
    parts = [np.empty(0, np.uint64)]
    for ids, offsets, starts in store.chunks:
        begins = offsets[:-1]
        lengths = starts if prompts else np.diff(offsets)
        mixed = lengths.astype(np.uint64)
        for k in range(_SAMPLED_TOKENS):
            # Spread over the sequence, up to its second-to-last token; the last token is the same in every row.
            places = begins + np.maximum((lengths * (k + 1)) // _SAMPLED_TOKENS - 2, 0)
            tokens = ids[places].astype(np.uint64) if len(ids) else np.zeros(len(begins), np.uint64)
            mixed = (mixed ^ tokens) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(29)
        parts.append(mixed)
    return np.concatenate(parts)


def _content(store: TokenStore, index: int, prompts: bool) -> bytes:
    """Return the bytes of a sequence's tokens, or of its prompt's; b"" for a single token, such as a lone BOS token."""
    tokens = store[index]
    if prompts:
        tokens = tokens[: store.label_starts[index]]
    return tokens.tobytes() if len(tokens) > 1 else b""


@dataclass(frozen=True)
class DataFacts:
    """Description of a data set: its source, its number of sequences, and a digest of their tokens and labels.

    Attributes:
        source: file, name on the Hub, or type of the object in memory.
        rows: number of sequences; a document can be several.
        fingerprint: digest of the sequences and their labels.
        filters: conditions of the row filter.
        hub_name: name of the data set on the Hub; "" if it is not from the Hub.
        taken: number of rows after filtering; None if the set was passed as tokens.
        available: number of rows before filtering; None if the set was passed as tokens.
    """

    source: str
    rows: int
    fingerprint: str
    filters: tuple[str, ...] = ()
    hub_name: str = ""
    taken: int | None = None
    available: int | None = None

    @classmethod
    def of(cls, data: Any, store: TokenStore, conditions: Conditions = None) -> "DataFacts":
        """Return the description of ``data``, whose tokens are in ``store``."""
        named = isinstance(data, (str, Path))
        source = str(data) if named else f"{type(data).__name__} in memory"
        local = not named or Path(source).expanduser().exists() or Path(source).suffix != ""
        return cls(
            source,
            len(store),
            store_fingerprint(store),
            tuple(map(str, parse_conditions(conditions))),
            "" if local else source.split(":")[0],
            *(store.taken or ()),
        )

    def counts(self) -> str:
        """Return the row counts, such as ``400 of 4,000 rows``; for split documents, the number of sequences too."""
        sequences = f"{self.rows:,} sequences"
        if self.taken is None:
            return sequences
        counts = f"{self.taken:,} of {self.available:,} rows"
        return counts if self.taken == self.rows else f"{counts} in {sequences}"

    def __str__(self) -> str:
        filters = f", where {' and '.join(self.filters)}" if self.filters else ""
        return f"{self.counts()}, {self.source}{filters}"


def store_fingerprint(store: TokenStore) -> str:
    """Return a digest of all sequences and their labels, independent of their division into chunks."""
    state = hashlib.sha256()
    for part in (store.lengths, store.label_starts):
        state.update(np.ascontiguousarray(part, dtype=np.int64).tobytes())
    for ids, offsets, _ in store.chunks:
        if len(offsets):
            state.update(np.ascontiguousarray(ids[offsets[0] : offsets[-1]], dtype=np.int32).data)
    return state.hexdigest()[:32]


__all__ = ["DataFacts", "QuestionAnswers", "Refusals", "load_rows", "refuse_overlap", "token_store"]
