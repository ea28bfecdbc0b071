"""Log-probabilities of answers, computed in packed batches in which tokens that answers share are computed once."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from efface.batching import PackedBatch, Role, TokenStore, pack_store, packed_size
from efface.evaluate.logs import FloatArray, SplitLog, truth_ratios
from efface.evaluate.runner import RowResult, Task
from efface.hf.model.adapted_head import base_of
from efface.hf.model.head import head_of, packed_hidden
from efface.hf.model.packing import shares_tokens
from efface.hf.model.supported import check_loaded
from efface.hf.reference.score import budgeted, check_store, scoring
from efface.hf.text.rows import optional_texts, text_lists, texts
from efface.hf.text.templates import AUTO, Template, encode_batches, get_template
from efface.hf.train.open_unlearning import IGNORE, Padded
from efface.reference.cache import KEY_BYTES, sequence_keys
from efface_kernels import linear_logprob, to_device


class AnswerTask(Task):
    """A ``Task`` that computes log-probabilities of answers, given their questions. A row is a question with answers.

    A row's result is ``{"logprobs": [[…], …]}``: for each answer, log p of each of its tokens and of the end of
    sequence, in nats. Values that are not finite are returned unchanged.

    The sequences of a batch share the computation of their common prefixes: the question, and the text that every
    prompt begins with. If a model cannot read packed batches with efface's attention (see ``hf.model.packing``), each
    answer is computed as a separate sequence.

    Args:
        tokenizer: must have an ``eos_token``.
        questions: one per row.
        answers: for each row, its answers. A row needs at least one; the number can differ between rows.
        template: see ``efface.hf.text.templates``; documents are not split.
        max_length: maximum tokens of prompt and answer; longer sequences are cut. None never cuts.
        token_budget: maximum tokens of a forward pass. Tokens that a row's answers share count once. A row longer than
            the budget forms its own batch. The budget changes results only by rounding.
        hidden: a token id that the attention mask hides, as happens where the mask is built by comparing tokens with
            the padding token. The sequences are then padded, and full logits are computed. None hides nothing.
        name: used in messages and progress.

    Raises:
        ValueError: a row has no answers; or as ``hf.text.templates.encode``, with the row's number.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        questions: Sequence[str],
        answers: Sequence[Sequence[str]],
        *,
        template: str | Template = AUTO,
        max_length: int | None = None,
        token_budget: int = 8192,
        hidden: int | None = None,
        name: str = "answers",
    ) -> None:
        counts = _counts(questions, answers)
        numbers = np.repeat(np.arange(len(counts)), counts).tolist()
        texts = (numbers, [questions[row] for row in numbers], list(chain.from_iterable(answers)))
        # Splitting a document would give more sequences than there are answers.
        whole = replace(get_template(template, tokenizer), documents=False)
        self.name = name
        self._store = TokenStore(encode_batches(tokenizer, [texts], template=whole, max_length=max_length))
        self._firsts = np.cumsum([0, *counts])
        sequences = sequence_keys(self._store)
        self.keys = [_key(sequences[first:end], hidden) for first, end in self._spans(range(len(counts)))]
        sizes = [tree_tokens(self._store, np.arange(*span)) for span in self._spans(range(len(counts)))]
        self.batches = fill(sizes, token_budget)
        self._token_budget, self._hidden = token_budget, hidden

    def run(self, model: PreTrainedModel, rows: NDArray[np.int64]) -> list[RowResult]:
        """Compute one batch and return a result for each of its rows, in order.

        Raises:
            ValueError: the loss op does not support the model's head; a token is outside the model's vocabulary; or a
                sequence is longer than the model's positions.
        """
        spans = self._spans(rows.tolist())
        sequences = np.concatenate([np.empty(0, np.int64), *(np.arange(*span) for span in spans)])
        if not len(sequences):
            return []
        score = token_logprobs if self._hidden is None else partial(padded_logprobs, hidden=self._hidden)
        values = iter(score(model, self._store, sequences, token_budget=self._token_budget, name=self.name))
        return [{"logprobs": [next(values).tolist() for _ in range(first, end)]} for first, end in spans]

    def _spans(self, rows: Sequence[int]) -> list[tuple[int, int]]:
        """Return the range of sequences of each row, as start and end (exclusive)."""
        return [(int(self._firsts[row]), int(self._firsts[row + 1])) for row in rows]


