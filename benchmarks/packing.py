"""The pack suite: planning an epoch and assembling a batch, against NumPy and Python doing the same, and TRL."""

import bisect
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import DataCollatorWithFlattening

from efface.batching import MicroBatch, TokenStore, pack_items, plan_epoch

# name: (forget sequences, retain sequences, pairs per step, token budget)
PLANS = {
    "smoke": (200, 800, 32, 4096),
    "1,000,000 forget x 4,000,000 retain": (1_000_000, 4_000_000, 32, 4096),
}
BATCH_TOKENS = 8192


@dataclass
class Row:
    """One provider of one task. Times in milliseconds; the ratio is to efface in the same round."""

    task: str
    provider: str
    median_ms: float
    low_ms: float
    high_ms: float
    against_efface: float
    micro_batches: int | None = None


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


# ---- the same in NumPy and Python ----


MicroBatches = list[tuple[NDArray[np.int8], NDArray[np.int64]]]


def numpy_plan(forget: NDArray[np.int64], retain: NDArray[np.int64], pairs: int, budget: int) -> MicroBatches:
    """Shuffle, draw, and fill each step's micro-batches best-fit decreasing, with a sorted list of the room left."""
    rng = np.random.default_rng(0)
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


# ---- measuring ----


def _interleaved(task: str, providers: dict[str, Callable[[], object]], rounds: int, repeats: int) -> list[Row]:
    """Time ``repeats`` calls of every provider in turn, a mean of each a round."""
    times: dict[str, list[float]] = {name: [] for name in providers}
    for round_ in range(rounds + 1):
        for name, call in providers.items():
            count = repeats if name.startswith("efface") else max(1, repeats // 20)
            begin = time.perf_counter()
            for _ in range(count):
                call()
            if round_ or rounds == 1:  # the first is the warm-up
                times[name].append((time.perf_counter() - begin) * 1e3 / count)
    ours = next(times[name] for name in providers if name.startswith("efface"))
    return [
        Row(
            task, name, statistics.median(own), min(own), max(own), statistics.median(map(float.__truediv__, own, ours))
        )
        for name, own in times.items()
    ]


def measure(name: str, rounds: int) -> tuple[list[Row], list[str]]:
    """Time planning on one shape and the assembly of one batch; return the rows, and what could not be measured."""
    forget_count, retain_count, pairs, budget = PLANS[name]
    forget, retain = lengths(forget_count, 1), lengths(retain_count, 2)

    def ours() -> object:
        return plan_epoch(forget, retain, pairs_per_step=pairs, token_budget=budget, seed=0, epoch=0)

    plan = plan_epoch(forget, retain, pairs_per_step=pairs, token_budget=budget, seed=0, epoch=0)
    providers: dict[str, Callable[[], object]] = {
        "efface plan_epoch": ours,
        "NumPy and Python": lambda: numpy_plan(forget, retain, pairs, budget),
    }
    missing = []
    try:
        providers["TRL pack_dataset, the same sequences"] = trl_plan(
            np.concatenate([forget[plan.forget], retain[plan.retain]]), budget
        )
    except ImportError as error:
        missing.append(f"TRL pack_dataset: {error}")
    rows = _interleaved(f"plan, {name}", providers, rounds, 1)
    counts = [len(plan.batch_tokens), len(numpy_plan(forget, retain, pairs, budget))]
    for row, count in zip(rows, counts, strict=False):
        row.micro_batches = count

    stores = (store(400, 1), store(3600, 2))
    step = plan_epoch(*(s.lengths for s in stores), pairs_per_step=400, token_budget=BATCH_TOKENS, seed=0, epoch=0)
    batches = step.micro_batches(0)[:-1]
    features = [_features(stores, batch) for batch in batches]
    for batch in batches:
        _check_packers(stores, batch)
    collate = DataCollatorWithFlattening()

    def each(pack: Callable[[int], object]) -> Callable[[], object]:
        """All micro-batches of the step in turn, so that no batch's lengths decide."""
        return lambda: [pack(i) for i in range(len(batches))]

    tasks = {
        "efface pack_items": each(lambda i: pack_items(stores, batches[i].roles, batches[i].sequences)),
        "NumPy and Python": each(lambda i: numpy_pack(stores, batches[i])),
        "transformers DataCollatorWithFlattening": each(lambda i: collate(features[i])),
    }
    task = f"assemble {len(batches)} batches of {BATCH_TOKENS} tokens, {sum(len(b.roles) for b in batches)} sequences"
    return rows + _interleaved(task, tasks, rounds, 200), missing


def _features(stores: Sequence[TokenStore], batch: MicroBatch) -> list[dict[str, list[int]]]:
    """The batch as transformers' collators take it: lists of ids and labels."""
    features = []
    for role, index in zip(batch.roles.tolist(), batch.sequences.tolist(), strict=True):
        ids, start = stores[role][index].tolist(), int(stores[role].label_starts[index])
        features.append({"input_ids": ids, "labels": [-100] * start + ids[start:]})
    return features


def _check_packers(stores: Sequence[TokenStore], chosen: MicroBatch) -> None:
    batch = pack_items(stores, chosen.roles, chosen.sequences)
    names = ("input_ids", "position_ids", "cu_seqlens", "label_rows", "targets", "row_offsets", "roles")
    for name, expected in zip(names, numpy_pack(stores, chosen), strict=True):
        if not np.array_equal(np.asarray(getattr(batch, name)), np.asarray(expected)):
            raise AssertionError(f"the packers differ in {name}")


def as_json(rows: Sequence[Row]) -> list[dict[str, object]]:
    """Return the rows as JSON takes them."""
    return [asdict(row) for row in rows]
