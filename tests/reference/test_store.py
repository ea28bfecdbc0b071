"""Tests of the file of log-probabilities: right or rejected, after kills, damage and with concurrent writers."""

import contextlib
import hashlib
import multiprocessing
import os
import random
import signal
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest

from efface import keyed_store as database
from efface.reference import LogprobStore

MODEL = b"model".ljust(16)
processes = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)


def key(i: int) -> bytes:
    return hashlib.blake2b(i.to_bytes(8, "little"), digest_size=16).digest()


def keys(*bounds: int) -> list[bytes]:
    return [key(i) for i in range(*bounds)]


def values(*bounds: int) -> np.ndarray:
    return -np.sqrt(np.arange(*bounds) + 0.5)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "reference.sqlite"


def filled(path: Path, count: int) -> None:
    with closing(LogprobStore(path)) as file:
        file.put(MODEL, keys(count), values(count))


def test_stored_values_are_found_bit_for_bit(path: Path) -> None:
    extreme = np.array([-0.0, -1e-308, -np.pi, -1e300, 0.1, 5e-324])
    with closing(LogprobStore(path)) as file:
        file.put(MODEL, keys(6), extreme)
        file.put(b"other".ljust(16), keys(3, 9), values(6))
    with closing(LogprobStore(path)) as file:
        got, found = file.get(MODEL, [key(7), *keys(6), key(0)])
        assert found.tolist() == [False, *[True] * 7]
        assert np.isnan(got[0])
        assert got[1:7].tolist() == extreme.tolist()
        assert got[7] == 0
        assert not file.get(b"third".ljust(16), keys(9))[1].any()
        assert [part.shape for part in file.get(MODEL, [])] == [(0,), (0,)]
        file.put(MODEL, [], np.empty(0))


def test_the_first_value_of_a_key_stays(path: Path) -> None:
    with closing(LogprobStore(path)) as file:
        file.put(MODEL, keys(2), np.array([-1.0, -2.0]))
        file.put(MODEL, keys(3), np.array([-1.5, -2.5, -3.5]))
        assert file.get(MODEL, keys(3))[0].tolist() == [-1, -2, -3.5]


def test_only_finite_values_and_as_many_as_keys(path: Path) -> None:
    with closing(LogprobStore(path)) as file:
        for bad in (np.nan, np.inf, -np.inf):
            with pytest.raises(ValueError, match="expected finite log-probabilities"):
                file.put(MODEL, keys(2), np.array([-1.0, bad]))
        with pytest.raises(ValueError, match="expected 2 entries, got 3"):
            file.put(MODEL, keys(2), values(3))
        assert not file.get(MODEL, keys(3))[1].any()


def test_ten_thousand_look_ups_take_half_the_time_of_a_query_each(path: Path) -> None:
    # 78 and 210 ms on 2 cores of an EPYC 7003 (2026-11-27)
    filled(path, 20_000)
    wanted = [key(i) for i in random.Random(0).sample(range(20_000), 10_000)]
    seconds: dict[str, list[float]] = {"together": [], "each": []}
    with closing(LogprobStore(path)) as file, closing(sqlite3.connect(path)) as bare:
        for _ in range(10):
            # CPU time of this thread, because look-ups do not wait and other tests run at the same time
            began = time.thread_time()
            _, found = file.get(MODEL, wanted)
            ended = time.thread_time()
            for each in wanted:
                bare.execute("SELECT value FROM logprobs WHERE model = ? AND sequence = ?", (MODEL, each)).fetchone()
            seconds["together"].append(ended - began)
            seconds["each"].append(time.thread_time() - ended)
            assert found.all()
    assert min(seconds["together"]) < min(seconds["each"]) / 2


# --- killed


def fill_until_killed(path: Path, first: int, pipe: Connection) -> None:
    with closing(LogprobStore(path)) as file:
        for i in range(first, 1_000_000, 20):
            file.put(MODEL, keys(i, i + 20), values(i, i + 20))
            pipe.send(i + 20)


