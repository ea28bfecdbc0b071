"""Planning an epoch and assembling batches of 8192 tokens, against NumPy with Python doing the same, and libraries."""

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import DataCollatorWithFlattening

from benchmarks.packing.rivals import features, numpy_pack, numpy_plan, trl_plan
from benchmarks.report import Report
from benchmarks.timing import interleaved, median_ratio
from efface.batching import MicroBatch, TokenStore, pack_items, plan_epoch

# name: (forget sequences, retain sequences, pairs per step, token budget)
SHAPES = {
    "smoke": (200, 800, 32, 4096),
    "1,000,000 forget x 4,000,000 retain, steps of 32": (1_000_000, 4_000_000, 32, 4096),
    "1,000,000 forget x 4,000,000 retain, steps of 512": (1_000_000, 4_000_000, 512, 4096),
}
ROUNDS = 5
BATCH_TOKENS = 8192
REPEATS = 50  # assemblies of a batch in one measurement: they take microseconds


@dataclass
class Row:
    """One provider of one task: milliseconds, medians of ratios within a round."""

    shape: str
    task: str
    provider: str
    median_ms: float
    low_ms: float
    high_ms: float
    against_efface: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing beside what every suite has."""


def run(options: argparse.Namespace, report: Report) -> None:
    """Measure and print."""
    import datasets  # noqa: PLC0415 - a machine borrowed for the other suites may lack it

    datasets.disable_progress_bars()
    rows: list[Row] = []
    for shape in options.shape:
        measured, missing = measure(shape, options.rounds)
        rows += measured
        for task in dict.fromkeys(row.task for row in measured):
            headings = ("provider", "median ms", "low", "high", "x efface")
            own = [row for row in measured if row.task == task]
            report.table(f"{task}, {options.rounds} rounds", headings, [_cells(row) for row in own])
        for note in missing:
            report.note(f"not measured: {note}")
        report.save(packing=[asdict(row) for row in rows])


def _cells(row: Row) -> tuple[str, ...]:
    times = (f"{value:.4g}" for value in (row.median_ms, row.low_ms, row.high_ms))
    return (row.provider, *times, f"{row.against_efface:.1f}")


def lengths(count: int, seed: int) -> NDArray[np.int64]:
    """Token counts with TOFU's mean (57), 95th percentile (82) and maximum (139): a clipped normal distribution."""
    drawn = np.random.default_rng(seed).normal(57, 15, count)
    return np.clip(drawn, 20, 139).astype(np.int64)


def store(count: int, seed: int) -> TokenStore:
    """Random tokens of those lengths; 58 % of each sequence are labels, as in TOFU."""
    n = lengths(count, seed)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(n)])
    ids = np.random.default_rng(seed).integers(0, 8000, int(offsets[-1])).astype(np.int32)
    return TokenStore([(ids, offsets, (n * 42) // 100)])


def measure(shape: str, rounds: int) -> tuple[list[Row], list[str]]:
    """Time planning a shape and assembling batches; return the rows, and what could not be measured."""
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
        """All micro-batches of the step in turn, so that no batch's lengths decide; none is kept."""

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


def _rows(shape: str, task: str, times: dict[str, list[float]]) -> list[Row]:
    ours = next(iter(times.values()))
    return [
        Row(shape, task, name, statistics.median(own), min(own), max(own), median_ratio(own, ours))
        for name, own in times.items()
    ]


def check_packers(stores: Sequence[TokenStore], chosen: MicroBatch) -> None:
    """Raise ArithmeticError where NumPy packs otherwise than efface."""
    batch = pack_items(stores, chosen.roles, chosen.sequences)
    names = ("input_ids", "position_ids", "cu_seqlens", "label_rows", "targets", "row_offsets", "roles")
    for name, expected in zip(names, numpy_pack(stores, chosen), strict=True):
        if not np.array_equal(np.asarray(getattr(batch, name)), np.asarray(expected)):
            raise ArithmeticError(f"the packers differ in {name}")
