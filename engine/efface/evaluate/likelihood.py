"""Log-likelihoods of answers, packed: every token that the answers to a question have in common is computed once."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from efface.batching import TokenStore, TokenTree, token_tree, tree_tokens
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
from efface_kernels import linear_logprob


class AnswerTask(Task):
    """Log-probabilities of answers, given their questions: a ``Task``, one row a question with its answers.

    A row's result is ``{"logprobs": [[…], …]}``: for every answer, log p of each of its tokens and of the end of
    sequence, in nats. Values that are not finite stay as they are.

    The sequences of a batch share the beginnings that they have in common, up to where their tokens differ: the
    question, and what stands before it in every question. Where a model reads packs otherwise than with our attention
    (``hf.model.packing``), each answer is a sequence of its own.

    Args:
        tokenizer: with an ``eos_token``.
        questions: one a row.
        answers: of each row, at least one; rows may differ in how many.
        template: see ``efface.hf.text.templates``; documents are not split.
        max_length: cut prompt and answer to so many tokens; None never cuts.
        token_budget: tokens of a forward pass, those that a row's answers share counted once; a longer row comes
            alone. It does not change a result beyond rounding.
        hidden: a token that no other sees, as where an attention mask is made by comparing with the padding token;
            the sequences are then padded, and full logits computed. None hides nothing.
        name: for messages and progress.

    Raises:
        ValueError: a row without answers; as ``hf.text.templates.encode``, with the row's number.
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
        # A document that is split would be more sequences than it has answers.
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
        """Compute one batch; see the class.

        Raises:
            ValueError: a head that the loss op cannot serve; tokens or lengths that the model has not.
        """
        spans = self._spans(rows.tolist())
        sequences = np.concatenate([np.empty(0, np.int64), *(np.arange(*span) for span in spans)])
        if not len(sequences):
            return []
        score = token_logprobs if self._hidden is None else partial(padded_logprobs, hidden=self._hidden)
        values = iter(score(model, self._store, sequences, token_budget=self._token_budget, name=self.name))
        return [{"logprobs": [next(values).tolist() for _ in range(first, end)]} for first, end in spans]

    def _spans(self, rows: Sequence[int]) -> list[tuple[int, int]]:
        """Return the first sequence of each row, and the one after its last."""
        return [(int(self._firsts[row]), int(self._firsts[row + 1])) for row in rows]


def _counts(questions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[int]:
    if len(questions) != len(answers):
        raise ValueError(f"`questions` and `answers`: expected equal lengths, got {len(questions)}, {len(answers)}")
    for row, given in enumerate(answers):
        if isinstance(given, str) or not given:
            raise ValueError(f"row {row}: expected a list of at least one answer, got {given!r}; drop the row")
    return [len(texts) for texts in answers]


def _key(sequences: Sequence[bytes], hidden: int | None) -> bytes:
    kind = "logprobs" if hidden is None else f"logprobs, {hidden} hidden"
    return hashlib.blake2b(kind.encode() + b"".join(sequences), digest_size=KEY_BYTES).digest()


@torch.no_grad()
def token_logprobs(
    model: PreTrainedModel, store: TokenStore, sequences: NDArray[np.int64], *, token_budget: int, name: str = "store"
) -> list[NDArray[np.floating]]:
    """Return log p of every label of each sequence, by ``scored_trees``."""
    head = head_of(model)
    logprobs: list[NDArray[np.floating]] = []
    with scoring(model):
        for tree in scored_trees(model, store, sequences, token_budget=token_budget, name=name):
            hidden = packed_hidden(model, tree)
            values = linear_logprob(hidden, head.weight, tree.targets, bias=head.bias, softcap=head.softcap)
            logprobs += tree.by_sequence(values.cpu().numpy())
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
    """As ``token_logprobs``, from padded batches and full logits, with no token seeing one that is ``hidden``."""
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


def scored_trees(
    model: PreTrainedModel, store: TokenStore, sequences: NDArray[np.int64], *, token_budget: int, name: str
) -> Iterator[TokenTree]:
    """Yield the sequences as one tree, whose shared tokens are computed once; within ``scoring``.

    A model that cannot share takes the sequences whole, ``token_budget`` tokens at a time.

    Raises:
        ValueError: tokens or lengths that the model has not.
    """
    check_store(model, store, name)
    share = shares_tokens(base_of(model), int(store.lengths[sequences].max(initial=0)))
    for pack in [sequences] if share else budgeted(store, sequences, token_budget):
        yield token_tree(store, pack, share=share).to(model.device)


def mean_logprobs(results: Sequence[RowResult]) -> list[list[float]]:
    """Return the mean token log-probability of every answer of every row; exp of it is "probability"."""
    return [[float(np.mean(answer)) for answer in row["logprobs"]] for row in results]


def sum_logprobs(results: Sequence[RowResult]) -> list[list[float]]:
    """Return log p of every answer of every row, its end of sequence included."""
    return [[float(np.sum(answer)) for answer in row["logprobs"]] for row in results]


def fill(sizes: Sequence[int], budget: int) -> list[NDArray[np.int64]]:
    """Return batches of rows whose sizes sum to the budget at most; a larger row comes alone.

    The largest come first: a lack of memory shows at once, and the rows of a batch are alike in size.
    """
    batches: list[list[int]] = []
    room = 0
    for row in sorted(range(len(sizes)), key=lambda row: -sizes[row]):
        if not batches or sizes[row] > room:
            batches.append([])
            room = budget
        batches[-1].append(row)
        room -= sizes[row]
    return [np.array(batch) for batch in batches]


def _means(model: PreTrainedModel, task: AnswerTask) -> list[list[float]]:
    """Run all of a task here and now."""
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
    """Return the mean token log-probability (n,) of each answer, given its question; exp of it is "probability".

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
    """Return probability and truth ratio of rows in TOFU's columns.

    Args:
        model: an ``AutoModelForCausalLM``, fused or not.
        tokenizer: its tokenizer.
        rows: with ``question``, ``answer``; for the truth ratio also ``perturbed_answer`` (a list, equally long in
            every row) and ``paraphrased_answer`` (``answer`` where a row has none, as real authors).
        template: see ``efface.hf.text.templates``.
        token_budget: tokens of a forward pass.
        truth_ratio: False scores the answers alone.

    Raises:
        ValueError: a missing column, a value that has no text, or lists of perturbed answers that differ in length.
    """
    questions, answers = texts(rows, "question", "rows"), texts(rows, "answer", "rows")
    if not truth_ratio:
        logprobs = answer_logprobs(model, tokenizer, questions, answers, template=template, token_budget=token_budget)
        return SplitLog(probability=np.exp(logprobs))

    false_answers = text_lists(rows, "perturbed_answer", "rows")
    count = len(false_answers[0]) if false_answers else 0
    if not count or any(len(row) != count for row in false_answers):
        lengths = sorted({len(row) for row in false_answers})
        raise ValueError(f"`perturbed_answer`: expected lists of one length, at least 1, got lengths {lengths}")
    paraphrases = optional_texts(rows, "paraphrased_answer", "rows")
    candidates = [[a, p or a, *false] for a, p, false in zip(answers, paraphrases, false_answers, strict=True)]
    task = AnswerTask(tokenizer, questions, candidates, template=template, token_budget=token_budget)
    logprobs = np.array(_means(model, task), dtype=np.float64)
    return SplitLog(np.exp(logprobs[:, 0]), truth_ratios(logprobs[:, 1], logprobs[:, 2:]))