def _counts(questions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[int]:
    if len(questions) != len(answers):
        raise ValueError(f"`questions` and `answers`: expected equal lengths, got {len(questions)}, {len(answers)}")
    for row, given in enumerate(answers):
        if isinstance(given, str) or not given:
            raise ValueError(f"row {row}: expected a list of at least one answer, got {given!r}; drop the row")
    return [len(texts) for texts in answers]


def tree_tokens(store: TokenStore, sequences: NDArray[np.int64]) -> int:
    """Return the number of tokens that are run for the sequences if they share tokens."""
    roles = np.full(len(sequences), Role.RETAIN, np.int8)
    return packed_size((TokenStore.empty(), store), roles, sequences, share=True, last_tokens=False).tokens


def _key(sequences: Sequence[bytes], hidden: int | None) -> bytes:
    kind = "logprobs" if hidden is None else f"logprobs, {hidden} hidden"
    return hashlib.blake2b(kind.encode() + b"".join(sequences), digest_size=KEY_BYTES).digest()


@torch.no_grad()
def token_logprobs(
    model: PreTrainedModel, store: TokenStore, sequences: NDArray[np.int64], *, token_budget: int, name: str = "store"
) -> list[NDArray[np.floating]]:
    """Return log p of every label of each sequence, computed in packed batches."""
    head = head_of(model)
    logprobs: list[NDArray[np.floating]] = []
    with scoring(model):
        for part in scored_labels(model, store, sequences, token_budget=token_budget, name=name):
            values = linear_logprob(part.hidden, head.weight, part.targets, bias=head.bias, softcap=head.softcap)
            logprobs += part.by_sequence(values)
    return logprobs


@torch.no_grad()
def padded_logprobs(
    model: PreTrainedModel,
    store: TokenStore,
    sequences: NDArray[np.int64],
    *,
    hidden: int,
    token_budget: int,
    name: str = "store",
) -> list[NDArray[np.floating]]:
    """Return log p of every label as ``token_logprobs`` does, with tokens equal to ``hidden`` masked from attention.

    The batches are padded, and full logits are computed.
    """
    logprobs: list[NDArray[np.floating]] = []
    with scoring(model):
        check_store(model, store, name)
        for run in budgeted(store, sequences, token_budget):
            batch = Padded(*(part.to(model.device) for part in Padded.of(store, run.tolist(), hidden)))
            labels, logits = batch.labels[:, 1:], batch.run(model)[:, :-1]
            for row, targets in zip(logits, labels, strict=True):
                kept = targets != IGNORE
                values = row[kept].float().log_softmax(-1).gather(1, targets[kept][:, None])
                logprobs.append(values[:, 0].cpu().numpy())
    return logprobs


@dataclass(frozen=True, eq=False)
class ScoredLabels:
    """The labels of some sequences; a label that a shared token predicts for several sequences occurs once.

    Attributes:
        hidden: (M, D) hidden states that predict the labels.
        targets: (M,) int64 labels.
    """

    hidden: Tensor
    targets: Tensor
    _labels: NDArray[np.int64]  # for each label of each sequence in turn, its index in the M labels
    _row_offsets: tuple[int, ...]

    @classmethod
    def of(cls, model: PreTrainedModel, batch: PackedBatch) -> "ScoredLabels":
        """Run ``model`` on a batch on the CPU."""
        targets = batch.targets.numpy()
        pairs = batch.label_rows.numpy() * (int(targets.max(initial=0)) + 1) + targets  # one integer per (row, target)
        _, first, labels = np.unique(pairs, return_index=True, return_inverse=True)
        hidden = packed_hidden(model, batch.to(model.device))
        chosen = to_device(torch.from_numpy(first), hidden.device)
        moved = to_device(batch.targets[first], hidden.device)
        return cls(hidden.index_select(0, chosen), moved, labels.reshape(-1), batch.row_offsets)

    def by_sequence(self, values: Tensor) -> list[NDArray[np.floating]]:
        """Return an array per sequence with the entries of ``values`` (M,) for its labels, in order."""
        return np.split(values.cpu().numpy()[self._labels], self._row_offsets[1:-1])


def scored_labels(
    model: PreTrainedModel, store: TokenStore, sequences: NDArray[np.int64], *, token_budget: int, name: str
) -> Iterator[ScoredLabels]:
    """Run the model on the sequences and yield their labels, for each batch in turn. Call this within ``scoring``.

    If the model can share tokens between sequences, there is one batch, and shared tokens are run once. Otherwise each
    batch has at most ``token_budget`` tokens.

    Raises:
        ValueError: a token is outside the model's vocabulary, or a sequence is longer than the model's positions.
    """
    check_store(model, store, name)
    share = shares_tokens(base_of(model), int(store.lengths[sequences].max(initial=0)))
    for pack in [sequences] if share else budgeted(store, sequences, token_budget):
        yield ScoredLabels.of(model, pack_store(store, pack, share=share, last_tokens=not share))


def mean_logprobs(results: Sequence[RowResult]) -> list[list[float]]:
    """Return the mean token log-probability of each answer of each row. Its exponential is called "probability"."""
    return [[float(np.mean(answer)) for answer in row["logprobs"]] for row in results]


def sum_logprobs(results: Sequence[RowResult]) -> list[list[float]]:
    """Return log p of each answer of each row, including its end of sequence."""
    return [[float(np.sum(answer)) for answer in row["logprobs"]] for row in results]


def fill(sizes: Sequence[int], budget: int) -> list[NDArray[np.int64]]:
    """Group rows into batches whose sizes sum to at most ``budget``. A larger row forms its own batch.

    The largest rows come first, so that running out of memory shows at once and the rows of a batch have similar sizes.
    """
    batches: list[list[int]] = []
    left = 0
    for row in sorted(range(len(sizes)), key=lambda row: -sizes[row]):
        if not batches or sizes[row] > left:
            batches.append([])
            left = budget
        batches[-1].append(row)
        left -= sizes[row]
    return [np.array(batch) for batch in batches]


def _means(model: PreTrainedModel, task: AnswerTask) -> list[list[float]]:
    """Run all batches of a task on this process and return the mean log-probabilities."""
    check_loaded(model)
    results: list[RowResult] = [{}] * len(task.keys)
    for batch in task.batches:
        for row, result in zip(batch.tolist(), task.run(model, batch), strict=True):
            results[row] = result
    return mean_logprobs(results)


def answer_logprobs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    answers: Sequence[str],
    *,
    template: str | Template = AUTO,
    token_budget: int = 8192,
) -> FloatArray:
    """Return the mean token log-probability (n,) of each answer, given its question.

    Its exponential is called "probability".

    Raises:
        ValueError: as ``AnswerTask``.
    """
    alone = [[answer] for answer in answers]
    task = AnswerTask(tokenizer, questions, alone, template=template, token_budget=token_budget)
    return np.array(_means(model, task), dtype=np.float64).reshape(-1)


