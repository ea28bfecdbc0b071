"""The rows that metrics evaluate, and the tasks on them, which are created lazily and shared by all metrics."""

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
    """A task whose rows are windows of texts. ``owners`` is the number of the text of each window."""

    task: TokenTask
    owners: Sequence[int]

    def by_text(self, values: Sequence[Sequence[float]]) -> list[FloatArray]:
        """Concatenate the values of the windows of each text. ``values`` has the label values of each window."""
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
    """Cut texts into overlapping windows. Texts are tokenised with the tokenizer's default special tokens.

    Windows of ``window`` tokens start every ``stride`` tokens, until one reaches the end of the text. A token is
    predicted in the first window that contains it. From the second window on, a predicted token has therefore at least
    ``window − stride`` tokens before it. The first token of a text is not predicted; with most tokenizers, it is the
    beginning-of-sequence token.

    Raises:
        ValueError: ``stride`` is not in [1, window), or a text has fewer than 2 tokens.
    """
    check_window(window, stride)
    encoded = tokenizer(list(texts), return_attention_mask=False, verbose=False)["input_ids"]
    sequences: list[list[int]] = []
    starts: list[int] = []
    owners: list[int] = []
    for row, ids in enumerate(encoded):
        if len(ids) < 2:
            raise ValueError(
                f"{name}, row {row}: expected a text of at least 2 tokens, got {texts[row]!r} with {len(ids)}; drop "
                "the row (the first token of a text is not predicted)"
            )
        for begin, label, end in _spans(len(ids), window, stride):
            sequences.append(list(ids[begin:end]))
            starts.append(label - begin)
            owners.append(row)
    store = TokenStore.from_sequences(sequences, starts)
    return Windows(TokenTask(store, token_budget=token_budget, name=f"{name}, windows"), owners)


def check_window(window: int, stride: int) -> None:
    """Raise ValueError unless 1 <= ``stride`` < ``window``, so that every predicted token has a token before it."""
    if not 1 <= stride < window:
        raise ValueError(f"`stride`: expected at least 1 and less than the window ({window}), got {stride}")


def _spans(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield the start, the first label position and the end (exclusive) of each window."""
    label = 1
    for begin in range(0, length, stride):
        end = min(begin + window, length)
        yield begin, label, end
        if end == length:
            return
        label = end


@dataclass(frozen=True)
class Reading:
    """The columns of rows, and how they become prompts and answers.

    Attributes:
        question_column: column of the questions; None if rows have no questions. With None, the default template is
            "completion".
        answer_column: column of the answers or texts.
        template: see ``efface.hf.text.templates``; documents are not split.
        max_length: maximum tokens of a text; longer ones are cut. None never cuts.
        max_new_tokens: maximum tokens of a generated answer.
        token_budget: maximum tokens of a forward pass.
    """

    question_column: str | None = "question"
    answer_column: str = "answer"
    template: str | Template = AUTO
    max_length: int | None = None
    max_new_tokens: int = 200
    token_budget: int = 8192


class Part:
    """Rows with one role, such as the forget set, and the tasks on them.

    Args:
        source: name of the rows in messages.
        rows: the data, with the columns of ``reading``.
        tokenizer: the model's tokenizer.
        reading: columns, template and limits.
        numbers: row numbers that belong to this part; None for all rows.

    Raises:
        ValueError: there are no rows, a column is missing, a value is not text, or an answer is blank.
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
            raise ValueError(f"{source}: expected at least one row, got none")
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
                    f"{source}, row {number}: expected a question and an answer with text, got {question!r}, "
                    f"{answer!r}; drop the row"
                )

    @cached_property
    def tokens(self) -> TokenTask:
        """The task that computes statistics of every label, which are the answer and the end of sequence."""
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
        """The number of labels of each row without the end of sequence, at least 1."""
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
        """The task that generates greedy answers to the questions.

        Raises:
            ValueError: the rows have no question column.
        """
        if self.reading.question_column is None:
            raise ValueError(f"{self.source}: expected a column of questions to generate answers to, got none")
        return GenerationTask(
            self.tokenizer,
            self.questions,
            template=self._template,
            max_new_tokens=self.reading.max_new_tokens,
            token_budget=2 * self.reading.token_budget,  # a decoding step reads only one token of each row
            name=f"{self.source}, generations",
        )

    def windows(self, window: int, stride: int) -> Windows:
        """Return windows of the answers as texts without questions; see ``text_windows``."""
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
