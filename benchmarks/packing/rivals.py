"""Who else plans and packs: NumPy with Python, TRL, transformers' collator."""

import bisect
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from efface.batching import MicroBatch, TokenStore

MicroBatches = list[tuple[NDArray[np.int8], NDArray[np.int64]]]  # roles, sequences


def numpy_plan(
    forget: NDArray[np.int64], retain: NDArray[np.int64], pairs: int, budget: int, *, seed: int = 0
) -> MicroBatches:
    """Shuffle, draw, and fill each step's micro-batches best-fit decreasing, with a sorted list of the room left."""
    rng = np.random.default_rng(seed)
    order, drawn = rng.permutation(len(forget)), rng.integers(len(retain), size=len(forget))
    batches: MicroBatches = []
    for start in range(0, len(forget), pairs):
        step = slice(start, start + pairs)
        count = len(order[step])
        pairs_of_step = np.concatenate([order[step], drawn[step]])
        tokens = np.concatenate([forget[order[step]], retain[drawn[step]]])
        bins: list[list[int]] = []
        rooms: list[tuple[int, int]] = []  # (room, bin), ascending
        for item in np.argsort(-tokens, kind="stable").tolist():
            size = int(tokens[item])
            at = bisect.bisect_left(rooms, (size, 0))
            if at == len(rooms):
                bins.append([item])
                room, bin_ = budget - size, len(bins) - 1
            else:
                room, bin_ = rooms.pop(at)
                bins[bin_].append(item)
                room -= size
            if room > 0:
                bisect.insort(rooms, (room, bin_))
        for items in bins:  # forget before retain, each in order
            chosen = np.sort(items)
            first_retain = int(np.searchsorted(chosen, count))
            roles = np.repeat(np.array([0, 1], np.int8), [first_retain, len(chosen) - first_retain])
            batches.append((roles, pairs_of_step[chosen]))
    return batches


def numpy_pack(stores: Sequence[TokenStore], batch: MicroBatch) -> list[object]:
    """The packer's seven tensors, from slices of each sequence."""
    arrays = [owner.chunks[0] for owner in stores]
    ids, positions, rows, targets, sizes, labels = [], [], [], [], [], []
    at = 0
    for role, index in zip(batch.roles.tolist(), batch.sequences.tolist(), strict=True):
        tokens, offsets, starts = arrays[role]
        begin, end = int(offsets[index]), int(offsets[index + 1])
        first = max(int(starts[index]), 1)
        ids.append(tokens[begin:end])
        positions.append(np.arange(end - begin))
        rows.append(np.arange(at + first - 1, at + end - begin - 1))
        targets.append(tokens[begin + first : end])
        at += end - begin
        sizes.append(end - begin)
        labels.append(end - begin - first)
    return [
        np.concatenate(ids, dtype=np.int64),
        np.concatenate(positions),
        np.cumsum([0, *sizes], dtype=np.int32),
        np.concatenate(rows),
        np.concatenate(targets, dtype=np.int64),
        np.cumsum([0, *labels]),
        batch.roles.copy(),
    ]


def trl_plan(tokens: NDArray[np.int64], budget: int) -> Callable[[], object]:
    """TRL's ``pack_dataset`` (best-fit decreasing over all sequences at once); it copies the tokens too.

    Raises:
        ImportError: TRL is not installed.
    """
    import datasets  # noqa: PLC0415 - only where TRL is
    import pyarrow as pa  # noqa: PLC0415
    from trl.data_utils import pack_dataset  # noqa: PLC0415 - optional

    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(tokens)])
    ids = pa.LargeListArray.from_arrays(offsets, np.zeros(int(offsets[-1]), np.int32))
    table = datasets.Dataset(pa.table({"input_ids": ids}))
    options = {"load_from_cache_file": False, "keep_in_memory": True}
    return lambda: pack_dataset(table, budget, strategy="bfd", map_kwargs=options)


def features(stores: Sequence[TokenStore], batch: MicroBatch) -> list[dict[str, list[int]]]:
    """The batch as transformers' collators take it: lists of ids and labels."""
    features = []
    for role, index in zip(batch.roles.tolist(), batch.sequences.tolist(), strict=True):
        ids, start = stores[role][index].tolist(), int(stores[role].label_starts[index])
        features.append({"input_ids": ids, "labels": [-100] * start + ids[start:]})
    return features