def score_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    *,
    template: str | Template = AUTO,
    token_budget: int = 8192,
    truth_ratio: bool = True,
) -> SplitLog:
    """Return the probability and the truth ratio of rows that have TOFU's columns.

    Args:
        model: an ``AutoModelForCausalLM``, fused or not.
        tokenizer: its tokenizer.
        rows: with the columns ``question`` and ``answer``. The truth ratio also needs ``perturbed_answer``, a list of
            the same length in every row, and uses ``paraphrased_answer``. A row without a paraphrase, as in the real
            authors, uses ``answer`` instead.
        template: see ``efface.hf.text.templates``.
        token_budget: maximum tokens of a forward pass.
        truth_ratio: whether to compute the truth ratio too.

    Raises:
        ValueError: a column is missing, a value is not text, or the lists of perturbed answers differ in length.
    """
    questions, answers = texts(rows, "question", "rows"), texts(rows, "answer", "rows")
    if not truth_ratio:
        logprobs = answer_logprobs(model, tokenizer, questions, answers, template=template, token_budget=token_budget)
        return SplitLog(probability=np.exp(logprobs))

    false_answers = text_lists(rows, "perturbed_answer", "rows")
    count = len(false_answers[0]) if false_answers else 0
    if not count or any(len(row) != count for row in false_answers):
        lengths = sorted({len(row) for row in false_answers})
        raise ValueError(f"`perturbed_answer`: expected lists of equal length, at least 1, got lengths {lengths}")
    paraphrases = optional_texts(rows, "paraphrased_answer", "rows")
    candidates = [[a, p or a, *false] for a, p, false in zip(answers, paraphrases, false_answers, strict=True)]
    task = AnswerTask(tokenizer, questions, candidates, template=template, token_budget=token_budget)
    logprobs = np.array(_means(model, task), dtype=np.float64)
    return SplitLog(np.exp(logprobs[:, 0]), truth_ratios(logprobs[:, 1], logprobs[:, 2:]))
