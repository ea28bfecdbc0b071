"""Token trees: a packed batch in which the beginnings that sequences share stand once."""

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
    """Sequences as S segments of T tokens in all: each segment continues a beginning that others have before it.

    A sequence is a path from its first token on. Its tokens see those before them on the path, wherever they stand,
    so that every hidden state is that of the sequence alone. The last token of a sequence predicts nothing, and where
    no other goes on from it, it is left out.

    Attributes:
        input_ids: (T,) int64.
        position_ids: (T,) int64, counted along the path.
        lengths: S integers on the host: the tokens of each segment.
        cu_seqlens: (S + 1,) int32, those summed up.
        paths: (E,) int64: of each segment in turn, the tokens from the sequence's first to the segment's last.
        path_lengths: S integers on the host.
        cu_paths: (S + 1,) int32, those summed up.
        label_rows: (N,) int64, the tokens whose hidden states predict a label; one that predicts several comes again.
        targets: (N,) int64, those labels; no (row, target) comes twice.
        labels: of each sequence in turn, its labels as indices into the N; int64 on the host.
        label_offsets: which of ``labels`` are whose, one more than there are sequences.
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
        """Whether any segment sees tokens outside itself; an attention that does not know ``paths`` is wrong then."""
        return self.lengths != self.path_lengths

    def to(self, device: torch.device | str) -> "TokenTree":
        """Return the tree with its tensors on ``device``; what the host plans with stays on the host."""
        names = ("input_ids", "position_ids", "cu_seqlens", "paths", "cu_paths", "label_rows", "targets")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def by_sequence(self, values: NDArray[np.floating]) -> list[NDArray[np.floating]]:
        """Return each sequence's share of ``values`` (N,), one for each of its labels, in order."""
        return np.split(values[self.labels], self.label_offsets[1:-1].tolist()) if len(self.label_offsets) > 1 else []


def token_tree(store: TokenStore, sequences: NDArray[np.int64], *, share: bool = True) -> TokenTree:
    """Assemble sequences of ``store`` into a tree, on the CPU; without ``share`` each is a segment of its own.

    Segments stand in the order of their token ids. The same sequence may be asked for more than once.
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
    # A row and its target as one number.
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
    """Return the tokens T of the tree of ``sequences``, without making it."""
    inputs = [store[i][:-1] for i in sequences.tolist()]
    return sum(len(inputs[at]) - shared for at, shared in _sorted_with_shared(inputs))


def _sorted_with_shared(inputs: list[NDArray[np.int32]]) -> Iterator[tuple[int, int]]:
    """Yield the sequences in the order of their ids, with how many first tokens each shares with the one before."""
    # Big-endian bytes are in the order of the ids that they spell.
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
