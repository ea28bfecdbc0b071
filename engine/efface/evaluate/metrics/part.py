"""Rows that metrics judge, and the tasks about them: made when first asked for, and once for all metrics."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from efface.batching import TokenStore
from efface.evaluate.generation import GenerationTask
from efface.evaluate.logs import FloatArray
from efface.evaluate.metrics.token_statistics import TokenTask
from efface.hf.text.rows import Rows, check_rows, texts
from efface.hf.text.templates import AUTO, Template, encode, get_template


@dataclass(frozen=True, eq=False)
class Windows:
    """A task whose rows are windows; ``owners`` tells of which text each is."""

    task: TokenTask
    owners: Sequence[int]

    def by_text(self, values: Sequence[Sequence[float]]) -> list[FloatArray]:
        """Join what windows tell of their labels, text by text."""
        texts: list[list[float]] = [[] for _ in range(self.owners[-1] + 1)]
        for owner, part in zip(self.owners, values, strict=True):
            texts[owner].extend(part)
        return [np.array(text, np.float64) for text in texts]


def text_windows(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    window: int,
    stride: int,
    token_budget: int = 8192,
    name: str = "texts",
) -> Windows:
    """Cut texts, tokenised with the special tokens that the tokenizer adds by itself, into overlapping windows.

    Windows of ``window`` tokens begin every ``stride`` tokens, until one reaches the end. A token is predicted in the
    first window that holds it, so that from the second window on it has at least ``window − stride`` tokens before it.
    Nothing predicts a text's first token; with most tokenizers that is the beginning-of-sequence token.

    Raises:
        ValueError: a window and a stride that do not fit one another; a text with no token to predict.
    """
    check_window(window, stride)
    encoded = tokenizer(list(texts), return_attention_mask=False, verbose=False)["input_ids"]
    sequences: list[list[int]] = []
    starts: list[int] = []
    owners: list[int] = []
    for row, ids in enumerate(encoded):
        if len(ids) < 2:
            raise ValueError(
                f"{name}, row {row}: expected a text of at least 2 tokens, got {texts[row]!r}, which is {len(ids)}: "
                "nothing predicts the first one; drop the row"
            )
        for begin, label, end in _spans(len(ids), window, stride):
            sequences.append(list(ids[begin:end]))
            starts.append(label - begin)
            owners.append(row)
    store = TokenStore.from_sequences(sequences, starts)
    return Windows(TokenTask(store, token_budget=token_budget, name=f"{name}, windows"), owners)


def check_window(window: int, stride: int) -> None:
    """Raise ValueError unless every window predicts tokens, each with one before it."""
    if not 1 <= stride < window:
        raise ValueError(f"`stride`: expected at least 1 and less than the window, {window}, got {stride}")


def _spans(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield where each window begins, where its labels do, and its end."""
    label = 1
    for begin in range(0, length, stride):
        end = min(begin + window, length)
        yield begin, label, end
        if end == length:
            return
        label = end


@dataclass(frozen=True)
class Reading:
    """How rows become prompts and answers.

    Attributes:
        question_column: None where rows have no question; the template is "completion" then, unless named.
        answer_column: the answers, or the texts.
        template: see ``efface.hf.text.templates``; documents are not split.
        max_length: cut texts to so many tokens; None never cuts.
        max_new_tokens: the most tokens of a generated answer.
        token_budget: tokens of a forward pass.
    """

    question_column: str | None = "question"
    answer_column: str = "answer"
    template: str | Template = AUTO
    max_length: int | None = None
    max_new_tokens: int = 200
    token_budget: int = 8192


class Part:
    """Rows of one role, such as the forget set.

    Args:
        source: what messages call the rows.
        rows: with the columns of ``reading``.
        tokenizer: of the model.
        reading: how rows become text.
        numbers: of the rows that have the role; None is all.

    Raises:
        ValueError: no rows, a missing column, a value that has no text or an answer that is blank.
    """

    def __init__(
        self,
        source: str,
        rows: Rows,
        tokenizer: PreTrainedTokenizerBase,
        reading: Reading,
        *,
        numbers: NDArray[np.int64] | None = None,
    ) -> None:
        check_rows(rows, source)
        self.numbers: Sequence[int] = range(len(rows)) if numbers is None else numbers.tolist()
        if not self.numbers:
            raise ValueError(f"{source}: expected rows, got none")
        self.source = source
        self.tokenizer = tokenizer
        self.reading = reading
        self._windows: dict[tuple[int, int], Windows] = {}
        asked = reading.question_column
        self.answers = texts(rows, reading.answer_column, source, numbers)
        self.questions = [""] * len(self.numbers) if asked is None else texts(rows, asked, source, numbers)
        for number, question, answer in zip(self.numbers, self.questions, self.answers, strict=True):
            if not answer.strip():
                raise ValueError(
                    f"{source}, row {number}: expected a question and an answer of text, got {question!r}, "
                    f"{answer!r}; drop the row"
                )

    @cached_property
    def tokens(self) -> TokenTask:
        """Statistics of every label: the answer and the end of sequence."""
        store = encode(
            self.tokenizer,
            self.questions,
            self.answers,
            template=replace(self._template, documents=False),  # one row, one sequence
            max_length=self.reading.max_length,
        )
        return TokenTask(store, token_budget=self.reading.token_budget, name=f"{self.source}, tokens")

    @cached_property
    def words(self) -> list[int]:
        """How many labels of each row are the text's own: all but the end of sequence, at least one."""
        store = self.tokens.store
        ended = [int(store[row][-1]) == self.tokenizer.eos_token_id for row in range(len(store))]
        return [max(1, count - end) for count, end in zip(store.label_counts.tolist(), ended, strict=True)]

    @cached_property
    def texts(self) -> list[str]:
        """The labels of each row as text, without special tokens."""
        store = self.tokens.store
        labels = [store[row][-count:].tolist() for row, count in enumerate(store.label_counts.tolist())]
        return [str(self.tokenizer.decode(ids, skip_special_tokens=True)) for ids in labels]

    @cached_property
    def generations(self) -> GenerationTask:
        """Greedy answers to the questions.

        Raises:
            ValueError: rows without questions.
        """
        if self.reading.question_column is None:
            raise ValueError(f"{self.source}: expected a column of questions to generate answers to, got none")
        return GenerationTask(
            self.tokenizer,
            self.questions,
            template=self._template,
            max_new_tokens=self.reading.max_new_tokens,
            token_budget=2 * self.reading.token_budget,  # a step of decoding reads one token of each
            name=f"{self.source}, generations",
        )

    def windows(self, window: int, stride: int) -> Windows:
        """The answers as texts of their own; see ``text_windows``."""
        if (window, stride) not in self._windows:
            self._windows[window, stride] = text_windows(
                self.tokenizer,
                self.answers,
                window=window,
                stride=stride,
                token_budget=self.reading.token_budget,
                name=self.source,
            )
        return self._windows[window, stride]

    @cached_property
    def _template(self) -> Template:
        named = self.reading.template
        completion = self.reading.question_column is None and named == AUTO
        return get_template("completion" if completion else named, self.tokenizer)
