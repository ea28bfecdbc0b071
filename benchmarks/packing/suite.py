"""The pack suite: planning an epoch and assembling batches of 8192 tokens, against NumPy with Python and libraries."""

import argparse
import bisect
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from transformers import DataCollatorWithFlattening

from benchmarks.harness.report import Report, cells
from benchmarks.harness.timing import interleaved, median_ratio, spread
from efface.batching import MicroBatch, TokenStore, pack_items, plan_epoch

# name: (forget sequences, retain sequences, pairs per step, token budget)
SHAPES = {
    "smoke": (200, 800, 32, 4096),
    "1,000,000 forget x 4,000,000 retain, steps of 32": (1_000_000, 4_000_000, 32, 4096),
    "1,000,000 forget x 4,000,000 retain, steps of 512": (1_000_000, 4_000_000, 512, 4096),
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


def store(count: int, seed: int) -> TokenStore:
    """Return random tokens with those lengths; 58 % of each sequence are labels, as in TOFU."""
    n = lengths(count, seed)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(n)])
    ids = np.random.default_rng(seed).integers(0, 8000, int(offsets[-1])).astype(np.int32)
    return TokenStore([(ids, offsets, (n * 42) // 100)])


def measure(shape: str, rounds: int) -> tuple[list[PackRow], list[str]]:
    """Time planning and assembling for a shape; return the rows, and the reasons for what was not measured."""
    forget_count, retain_count, pairs, budget = SHAPES[shape]
    forget, retain = lengths(forget_count, 1), lengths(retain_count, 2)
    plan = plan_epoch(forget, retain, pairs_per_step=pairs, token_budget=budget, seed=0, epoch=0)
    plans: dict[str, Callable[[int], object]] = {
        "efface plan_epoch": lambda epoch: plan_epoch(
            forget, retain, pairs_per_step=pairs, token_budget=budget, seed=0, epoch=epoch
        ),
        "NumPy and Python": lambda epoch: numpy_plan(forget, retain, pairs, budget, seed=epoch),
    }
    missing = []
    try:
        trl = trl_plan(np.concatenate([forget[plan.forget], retain[plan.retain]]), budget)
        plans["TRL pack_dataset, the same sequences"] = lambda _: trl()
    except ImportError as error:
        missing.append(f"TRL pack_dataset: {error}")
    rows = _rows(shape, f"plan {shape}", interleaved(plans, rounds))

    stores = (store(400, 1), store(3600, 2))
    whole = plan_epoch(*(s.lengths for s in stores), pairs_per_step=400, token_budget=BATCH_TOKENS, seed=0, epoch=0)
    batches = whole.micro_batches(0)[:-1]
    listed = [features(stores, batch) for batch in batches]
    for batch in batches:
        check_packers(stores, batch)
    collate = DataCollatorWithFlattening()

    def each(pack: Callable[[int], object]) -> Callable[[int], object]:
        """Assemble all micro-batches of the step in turn, so that no single batch's lengths decide. None is kept."""

        def run(_round: int) -> None:
            for _ in range(REPEATS):
                for i in range(len(batches)):
                    pack(i)

        return run

    times = interleaved(
        {
            "efface pack_items": each(lambda i: pack_items(stores, batches[i].roles, batches[i].sequences)),
            "NumPy and Python": each(lambda i: numpy_pack(stores, batches[i])),
            "transformers DataCollatorWithFlattening": each(lambda i: collate(listed[i])),
        },
        rounds,
        warm_up=1,
    )
    count = REPEATS * len(batches)
    per_batch = {name: [value / count for value in own] for name, own in times.items()}
    sequences = sum(len(batch.roles) for batch in batches) / len(batches)
    task = f"assemble a batch of {BATCH_TOKENS} tokens, {sequences:.0f} sequences on average"
    return rows + _rows(shape, task, per_batch), missing


def _rows(shape: str, task: str, times: dict[str, list[float]]) -> list[PackRow]:
    ours = next(iter(times.values()))
    return [
        PackRow(shape=shape, task=task, provider=name, **spread(own), against_efface=median_ratio(own, ours))
        for name, own in times.items()
    ]


def check_packers(stores: Sequence[TokenStore], chosen: MicroBatch) -> None:
    """Raise ArithmeticError if NumPy packs a batch differently from efface."""
    batch = pack_items(stores, chosen.roles, chosen.sequences)
    names = ("input_ids", "position_ids", "cu_seqlens", "label_rows", "targets", "row_offsets", "roles")
    for name, expected in zip(names, numpy_pack(stores, chosen), strict=True):
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