def test_stored_values_survive_kill_9(path: Path) -> None:
    committed = 0
    for kill in range(5):
        ours, theirs = processes.Pipe()
        child = processes.Process(target=fill_until_killed, args=(path, committed, theirs))
        child.start()
        theirs.close()
        for _ in range(3 + 4 * kill):
            committed = ours.recv()
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        with contextlib.suppress(EOFError):
            while True:  # it runs until the signal arrives
                committed = ours.recv()
        with closing(LogprobStore(path)) as file:
            got, found = file.get(MODEL, keys(committed + 40))
        assert found[:committed].all()
        assert int(found.sum()) % 20 == 0  # a batch is either complete or absent
        assert np.array_equal(got[found], values(committed + 40)[found])
    assert committed >= 20 * sum(3 + 4 * kill for kill in range(5))


# --- several processes at once


def fill_share(path: Path, first: int, count: int, barrier: Barrier) -> None:
    barrier.wait()
    with closing(LogprobStore(path)) as file:
        for i in range(first, first + count, 25):
            file.put(MODEL, keys(i, i + 25), values(i, i + 25))
            assert file.get(MODEL, keys(i, i + 25))[1].all()


def test_processes_that_fill_one_file_at_once_lose_nothing(path: Path) -> None:
    """They also race to create the file. Neighbours share half of their keys."""
    for round_ in range(4):
        place = path.with_name(f"{round_}.sqlite")
        barrier = processes.Barrier(4)
        children = [processes.Process(target=fill_share, args=(place, 250 * i, 500, barrier)) for i in range(4)]
        for child in children:
            child.start()
        for child in children:
            child.join()
        assert [child.exitcode for child in children] == [0] * 4
        with closing(LogprobStore(place)) as file:
            got, found = file.get(MODEL, keys(1250))
        assert found.all()
        assert np.array_equal(got, values(1250))


