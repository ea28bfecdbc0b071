"""What a model says about every label of a text: its probability, its rank and the distribution around it."""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from efface.batching import TokenStore, tree_tokens
from efface.evaluate.likelihood import fill, scored_trees
from efface.evaluate.runner import RowResult, Task
from efface.hf.model.head import head_of, packed_hidden
from efface.hf.reference.score import scoring
from efface.reference.cache import KEY_BYTES, sequence_keys
from efface_kernels import Head, Logits, chunk_capacity, row_blocks

# Far below the log of the smallest float64: p is 0 there, and 0 · log p must be 0 for a logit of −inf too.
_NO_PROBABILITY = -1000.0


@dataclass(frozen=True, eq=False)
class TokenStatistics:
    """Of N targets: (N,) each, float32 (float64 for float64 models).

    Attributes:
        logprobs: log p of the target, in nats.
        first: bool, whether no token is likelier and none of a lower id as likely: whether greedy decoding takes it.
        mean: E_p[log p] over the vocabulary, the negative entropy.
        std: sqrt(Var_p[log p]); 0 where the distribution is uniform over the tokens that it allows.
    """

    logprobs: Tensor
    first: Tensor
    mean: Tensor
    std: Tensor


@torch.no_grad()
def token_statistics(hidden: Tensor, head: Head, targets: Tensor, *, chunk_rows: int | None = None) -> TokenStatistics:
    """Return the statistics of targets (N,) under the head, without keeping the logits of all rows.

    Equal to::

        logp = torch.log_softmax(softcap(linear(hidden, weight, bias).float()), -1)
        logprobs, first = logp.gather(-1, targets[:, None])[:, 0], logp.argmax(-1) == targets
        mean = (logp.exp() * logp).sum(-1)
        std = (logp.exp() * (logp - mean[:, None]) ** 2).sum(-1).sqrt()

    Args:
        hidden: (N, D).
        head: with the dtype of ``hidden``.
        targets: (N,) int64.
        chunk_rows: rows of logits alive at a time; None chooses as the loss op does.
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
        # Two passes: E[x²] − E[x]² would cancel where the distribution is nearly uniform, as in a ruined model.
        std[block] = (p * (logp - mean[block, None]).square_()).sum(-1).sqrt_()
    return logprobs, first, mean, std


class TokenTask(Task):
    """Statistics of every label of the sequences of a store: a ``Task``, one row a sequence.

    A row's result is ``{"logprobs": […], "first": […], "mean": […], "std": […]}``, one entry a label, in the order of
    the text; see ``TokenStatistics``. Values that are not finite stay as they are.

    Args:
        store: tokens, and which of them are labels.
        token_budget: tokens of a forward pass; a longer row comes alone. It does not change a result beyond rounding.
        name: for messages and progress.
    """

    def __init__(self, store: TokenStore, *, token_budget: int = 8192, name: str = "tokens") -> None:
        self.name = name
        self.store = store
        self.keys = [_key(sequence) for sequence in sequence_keys(store)]
        self.batches = fill([tree_tokens(store, np.array([row])) for row in range(len(store))], token_budget)
        self._token_budget = token_budget

    def run(self, model: PreTrainedModel, rows: NDArray[np.int64]) -> list[RowResult]:
        """Compute one batch; see the class.

        Raises:
            ValueError: a head that the loss op cannot serve; tokens or lengths that the model has not.
        """
        head = head_of(model)
        results: list[RowResult] = []
        with torch.no_grad(), scoring(model):
            for tree in scored_trees(model, self.store, rows, token_budget=self._token_budget, name=self.name):
                found = token_statistics(packed_hidden(model, tree), head, tree.targets)
                columns = {
                    name: tree.by_sequence(getattr(found, name).cpu().numpy())
                    for name in ("logprobs", "first", "mean", "std")
                }
                results += [
                    {name: values[sequence].tolist() for name, values in columns.items()}
                    for sequence in range(len(columns["first"]))
                ]
        return results


def _key(sequence: bytes) -> bytes:
    return hashlib.blake2b(b"token statistics" + sequence, digest_size=KEY_BYTES).digest()
