"""The providers of the evaluate suite: mean token log-probabilities of all answers, and greedy answers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.evaluate.inputs import Split
from efface.evaluate import AnswerTask, mean_logprobs
from efface.hf.text.templates import encode

Scores: TypeAlias = list[list[list[float]]]  # by split, row and answer

BATCH = 16
IGNORED = -100


class Scorer(ABC):
    """Scores the answers of all splits. Tokenization and padding happen in the constructor, which is not timed."""

    name: ClassVar[str]

    @abstractmethod
    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: list[Split]) -> None:
        """Tokenise the texts and build the batches."""

    @abstractmethod
    def scores(self, model: PreTrainedModel) -> Scores:
        """Return the mean log-probabilities of all answers."""


@dataclass(frozen=True)
class _Batch:
    rows: range
    answer: int
    inputs: dict[str, Tensor]  # each (B, T)


class Padded(Scorer):
    """open-unlearning's loop: batches of 16 rows' first answers, then of their second ones, and so on; all logits.

    It is slightly favoured: the model's own loss from ``labels=``, which open-unlearning ignores, is not computed, and
    no key-value cache is filled.
    """

    name = "padded, 16 rows"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: list[Split]) -> None:
        self._shapes = [[len(answers) for answers in split.answers] for split in data]
        self._batches = [_padded(tokenizer, split) for split in data]

    @torch.no_grad()
    def scores(self, model: PreTrainedModel) -> Scores:
        scores = [[[0.0] * count for count in counts] for counts in self._shapes]
        for split, batches in zip(scores, self._batches, strict=True):
            for batch in batches:
                labels = batch.inputs["labels"][..., 1:].contiguous()
                ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[..., :-1, :].contiguous()
                means = -self._losses(logits, labels).sum(-1) / (labels != IGNORED).sum(-1)
                for row, mean in zip(batch.rows, means.tolist(), strict=True):
                    split[row][batch.answer] = mean
        return scores

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        losses: Tensor = F.cross_entropy(logits.transpose(-1, -2), labels, ignore_index=IGNORED, reduction="none")
        return losses


class PaddedRows(Padded):
    """The padded loop with cross_entropy over flattened rows: its fastest version on a CPU.

    On transposed logits, (B, V, T), cross_entropy makes a copy and sums with strides.
    """

    name = "padded, 16 rows, flat loss"

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        rows = logits.view(-1, logits.shape[-1])
        return F.cross_entropy(rows, labels.view(-1), ignore_index=IGNORED, reduction="none").view(labels.shape)


class Efface(Scorer):
    """efface: packed, the prefix that answers share computed once, logits of label rows only."""

    name = "efface"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: list[Split]) -> None:
        self._tasks = [AnswerTask(tokenizer, split.questions, split.answers) for split in data]

    def scores(self, model: PreTrainedModel) -> Scores:
        scores = []
        for task in self._tasks:
            means: list[list[float]] = [[]] * len(task.keys)
            for batch in task.batches:
                for row, mean in zip(batch.tolist(), mean_logprobs(task.run(model, batch)), strict=True):
                    means[row] = mean
            scores.append(means)
        return scores


SCORERS = (Padded, PaddedRows, Efface)


def _padded(tokenizer: PreTrainedTokenizerBase, split: Split) -> list[_Batch]:
    """Return the batches of a split. All rows of a split have the same number of answers."""
    batches = []
    for first in range(0, len(split.questions), BATCH):
        rows = range(first, min(first + BATCH, len(split.questions)))
        for answer in range(len(split.answers[0])):
            texts = [split.answers[row][answer] for row in rows]
            batches.append(_Batch(rows, answer, _inputs(tokenizer, [split.questions[row] for row in rows], texts)))
    return batches


def _inputs(tokenizer: PreTrainedTokenizerBase, questions: list[str], answers: list[str]) -> dict[str, Tensor]:
    store = encode(tokenizer, questions, answers)
    ids = [torch.from_numpy(store[i].astype(np.int64)) for i in range(len(store))]
    labels = [row.clone() for row in ids]
    for row, start in zip(labels, store.label_starts.tolist(), strict=True):
        row[:start] = IGNORED
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=0),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True, padding_value=0),
    }


def generate_of(model: Any, prompts: Sequence[Sequence[int]], size: int) -> Callable[[int], list[int]]:
    """Return a call that generates answers with ``model.generate`` and returns their lengths."""
    ends = torch.tensor(model.generation_config.eos_token_id)

    def call(_round: int) -> list[int]:
        counts: list[int] = []
        for first in range(0, len(prompts), size):
            batch = prompts[first : first + size]
            longest = max(map(len, batch))
            ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in batch])
            mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch])
            new = model.generate(ids, attention_mask=mask, do_sample=False)[:, longest:]
            ended = torch.isin(new, ends)
            counts += torch.where(ended.any(1), ended.int().argmax(1), new.shape[1]).tolist()
        return counts

    return call
