"""The pack suite: planning an epoch and assembling batches of 8192 tokens, against NumPy with Python and libraries.

Both also with sequences that begin alike, as with a chat template: their common beginning is stored once in a batch.
"""

import argparse
import bisect
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from transformers import DataCollatorWithFlattening

from benchmarks.harness.report import Report, cells
from benchmarks.harness.timing import interleaved, median_ratio, spread
from efface.batching import EpochPlan, MicroBatch, TokenStore, added_tokens, pack_items, plan_epoch


class EpochShape(NamedTuple):
    """Numbers of sequences, of pairs per step, and of tokens per micro-batch, which include the shared ones."""

    forget: int
    retain: int
    pairs: int
    budget: int
    shared: int = 0  # tokens with which every sequence begins


BEGINNING = 36  # tokens before the question in Llama-3's chat template with a system prompt and a date
SHAPES = {
    "smoke": EpochShape(200, 800, 32, 4096),
    "smoke, shared": EpochShape(200, 800, 32, 4096, BEGINNING),
    "1,000,000 forget x 4,000,000 retain, steps of 32": EpochShape(1_000_000, 4_000_000, 32, 4096),
    "1,000,000 forget x 4,000,000 retain, steps of 512": EpochShape(1_000_000, 4_000_000, 512, 4096),
    f"1,000,000 forget x 4,000,000 retain, steps of 32, {BEGINNING} shared tokens": EpochShape(
        1_000_000, 4_000_000, 32, 4096, BEGINNING
    ),
}
ROUNDS = 5
BATCH_TOKENS = 8192
MicroBatches: TypeAlias = list[tuple[NDArray[np.int8], NDArray[np.int64]]]  # roles, sequences
REPEATS = 50  # times that each batch is assembled per measurement, because one takes microseconds


@dataclass
class PackRow:
    """One provider of one task: milliseconds, and medians of ratios within a round."""

    shape: str
    task: str
    provider: str
    median_ms: float
    low_ms: float
    high_ms: float
    against_efface: float


def run(options: argparse.Namespace, report: Report) -> None:
    import datasets  # noqa: PLC0415 - a machine borrowed for the other suites may not have it

    datasets.disable_progress_bars()
    rows: list[PackRow] = []
    for shape in options.shape:
        measured, missing = measure(shape, options.rounds)
        rows += measured
        for task in dict.fromkeys(row.task for row in measured):
            headings = ("provider", "median ms", "low", "high", "x efface")
            own = [row for row in measured if row.task == task]
            report.table(f"{task}, {options.rounds} rounds", headings, [_cells(row) for row in own])
        for note in missing:
            report.note(f"not measured: {note}")
        report.save(packing=rows)


def _cells(row: PackRow) -> list[str]:
    return [row.provider, *cells(".4g", row.median_ms, row.low_ms, row.high_ms), f"{row.against_efface:.1f}"]


def lengths(count: int, seed: int) -> NDArray[np.int64]:
    """Draw token counts from a clipped normal with TOFU's mean (57), 95th percentile (82) and maximum (139)."""
    drawn = np.random.default_rng(seed).normal(57, 15, count)
    return np.clip(drawn, 20, 139).astype(np.int64)