def test_a_reader_does_not_wait_for_a_writer(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(path, 10)
    monkeypatch.setattr(database, "_BUSY_SECONDS", 0.05)
    with closing(sqlite3.connect(path, isolation_level=None)) as writer, closing(LogprobStore(path)) as file:
        writer.execute("BEGIN IMMEDIATE")
        assert file.get(MODEL, keys(10))[1].all()
        with closing(LogprobStore(path)) as late:
            assert late.get(MODEL, keys(10))[1].all()
        with pytest.raises(OSError, match="database is locked"):
            file.put(MODEL, keys(11), values(11))
        writer.execute("ROLLBACK")
        file.put(MODEL, keys(11), values(11))
        assert file.get(MODEL, keys(11))[1].all()


def test_without_a_write_ahead_log_it_works_too(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is reading prevents SQLite from changing the journal mode."""
    filled(path, 10)
    monkeypatch.setattr(database, "_BUSY_SECONDS", 0.05)
    sqlite(path, "PRAGMA journal_mode = DELETE")
    with closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM logprobs").fetchone()
        with closing(LogprobStore(path)) as file:
            assert file._read("PRAGMA journal_mode") == "delete"
            assert file.get(MODEL, keys(10))[1].all()
            reader.execute("COMMIT")
            file.put(MODEL, keys(11), values(11))
    with closing(LogprobStore(path)) as file:
        assert file._read("PRAGMA journal_mode") == "wal"
        assert file.get(MODEL, keys(11))[1].all()


# --- rejected


def sqlite(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as database:
        for statement in statements:
            database.execute(statement)
        database.commit()


def refused(path: Path, reason: str) -> None:
    before = path.read_bytes()
    with pytest.raises(ValueError, match=rf"reference cache '.*': .*{reason}.*; delete the file, or choose another"):
        LogprobStore(path)
    assert path.read_bytes() == before


def test_a_foreign_file_is_refused_and_left_alone(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("question,answer\n" * 1000)
    refused(path, "file is not a database")
    path.unlink()
    sqlite(path, "CREATE TABLE users (name TEXT)", "INSERT INTO users VALUES ('Ada')")
    refused(path, "of another program")
    path.unlink()
    sqlite(path, "PRAGMA application_id = 7")
    refused(path, "of another program")


def test_another_format_is_refused(path: Path) -> None:
    filled(path, 5)
    sqlite(path, "PRAGMA user_version = 2")
    refused(path, "expected format 1, got 2")
    sqlite(path, "PRAGMA user_version = 1", "CREATE TABLE more (a)")
    refused(path, "expected the table that efface creates")


def test_an_empty_file_is_a_new_one(path: Path) -> None:
    """A process that is killed before it creates the tables leaves an empty file."""
    path.parent.mkdir()
    path.touch()
    filled(path, 5)
    path.unlink()
    sqlite(path, "PRAGMA journal_mode = WAL")
    filled(path, 5)


def damaged(content: bytes) -> Iterator[bytes]:
    rng = random.Random(0)
    for _ in range(150):
        at = rng.randrange(len(content))
        yield content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]
    for _ in range(20):
        at, length = rng.randrange(len(content)), rng.randrange(1, 2000)
        yield content[:at] + rng.randbytes(len(content[at : at + length])) + content[at + length :]
    for _ in range(20):
        yield content[: rng.randrange(1, len(content))]


@pytest.mark.filterwarnings("ignore:reference cache .* computed again:UserWarning")
@pytest.mark.parametrize("checked", [True, False], ids=["quick_check", "too large for quick_check"])
def test_damage_is_refused_or_harmless(checked: bool, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After any damage, every value that the file returns is the one that was stored."""
    if not checked:
        monkeypatch.setattr(database, "_CHECKED_BYTES", 0)
    filled(path, 300)
    right, refusals = values(300), 0
    for content in damaged(path.read_bytes()):
        path.with_name(f"{path.name}-wal").unlink(missing_ok=True)
        path.with_name(f"{path.name}-shm").unlink(missing_ok=True)
        path.write_bytes(content)
        try:
            with closing(LogprobStore(path)) as file:
                got, found = file.get(MODEL, keys(300))
        except (ValueError, OSError):
            refusals += 1
        else:
            assert np.array_equal(got[found], right[found])
    assert refusals > 30


@pytest.mark.parametrize(
    ("change", "model"),
    [
        ("value = -1.0", MODEL),
        ("value = 'much'", MODEL),
        ("checksum = 'x'", MODEL),
        ("model = x'" + bytes(16).hex() + "'", bytes(16)),
    ],
)
def test_a_changed_row_is_recomputed(change: str, model: bytes, path: Path) -> None:
    filled(path, 3)
    sqlite(path, f"UPDATE logprobs SET {change} WHERE sequence = x'{key(1).hex()}'")
    with closing(LogprobStore(path)) as file:
        with pytest.warns(UserWarning, match=r"reference cache '.*': 1 damaged row is computed again"):
            _, found = file.get(model, keys(3))
        assert not found[1]
        file.put(MODEL, keys(3), values(3))
        got, found = file.get(MODEL, keys(3))
        assert found.all()
        assert np.array_equal(got, values(3))


def test_a_full_disk_is_an_error_and_keeps_earlier_values(path: Path) -> None:
    filled(path, 100)
    with closing(LogprobStore(path)) as file:
        pages = file._read("PRAGMA page_count")
        file._execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(OSError, match="full"):
            file.put(MODEL, keys(100, 5000), values(100, 5000))
        assert file.get(MODEL, keys(200))[1].sum() == 100


def test_a_place_that_cannot_be_is_an_os_error(path: Path) -> None:
    path.mkdir(parents=True)
    with pytest.raises(OSError, match="unable to open"):
        LogprobStore(path)
    file = path / "file"
    file.touch()
    with pytest.raises(OSError, match="file"):
        LogprobStore(file / "reference.sqlite")
