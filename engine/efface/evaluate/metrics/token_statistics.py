"""Statistics of every label of a text: log-probability, whether it is the argmax, and moments of the distribution."""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from efface.batching import TokenStore
from efface.evaluate.likelihood import fill, scored_labels, tree_tokens
from efface.evaluate.runner import RowResult, Task
from efface.hf.model.head import head_of
from efface.hf.reference.score import scoring
from efface.reference.cache import KEY_BYTES, sequence_keys
from efface_kernels import Head, Logits, chunk_capacity, row_blocks

# Below the log of the smallest float64, so p is 0 there. The clamp makes 0 · log p equal 0 for a logit of −inf too.
_NO_PROBABILITY = -1000.0


@dataclass(frozen=True, eq=False)
class TokenStatistics:
    """Statistics of N targets. Each tensor is (N,), float32 (float64 for float64 models), except ``first``.

    Attributes:
        logprobs: log p of the target, in nats.
        first: bool, whether the target is the argmax, which greedy decoding selects. Of equally likely tokens, the one
            with the lowest id is the argmax.
        mean: E_p[log p] over the vocabulary, the negative entropy.
        std: sqrt(Var_p[log p]); 0 if the distribution is uniform over the tokens with p > 0.
    """

    logprobs: Tensor
    first: Tensor
    mean: Tensor
    std: Tensor


@torch.no_grad()
def token_statistics(hidden: Tensor, head: Head, targets: Tensor, *, chunk_rows: int | None = None) -> TokenStatistics:
    """Return the statistics of targets (N,), without materialising the logits of all rows at once.

    Equal to::

        logp = torch.log_softmax(softcap(linear(hidden, weight, bias).float()), -1)
        logprobs, first = logp.gather(-1, targets[:, None])[:, 0], logp.argmax(-1) == targets
        mean = (logp.exp() * logp).sum(-1)
        std = (logp.exp() * (logp - mean[:, None]) ** 2).sum(-1).sqrt()

    Args:
        hidden: (N, D).
        head: the model's head, with the dtype of ``hidden``.
        targets: (N,) int64.
        chunk_rows: number of rows whose logits are in memory at a time; None chooses it as the loss op does.
    """
    rows = chunk_rows or chunk_capacity(hidden.device, head.vocabulary, hidden.dtype.itemsize)
    workspace = hidden.new_empty(min(rows, len(hidden)), head.vocabulary)
    parts = [
        _of_logits(Logits(head.logits(part, workspace), head.softcap), labels)
        for part, labels in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    logprobs, first, mean, std = (torch.cat(column) for column in zip(*parts, strict=True))
    return TokenStatistics(logprobs, first, mean, std)


def _of_logits(logits: Logits, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first = torch.empty_like(targets, dtype=torch.bool)
    logprobs, mean, std = (logits.row_vector() for _ in range(3))
    for block in row_blocks(logits.values):
        z, _ = logits.capped(block)  # (n, V)
        first[block] = z.argmax(-1) == targets[block]
        logp = torch.log_softmax(z, -1)
        logprobs[block] = logp.gather(-1, targets[block, None])[:, 0]
        logp.clamp_(min=_NO_PROBABILITY)
        p = logp.exp()
        mean[block] = (p * logp).sum(-1)
        # Two passes, because E[x²] − E[x]² cancels if the distribution is nearly uniform, as in a collapsed model.
        std[block] = (p * (logp - mean[block, None]).square_()).sum(-1).sqrt_()
    return logprobs, first, mean, std


class TokenTask(Task):
    """A ``Task`` that computes statistics of every label of the sequences of a store. A row is a sequence.

    A row's result is ``{"logprobs": […], "first": […], "mean": […], "std": […]}``, with one entry per label, in the
    order of the text; see ``TokenStatistics``. Values that are not finite are returned unchanged.

    Args:
        store: tokens and label positions.
        token_budget: maximum tokens of a forward pass. A longer row forms its own batch. The budget changes results
            only by rounding.
        name: used in messages and progress.
    """

    def __init__(self, store: TokenStore, *, token_budget: int = 8192, name: str = "tokens") -> None:
        self.name = name
        self.store = store
        self.keys = [_key(sequence) for sequence in sequence_keys(store)]
        self.batches = fill([tree_tokens(store, np.array([row])) for row in range(len(store))], token_budget)
        self._token_budget = token_budget

    def run(self, model: PreTrainedModel, rows: NDArray[np.int64]) -> list[RowResult]:
        """Compute one batch and return a result for each of its rows, in order.

        Raises:
            ValueError: the loss op does not support the model's head; a token is outside the model's vocabulary; or a
                sequence is longer than the model's positions.
        """
        head = head_of(model)
        results: list[RowResult] = []
        with torch.no_grad(), scoring(model):
            for part in scored_labels(model, self.store, rows, token_budget=self._token_budget, name=self.name):
                found = token_statistics(part.hidden, head, part.targets)
                columns = {
                    name: part.by_sequence(getattr(found, name)) for name in ("logprobs", "first", "mean", "std")
                }
                results += [
                    {name: values[sequence].tolist() for name, values in columns.items()}
                    for sequence in range(len(columns["first"]))
                ]
        return results


def _key(sequence: bytes) -> bytes:
    return hashlib.blake2b(b"token statistics" + sequence, digest_size=KEY_BYTES).digest()