def store(count: int, seed: int, shared: int = 0) -> TokenStore:
    """Return random tokens with those lengths after ``shared`` tokens that are the same in every sequence.

    58 % of the random tokens are labels, as in TOFU.
    """
    own = lengths(count, seed)
    n = own + shared
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(n)])
    ids = np.random.default_rng(seed).integers(0, 8000, int(offsets[-1])).astype(np.int32)
    ids[(offsets[:-1, None] + np.arange(shared)).ravel()] = np.tile(np.arange(shared), count)
    return TokenStore([(ids, offsets, shared + (own * 42) // 100)])


def measure(shape: str, rounds: int) -> tuple[list[PackRow], list[str]]:
    """Time planning and assembling for a shape; return the rows, and the reasons for what was not measured."""
    own = SHAPES[shape]
    forget, retain = lengths(own.forget, 1), lengths(own.retain, 2)

    def planned(epoch: int) -> EpochPlan:
        return plan_epoch(
            forget,
            retain,
            pairs_per_step=own.pairs,
            token_budget=own.budget,
            shared_tokens=own.shared,
            seed=0,
            epoch=epoch,
        )

    plans: dict[str, Callable[[int], object]] = {
        "efface plan_epoch": planned,
        "NumPy and Python": lambda epoch: numpy_plan(forget, retain, own.pairs, own.budget - own.shared, seed=epoch),
    }
    missing = []
    if not own.shared:  # TRL packs whole sequences
        plan = planned(0)
        try:
            trl = trl_plan(np.concatenate([forget[plan.forget], retain[plan.retain]]), own.budget)
            plans["TRL pack_dataset, the same sequences"] = lambda _: trl()
        except ImportError as error:
            missing.append(f"TRL pack_dataset: {error}")
    rows = _rows(shape, f"plan {shape}", interleaved(plans, rounds))
    return rows + (_assemble_shared if own.shared else _assemble)(shape, rounds), missing


def _assemble(shape: str, rounds: int) -> list[PackRow]:
    stores = (store(400, 1), store(3600, 2))
    batches = batches_of(stores, share=False)
    listed = [features(stores, batch) for batch in batches]
    for batch in batches:
        check_packers(stores, batch)
    collate = DataCollatorWithFlattening()
    packers: dict[str, Callable[[int], object]] = {
        "efface pack_items": lambda i: pack_items(stores, batches[i].roles, batches[i].sequences),
        "NumPy and Python": lambda i: numpy_pack(stores, batches[i]),
        "transformers DataCollatorWithFlattening": lambda i: collate(listed[i]),
    }
    sequences = sum(len(batch.roles) for batch in batches) / len(batches)
    task = f"assemble a batch of {BATCH_TOKENS} tokens, {sequences:.0f} sequences on average"
    return _rows(shape, task, _each(packers, len(batches), rounds))


def _assemble_shared(shape: str, rounds: int) -> list[PackRow]:
    stores = (store(400, 1, BEGINNING), store(3600, 2, BEGINNING))
    batches = batches_of(stores, share=True)
    for batch in batches:
        check_packers(stores, batch, share=True)
    options = {"share": True, "last_tokens": False}
    packers: dict[str, Callable[[int], object]] = {
        "efface pack_items": lambda i: pack_items(stores, batches[i].roles, batches[i].sequences, **options),
        "NumPy and Python": lambda i: numpy_tree(stores, batches[i]),
    }
    packed = [pack_items(stores, batch.roles, batch.sequences, **options) for batch in batches]
    whole = sum(batch.sequence_tokens for batch in packed) / len(packed)
    sequences = sum(len(batch.roles) for batch in batches) / len(batches)
    task = (
        f"assemble a batch of {BATCH_TOKENS} stored tokens: {sequences:.0f} sequences on average, {whole:.0f} tokens "
        f"without sharing, the first {BEGINNING} the same in all"
    )
    rows = _rows(shape, task, _each(packers, len(batches), rounds))
    found = interleaved({"efface added_tokens": lambda _: added_tokens(stores, share=True)}, rounds, warm_up=1)
    count = sum(map(len, stores))
    return rows + _rows(shape, f"find the shared tokens of {count} sequences, once per run", found)


def batches_of(stores: Sequence[TokenStore], *, share: bool) -> list[MicroBatch]:
    """Return the full micro-batches of a step of 400 pairs."""
    tokens = added_tokens(stores, share=share, last_tokens=not share)
    whole = plan_epoch(
        tokens.forget,
        tokens.retain,
        shared_tokens=tokens.shared,
        pairs_per_step=400,
        token_budget=BATCH_TOKENS,
        seed=0,
        epoch=0,
    )
    return whole.micro_batches(0)[:-1]


def _each(packers: dict[str, Callable[[int], object]], batches: int, rounds: int) -> dict[str, list[float]]:
    """Return the milliseconds per batch; all are assembled in turn, so that no single one's lengths decide."""

    def each(pack: Callable[[int], object]) -> Callable[[int], object]:
        def run(_round: int) -> None:
            for _ in range(REPEATS):
                for i in range(batches):
                    pack(i)

        return run

    times = interleaved({name: each(pack) for name, pack in packers.items()}, rounds, warm_up=1)
    return {name: [value / (REPEATS * batches) for value in own] for name, own in times.items()}


def _rows(shape: str, task: str, times: dict[str, list[float]]) -> list[PackRow]:
    ours = next(iter(times.values()))
    return [
        PackRow(shape=shape, task=task, provider=name, **spread(own), against_efface=median_ratio(own, ours))
        for name, own in times.items()
    ]


def check_packers(stores: Sequence[TokenStore], chosen: MicroBatch, *, share: bool = False) -> None:
    """Raise ArithmeticError if NumPy packs a batch differently from efface."""
    batch = pack_items(stores, chosen.roles, chosen.sequences, share=share, last_tokens=not share)
    names = ["input_ids", "position_ids", "cu_seqlens", "label_rows", "targets", "row_offsets", "roles"]
    if share:
        names += ["paths", "cu_paths"]
    for name, expected in zip(names, (numpy_tree if share else numpy_pack)(stores, chosen), strict=True):
        if not np.array_equal(np.asarray(getattr(batch, name)), np.asarray(expected)):
            raise ArithmeticError(f"the packers differ in {name}")


def numpy_plan(
    forget: NDArray[np.int64], retain: NDArray[np.int64], pairs: int, budget: int, *, seed: int = 0
) -> MicroBatches:
    """Shuffle, draw, and fill each step's micro-batches best-fit decreasing, with a sorted list of the free space."""
    rng = np.random.default_rng(seed)
    order, drawn = rng.permutation(len(forget)), rng.integers(len(retain), size=len(forget))
    batches: MicroBatches = []
    for start in range(0, len(forget), pairs):
        step = slice(start, start + pairs)
        count = len(order[step])
        pairs_of_step = np.concatenate([order[step], drawn[step]])
        tokens = np.concatenate([forget[order[step]], retain[drawn[step]]])
        bins: list[list[int]] = []
        rooms: list[tuple[int, int]] = []  # (free tokens, bin), ascending
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
        for items in bins:  # forget before retain, each in its order
            chosen = np.sort(items)
            first_retain = int(np.searchsorted(chosen, count))
            roles = np.repeat(np.array([0, 1], np.int8), [first_retain, len(chosen) - first_retain])
            batches.append((roles, pairs_of_step[chosen]))
    return batches


def numpy_pack(stores: Sequence[TokenStore], batch: MicroBatch) -> list[object]:
    """Return the packer's seven tensors, built from slices of each sequence."""
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


def numpy_tree(stores: Sequence[TokenStore], batch: MicroBatch) -> list[object]:
    """Return the packer's nine tensors with shared beginnings stored once, from a trie in a dictionary.

    The last token of a sequence is left out; a sequence keeps at least one token of its own.
    """
    arrays = [owner.chunks[0] for owner in stores]
    children: dict[tuple[int, int], int] = {}  # (stored index of a token, or -1; next token) -> stored index
    ids: list[int] = []
    positions, rows, targets, paths = [], [], [], []
    sizes, labels = [0], [0]
    for role, index in zip(batch.roles.tolist(), batch.sequences.tolist(), strict=True):
        tokens, offsets, starts = arrays[role]
        begin, end = int(offsets[index]), int(offsets[index + 1])
        first, own = max(int(starts[index]), 1), tokens[begin : end - 1].tolist()
        found, at = [], -1
        for token in own[:-1]:
            child = children.get((at, token))
            if child is None:
                break
            found.append(at := child)
        shared, stored = len(found), range(len(ids), len(ids) + len(own) - len(found))
        children.setdefault((at, own[shared]), stored[0])  # it exists only for a last token that is stored once more
        children.update(zip(zip(stored, own[shared + 1 :]), stored[1:]))  # noqa: B905 - the last has no child
        ids += own[shared:]
        path = np.array([*found, *stored])
        positions.append(np.arange(shared, len(own)))
        rows.append(path[first - 1 :])
        targets.append(tokens[begin + first : end])
        paths.append(path)
        sizes.append(len(ids))
        labels.append(labels[-1] + end - begin - first)
    return [
        np.array(ids, np.int64),
        np.concatenate(positions),
        np.array(sizes, np.int32),
        np.concatenate(rows, dtype=np.int64),
        np.concatenate(targets, dtype=np.int64),
        np.array(labels),
        batch.roles.copy(),
        np.concatenate(paths, dtype=np.int32),
        np.cumsum([0, *map(len, paths)], dtype=np.int32),
    ]


def trl_plan(tokens: NDArray[np.int64], budget: int) -> Callable[[], object]:
    """Pack with TRL's ``pack_dataset`` (best-fit decreasing over all sequences at once), which also copies the tokens.

    Raises:
        ImportError: TRL is not installed.
    """
    import datasets  # noqa: PLC0415 - installed with TRL
    import pyarrow as pa  # noqa: PLC0415

    pack_dataset = pkgutil.resolve_name("trl.data_utils:pack_dataset")

    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(tokens)])
    ids = pa.LargeListArray.from_arrays(offsets, np.zeros(int(offsets[-1]), np.int32))
    table = datasets.Dataset(pa.table({"input_ids": ids}))
    options = {"load_from_cache_file": False, "keep_in_memory": True}
    return lambda: pack_dataset(table, budget, strategy="bfd", map_kwargs=options)


def features(stores: Sequence[TokenStore], batch: MicroBatch) -> list[dict[str, list[int]]]:
    """Return the batch as transformers' collators expect it: lists of ids and labels."""
    features = []
    for role, index in zip(batch.roles.tolist(), batch.sequences.tolist(), strict=True):
        ids, start = stores[role][index].tolist(), int(stores[role].label_starts[index])
        features.append({"input_ids": ids, "labels": [-100] * start + ids[start:]})
    return features
