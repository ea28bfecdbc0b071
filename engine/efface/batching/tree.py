"""Token trees: packed batches that store each prefix shared by several sequences only once."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from efface.batching.store import TokenStore


@dataclass(frozen=True, eq=False)
class TokenTree:
    """Sequences stored as S segments with T tokens in total; each segment continues a prefix stored before it.

    The path of a sequence is the list of its tokens, from the first one on, in all segments that contain them. A token
    attends to the tokens before it on its path, so its hidden state is the same as in a pass of the sequence alone.
    The last token of a sequence predicts nothing. It is left out unless another sequence continues after it.

    Attributes:
        input_ids: (T,) int64 token ids.
        position_ids: (T,) int64 positions, counted along the path.
        lengths: S integers on the host, number of tokens of each segment.
        cu_seqlens: (S + 1,) int32 cumulative sums of ``lengths``, from 0.
        paths: (E,) int64, for each segment in turn, the indices of the tokens on its path, from the sequence's first
            token to the segment's last.
        path_lengths: S integers on the host, number of tokens on each segment's path.
        cu_paths: (S + 1,) int32 cumulative sums of ``path_lengths``, from 0.
        label_rows: (N,) int64 indices of the tokens whose hidden states predict a label; a token that predicts several
            labels is repeated.
        targets: (N,) int64 labels; all pairs (row, target) are distinct.
        labels: int64 on the host, indices into the N labels, for each sequence in turn.
        label_offsets: (sequences + 1,) start of each sequence's indices in ``labels``; the last entry is their total.
    """

    input_ids: Tensor
    position_ids: Tensor
    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    paths: Tensor
    path_lengths: tuple[int, ...]
    cu_paths: Tensor
    label_rows: Tensor
    targets: Tensor
    labels: NDArray[np.int64]
    label_offsets: NDArray[np.int64]

    @property
    def shared(self) -> bool:
        """Whether a segment attends to tokens of other segments, so that the attention must support ``paths``."""
        return self.lengths != self.path_lengths

    def to(self, device: torch.device | str) -> "TokenTree":
        """Return the tree with its tensors on ``device``; lengths, labels and label offsets stay on the host."""
        names = ("input_ids", "position_ids", "cu_seqlens", "paths", "cu_paths", "label_rows", "targets")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def by_sequence(self, values: NDArray[np.floating]) -> list[NDArray[np.floating]]:
        """Return an array per sequence with the entries of ``values`` (N,) for its labels, in order."""
        return np.split(values[self.labels], self.label_offsets[1:-1].tolist()) if len(self.label_offsets) > 1 else []


def token_tree(store: TokenStore, sequences: NDArray[np.int64], *, share: bool = True) -> TokenTree:
    """Assemble sequences of ``store`` into a tree on the CPU.

    Args:
        store: the token store.
        sequences: indices into the store, in any order; an index can occur more than once.
        share: whether to store shared prefixes once. Segments are then in the order of their sequences' token ids.
            If false, each sequence is one segment, in the given order.
    """
    inputs = [store[i][:-1] for i in sequences.tolist()]
    paths: list[NDArray[np.int64]] = [np.empty(0, np.int64)] * len(inputs)
    segments = []  # (ids, path)
    tokens = 0
    path = np.empty(0, np.int64)
    for at, shared in _sorted_with_shared(inputs) if share else ((at, 0) for at in range(len(inputs))):
        grown = len(inputs[at]) - shared
        path = np.concatenate([path[:shared], np.arange(tokens, tokens + grown)])
        paths[at] = path
        tokens += grown
        if grown:
            segments.append((inputs[at][shared:], path))

    firsts = np.maximum(store.label_starts[sequences], 1)
    rows = _joined([path[first - 1 :] for path, first in zip(paths, firsts.tolist(), strict=True)])
    answers = [store[i][first:] for i, first in zip(sequences.tolist(), firsts.tolist(), strict=True)]
    targets = _joined(answers)
    # Encodes a row and its target as one integer.
    vocabulary = int(targets.max(initial=0)) + 1
    distinct, labels = np.unique(rows * vocabulary + targets, return_inverse=True)

    lengths = tuple(len(ids) for ids, _ in segments)
    path_lengths = tuple(len(path) for _, path in segments)
    return TokenTree(
        input_ids=torch.from_numpy(_joined([ids for ids, _ in segments])),
        position_ids=torch.from_numpy(_joined([np.arange(len(p) - len(ids), len(p)) for ids, p in segments])),
        lengths=lengths,
        cu_seqlens=_summed(lengths),
        paths=torch.from_numpy(_joined([path for _, path in segments])),
        path_lengths=path_lengths,
        cu_paths=_summed(path_lengths),
        label_rows=torch.from_numpy(distinct // vocabulary),
        targets=torch.from_numpy(distinct % vocabulary),
        labels=labels.reshape(-1),
        label_offsets=np.cumsum([0, *(len(answer) for answer in answers)]),
    )


def tree_tokens(store: TokenStore, sequences: NDArray[np.int64]) -> int:
    """Return the number of tokens T of the tree of ``sequences``, without assembling it."""
    inputs = [store[i][:-1] for i in sequences.tolist()]
    return sum(len(inputs[at]) - shared for at, shared in _sorted_with_shared(inputs))


def _sorted_with_shared(inputs: list[NDArray[np.int32]]) -> Iterator[tuple[int, int]]:
    """Yield (index, length of the prefix shared with the previous sequence), in the order of the token ids."""
    # Big-endian bytes sort in the same order as the ids that they encode.
    order = sorted(range(len(inputs)), key=lambda at: inputs[at].astype(">i4").tobytes())
    previous = np.empty(0, np.int32)
    for at in order:
        ids = inputs[at]
        n = min(len(ids), len(previous))
        differ = np.flatnonzero(ids[:n] != previous[:n])
        yield at, int(differ[0]) if len(differ) else n
        previous = ids


def _joined(parts: list[NDArray[np.int64]] | list[NDArray[np.int32]]) -> NDArray[np.int64]:
    return np.concatenate([np.empty(0, np.int64), *parts])


def _summed(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
