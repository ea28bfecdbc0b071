"""Token stores from question-answer data: what a trainer takes as its sets, tokenised once."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TypeAlias

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from efface.batching import TokenStore
from efface.batching.store import Chunk
from efface.hf import token_cache
from efface.hf.rows import Conditions, Rows, column, load_rows, local_file, matching, parse_conditions, text_batches
from efface.hf.templates import AUTO, Batch, Template, encode_batches, get_template, probe

# What a trainer takes as a forget or retain set: tokens, a file or Hub name, or rows (a datasets.Dataset is rows).
QuestionAnswers: TypeAlias = TokenStore | str | Path | Rows


@dataclass(frozen=True)
class Refusals:
    """Answers such as "I don't know.", of which every row gets one, drawn by the seed and the row's number.

    Attributes:
        lines: the answers.
        seed: of the draws.
        every: rows get all of them instead, one sequence each: for who draws anew whenever a row is read.
    """

    lines: tuple[str, ...]
    seed: int = 0
    every: bool = False

    @classmethod
    def read(cls, path: str | Path, seed: int = 0, *, every: bool = False) -> "Refusals":
        """Read a text file with an answer a line, as open-unlearning's idk files are.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file without a line of text.
        """
        file = Path(path).expanduser()
        if not file.is_file():
            raise FileNotFoundError(f"refusal file {str(path)!r} does not exist; check the path")
        lines = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
        if not lines:
            raise ValueError(f"refusal file {str(path)!r}: expected an answer a line, got no text")
        return cls(lines, seed, every)

    def answers(self, rows: Sequence[int]) -> list[str]:
        """Return the answers of the rows of these numbers, from 0."""
        # A draw of its own for every row: the same one whatever other rows there are.
        draws = (np.random.Generator(np.random.Philox(key=self.seed, counter=row)) for row in rows)
        return [self.lines[draw.integers(len(self.lines))] for draw in draws]

    def batch(self, rows: Sequence[int], questions: Sequence[str]) -> Batch:
        """Return row numbers, questions and answers."""
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
    """Tokenise question-answer rows or documents, or hand a ``TokenStore`` through.

    Files, Hub data sets and ``datasets.Dataset`` are tokenised once: the tokens stay in a memory-mapped file under the
    cache folder, found again by the content of the data and of all that made tokens of it. Lists of rows are in memory
    already, and so are their tokens.

    Args:
        data: a JSON, JSON-lines, CSV or Parquet file, ``name[:config[:split]]`` on the Hub, rows, or a TokenStore.
        tokenizer: needed for text.
        name: what messages call the set.
        question_column: None is "question"; for documents, "prompt" if the data has it, else no prompt.
        answer_column: None is "answer"; for documents, "text".
        template: a name or a ``Template``; see ``efface.hf.templates.get_template``.
        system_prompt: in place of the template's own; "" for none.
        date_string: in place of the template's own.
        compat: whose prompts and labels, "open-unlearning" or "tofu"; None is efface's.
        max_length: cut sequences to so many tokens, documents into sequences of so many; None never cuts.
        rows_filter: conditions that rows must meet; see ``efface.hf.rows.parse_conditions``.
        refusals: answers that take the place of the rows' own.
        cache_dir: cache folder; None is ``$EFFACE_CACHE``, or ``efface`` in the user's cache folder.

    Raises:
        FileNotFoundError: a file that does not exist.
        TypeError: a mapping, such as a datasets.DatasetDict.
        ValueError: no tokenizer, a missing column, a filter that leaves no row, an empty set, a row without a label.
    """
    conditions = parse_conditions(rows_filter)
    empty = f"the {name} set is empty; expected at least one row"
    if isinstance(data, TokenStore):
        if conditions:
            raise ValueError(f"`{name}`: a TokenStore has no columns to filter by; filter the rows that it is made of")
        if not len(data):
            raise ValueError(empty)
        return data
    if tokenizer is None:
        raise ValueError(f"`{name}`: text needs a tokenizer; give `processing_class`, or a TokenStore")
    if isinstance(data, Mapping):
        raise TypeError(f"`{name}`: expected rows, got a mapping of {', '.join(map(repr, data))}; choose one of them")
    chosen = get_template(template, tokenizer, system_prompt=system_prompt, date_string=date_string, compat=compat)
    source = f"{name} data {str(data)!r}" if isinstance(data, (str, Path)) else f"{name} data"

    def chunks(rows: Rows) -> Iterator[Chunk]:
        if not len(rows):
            raise ValueError(empty)
        question, answer = _column_names(rows, question_column, answer_column, chosen)
        numbers = matching(rows, conditions, source)
        batches = text_batches(rows, question, answer, source=source, numbers=numbers, documents=chosen.documents)
        if refusals is not None:
            batches = (refusals.batch(where, questions) for where, questions, _ in batches)
        return encode_batches(tokenizer, batches, template=chosen, max_length=max_length)

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
        content = key([file.suffix.lower(), token_cache.file_digest(file)])
        return token_cache.stored(content, lambda: chunks(load_rows(file)), cache_dir)
    rows = load_rows(data) if isinstance(data, (str, Path)) else data
    if isinstance(rows, datasets.Dataset):
        content = key(["dataset", rows._fingerprint])  # noqa: SLF001 - datasets' own name for its content
        return token_cache.stored(content, lambda: chunks(rows), cache_dir)
    return TokenStore(chunks(rows))


def _column_names(rows: Rows, question: str | None, answer: str | None, template: Template) -> tuple[str | None, str]:
    if not template.documents:
        return question or "question", answer or "answer"
    if question is None and "prompt" in rows[0]:
        question = "prompt"
    return question, answer or "text"


__all__ = ["QuestionAnswers", "Refusals", "column", "load_rows", "token_store"]
