"""Tests of damaged cache files: one byte of any region changes, and no returned number does."""

import os
import random
import sqlite3
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from efface import keyed_store as database
from efface.evaluate.runner import RowStore
from efface.hf.text.data import token_store
from efface.reference import LogprobStore
from efface.sweep.results import Place, Result
from support.helpers import TEXTS, tiny_tokenizer, written_rows

# All positions with EFFACE_LONG=1, otherwise this many, spread over the file.
POSITIONS = None if "EFFACE_LONG" in os.environ else 60
MODEL = b"model".ljust(16)
KEYS = [bytes([i]) * 16 for i in range(40)]
NUMBERS = -np.sqrt(np.arange(40) + 0.5)
RESULTS: list[dict[str, Any]] = [{"text": f"naïve {i}", "sum": i / 3} for i in range(40)]


def flipped(content: bytes, regions: dict[str, range]) -> Iterator[tuple[str, bytes]]:
    """Yield copies with one changed byte: in each region the first, the last and random ones."""
    rng = random.Random(0)
    for name, region in regions.items():
        share = len(region) if POSITIONS is None else min(len(region), max(2, POSITIONS // len(regions)))
        for at in sorted({region[0], region[-1], *rng.sample(region, share)}):
            changed = content[at] ^ (1 << rng.randrange(8))
            yield f"{name}, byte {at}", content[:at] + bytes([changed]) + content[at + 1 :]


def parts(size: int, **starts: int) -> dict[str, range]:
    """Return the regions of a file, given where each begins."""
    ends = [*list(starts.values())[1:], size]
    return {name: range(start, end) for (name, start), end in zip(starts.items(), ends, strict=True)}


# ---- the token cache


def test_every_byte_of_the_token_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any damaged byte causes a recomputation. Without the cache's check, 62 of 83 positions would change rows."""
    monkeypatch.setenv("EFFACE_CACHE", str(tmp_path / "cache"))
    source, tokenizer = written_rows(tmp_path / "rows.jsonl"), tiny_tokenizer()

    def rows() -> tuple[list[list[int]], list[int], Any]:
        store = token_store(source, tokenizer, name="forget")
        return [store[i].tolist() for i in range(len(store))], store.label_starts.tolist(), store.taken

    right = rows()
    assert right[2] == (len(TEXTS), len(TEXTS))
    (path,) = (tmp_path / "cache" / "tokens").iterdir()
    whole = path.read_bytes()
    body = whole.index(np.array(right[0][0], np.int32).tobytes())
    regions = parts(len(whole), schema=0, metadata=body // 2, tokens=body, trailer=len(whole) - 32)
    for where, content in flipped(whole, regions):
        path.unlink()  # the old file stays mapped
        path.write_bytes(content)
        with pytest.warns(UserWarning, match=r"token cache: .* is damaged .*; it is built again"):
            assert rows() == right, where
        assert path.read_bytes() == whole, where
    for size in {0, 1, len(whole) - 33, len(whole) - 32, len(whole) - 1}:
        path.write_bytes(whole[:size])
        with pytest.warns(UserWarning, match="built again"):
            assert rows() == right
    path.write_bytes(whole + b"\0")
    with pytest.warns(UserWarning, match="built again"):
        assert rows() == right


# ---- the two kinds of SQLite files: log-probabilities of a reference, and evaluated rows


def logprobs(path: Path, *, put: bool = False) -> list[Any]:
    with closing(LogprobStore(path)) as store:
        if put:
            store.put(MODEL, KEYS, NUMBERS)
        values, there = store.get(MODEL, KEYS)
    return [value if found else None for value, found in zip(values.tolist(), there.tolist(), strict=True)]


def results(path: Path, *, put: bool = False) -> list[Any]:
    with closing(RowStore(path)) as store:
        if put:
            store.put(MODEL, KEYS, RESULTS)
        return list(store.get(MODEL, KEYS))


STORES: dict[str, tuple[Callable[..., list[Any]], list[Any]]] = {
    "reference": (logprobs, NUMBERS.tolist()),
    "evaluated rows": (results, RESULTS),
}


def sqlite_regions(path: Path) -> dict[str, range]:
    """Return the regions of a database with a schema page and one table's tree of an inner page and leaves."""
    content = path.read_bytes()
    with closing(sqlite3.connect(path)) as file:
        (page,) = file.execute("PRAGMA page_size").fetchone()
        (root,) = file.execute("SELECT rootpage FROM sqlite_master").fetchone()
    cells = 100 + 8
    first = page - int.from_bytes(content[105:107], "big")
    starts = {"header": 0, "page header": 100, "cell pointers": cells, "free space": 110, "schema": page - first}
    regions = parts(page, **{name.replace(" ", "_"): start for name, start in starts.items()})
    for number in range(2, len(content) // page + 1):
        begin = (number - 1) * page
        name = f"{'root' if number == root else 'page'} {number}"
        regions |= {f"{name} header": range(begin, begin + 12), name: range(begin + 12, begin + page)}
    return regions


def found(read: Callable[..., list[Any]], path: Path, right: list[Any], **options: Any) -> list[Any] | None:
    """Return the values from a damaged file, none of which is wrong; None if the file is rejected by name."""
    refusal = None
    try:
        values = read(path, **options)
    except (ValueError, OSError) as error:
        refusal = str(error)
    if refusal is not None:
        assert str(path) in refusal
        return None
    assert all(value is None or value == other for value, other in zip(values, right, strict=True))
    return values


def asked(read: Callable[..., list[Any]], path: Path, right: list[Any]) -> str:
    """Return the effect of the damage: none, recomputed rows, rows that are never found, or a rejected file."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        first = found(read, path, right)
        again = None if first is None else found(read, path, right, put=True)
    assert all("computed again" in str(warning.message) for warning in told)
    if first is None or again is None:
        return "refused"
    # SQLite's search does not find keys after one that is out of order: they are computed in every run
    if None in again:
        return "hidden"
    return "made anew" if None in first else "harmless"


@pytest.mark.parametrize("checked", [True, False], ids=["checked", "too large to be checked as it is opened"])
@pytest.mark.parametrize("kind", STORES)
def test_every_byte_of_a_database(kind: str, checked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not checked:
        monkeypatch.setattr(database, "_CHECKED_BYTES", 0)
    read, right = STORES[kind]
    path = tmp_path / "file.sqlite"
    assert read(path, put=True) == right
    outcomes = []
    regions = sqlite_regions(path)
    for where, content in flipped(path.read_bytes(), regions):
        for beside in ("-wal", "-shm", "-journal"):
            path.with_name(path.name + beside).unlink(missing_ok=True)
        path.write_bytes(content)
        outcomes.append((asked(read, path, right), where))
    counts = Counter(outcome for outcome, _ in outcomes)
    assert {"made anew", "harmless", "refused"} <= counts.keys()
    assert counts["hidden"] <= max(2, len(outcomes) / 100), outcomes
    assert len(regions) >= 7


@pytest.mark.parametrize("kind", STORES)
def test_every_byte_of_a_write_ahead_log(kind: str, tmp_path: Path) -> None:
    """A killed process leaves this log. SQLite has checksums in it and ignores frames that do not match."""
    read, right = STORES[kind]
    path = tmp_path / "file.sqlite"
    with closing(sqlite3.connect(path)) as other:
        assert read(path, put=True) == right
        other.execute("SELECT count(*) FROM sqlite_master").fetchone()  # an open reader keeps the log
        with closing(LogprobStore(path) if read is logprobs else RowStore(path)) as store:
            more: Any = NUMBERS if read is logprobs else RESULTS
            store.put(b"other".ljust(16), KEYS, more)  # type: ignore[attr-defined]
        log = path.with_name(path.name + "-wal")
        content, whole = path.read_bytes(), log.read_bytes()
    assert len(whole) > 32
    regions = parts(len(whole), header=0, frame=32, page=56)
    for _, changed in flipped(whole, regions):
        path.with_name(path.name + "-shm").unlink(missing_ok=True)
        path.write_bytes(content)
        log.write_bytes(changed)
        asked(read, path, right)


# ---- the record of a sweep's trial


def test_every_byte_of_a_trial_s_record(tmp_path: Path) -> None:
    """A damaged record counts as missing, and the trial is examined again."""
    place, result = Place(tmp_path, "a"), Result({"model_utility": 0.56, "forget_quality": 1e-7}, "", 0, 12.5)
    place.finish(result)
    assert place.result() == result
    path = tmp_path / "trials" / "a.json"
    whole = path.read_bytes()
    outcomes = []
    for where, content in flipped(whole, parts(len(whole), record=0)):
        path.write_bytes(content)
        outcomes.append(place.result())
        assert outcomes[-1] in (None, result), where
    assert outcomes.count(None) > len(outcomes) / 2  # the other bytes are spaces between values
