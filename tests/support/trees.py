"""A naive token tree, and stores whose sequences share beginnings."""

import itertools
from collections.abc import Sequence

import numpy as np
import torch

from efface.batching import PackedBatch, TokenStore

Labelled = tuple[list[int], int]  # tokens, first label


def chosen_from(store: TokenStore, sequences: Sequence[int] | np.ndarray) -> list[Labelled]:
    """Return the tokens and the first label of some sequences of a store."""
    return [(store[i].tolist(), int(store.label_starts[i])) for i in map(int, sequences)]


def naive_tree(chosen: Sequence[Labelled], *, share: bool, last_tokens: bool) -> dict[str, list[int]]:
    """Build a batch token by token, from a dictionary of the beginnings that are stored already.

    Without shared tokens it has no ``paths`` and ``cu_paths``.
    """
    names = ("input_ids", "position_ids", "label_rows", "targets", "paths", "lengths")
    out: dict[str, list[int]] = {name: [] for name in names}
    out["cu_seqlens"], out["cu_paths"], out["row_offsets"] = [0], [0], [0]
    stored: dict[tuple[int, ...], int] = {}
    for ids, start in chosen:
        run = ids if last_tokens else ids[:-1]
        path: list[int] = []
        for position, token in enumerate(run):
            beginning = tuple(run[: position + 1])
            has_own = len(out["input_ids"]) > out["cu_seqlens"][-1]
            if share and not has_own and beginning in stored and position < len(run) - 1:
                path.append(stored[beginning])
                continue
            path.append(len(out["input_ids"]))
            stored.setdefault(beginning, path[-1])
            out["input_ids"].append(token)
            out["position_ids"].append(position)
        first = max(start, 1)
        out["label_rows"] += path[first - 1 : len(ids) - 1]
        out["targets"] += ids[first:]
        out["paths"] += path
        out["lengths"].append(len(ids))
        for name, counted in (("cu_seqlens", "input_ids"), ("cu_paths", "paths"), ("row_offsets", "targets")):
            out[name].append(len(out[counted]))
    if len(out["paths"]) == len(out["input_ids"]):
        out["paths"], out["cu_paths"] = [], []
    return out


def check_batch(batch: PackedBatch, chosen: Sequence[Labelled], *, share: bool, last_tokens: bool) -> None:
    """Assert that ``batch`` is the naive tree, and that it reads as the sequences."""
    tree = naive_tree(chosen, share=share, last_tokens=last_tokens)
    for name, part in tree.items():
        got = getattr(batch, name)
        assert (list(got) if isinstance(got, tuple) else got.tolist()) == part, name
    assert batch.last_tokens == last_tokens
    check_reading(batch, chosen)


def check_reading(batch: PackedBatch, chosen: Sequence[Labelled]) -> None:
    """Assert what attention and loss rely on: paths read as the sequences, and end with their segments."""
    assert batch.lengths == tuple(len(ids) for ids, _ in chosen)
    assert batch.tokens == len(batch.input_ids) == len(batch.position_ids) == sum(batch.segment_lengths)
    assert batch.sequence_tokens == sum(batch.lengths)
    assert batch.cu_seqlens.tolist() == [0, *itertools.accumulate(batch.segment_lengths)]
    tokens, e = torch.arange(batch.tokens), sum(batch.path_lengths)
    assert batch.shared == (e > batch.tokens)
    assert (len(batch.paths), len(batch.cu_paths)) == ((e, len(chosen) + 1) if batch.shared else (0, 0))
    paths, cu_paths = (batch.paths.long(), batch.cu_paths) if batch.shared else (tokens, batch.cu_seqlens)
    assert cu_paths.tolist() == [0, *itertools.accumulate(batch.path_lengths)]
    segments = tokens.split(batch.segment_lengths)
    rows = itertools.pairwise(batch.row_offsets)
    for (ids, start), path, segment, own in zip(chosen, paths.split(batch.path_lengths), segments, rows, strict=True):
        assert len(segment) > 0
        assert path[-len(segment) :].tolist() == segment.tolist()
        assert (path[: -len(segment)] < segment[0]).all()  # stored by earlier sequences
        assert batch.input_ids[path].tolist() == (ids if batch.last_tokens else ids[:-1])
        assert batch.position_ids[path].tolist() == list(range(len(path)))
        first = max(start, 1)
        assert batch.label_rows[slice(*own)].tolist() == path[first - 1 : len(ids) - 1].tolist()
        assert batch.targets[slice(*own)].tolist() == ids[first:]


def ragged(depth: int, *, seed: int = 0, low: int = 3, high: int = 90, longest: int = 6) -> TokenStore:
    """Return the leaves of a tree with ``depth`` levels of branches of 1 to ``longest`` tokens, in a random order.

    One sequence is stored twice, and one is the beginning of another.
    """
    rng = np.random.default_rng([seed, depth])
    sequences: list[list[int]] = [rng.integers(low, high, 2).tolist()]
    for _ in range(depth):
        grown = [(s, n) for s in sequences for n in rng.integers(1, longest + 1, rng.integers(1, 4))]
        sequences = [[*s, *rng.integers(low, high, n).tolist()] for s, n in grown]
    sequences += [sequences[0], max(sequences, key=len)[:-1]]
    order = rng.permutation(len(sequences))
    return TokenStore.from_sequences(
        [sequences[i] for i in order], [int(rng.integers(len(sequences[i]))) for i in order]
    )
