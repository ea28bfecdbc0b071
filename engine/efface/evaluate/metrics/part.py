"""Rows that metrics judge, and the tasks about them: made when first asked for, and once for all metrics."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from efface.evaluate.generation import GenerationTask
from efface.evaluate.metrics.token_statistics import TokenTask
from efface.evaluate.metrics.windows import Windows, text_windows
from efface.hf.rows import Rows, check_rows, texts
from efface.hf.templates import AUTO, Template, encode, get_template


@dataclass(frozen=True)
class Reading:
    """How rows become prompts and answers.

    Attributes:
        question_column: None where rows have no question; the template is "completion" then, unless named.
        answer_column: the answers, or the texts.
        template: see ``efface.hf.templates``; documents are not split.
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
