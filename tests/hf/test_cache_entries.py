"""Tests of cache entries: private, listed with their data set, and removed when purged."""

import gc
import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest

from efface.batching import Role
from efface.cli.main import main
from efface.evaluate.runner import RowStore
from efface.files import private_folder
from efface.hf.reference.cached import CachedReference
from efface.hf.text import token_cache
from efface.hf.text.cache_entries import entries, of_data, purge
from efface.hf.text.data import token_store
from efface.keyed_store import KeyedStore, remove_store
from efface.reference.cache import LogprobStore, sequence_keys
from support.helpers import TEXTS, saved_llama, tiny_llama, tiny_tokenizer, written_rows
from support.processes import environment

MODEL = b"m" * 16


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EFFACE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def filled(cache: Path, tmp_path: Path) -> dict[str, Path]:
    """Tokens of two files, one of them with two templates, their log-probabilities, and a trained model."""
    files = {name: written_rows(tmp_path / f"{name}.jsonl", some) for name, some in ROWS.items()}
    store = LogprobStore(private_folder(cache) / "reference.sqlite")
    for name, path in files.items():
        for template in ("auto", "llama-2") if name == "forget" else ("auto",):
            tokens = token_store(path, tiny_tokenizer(), name=name, template=template)
            store.put(MODEL, sequence_keys(tokens), np.full(len(tokens), -1.0))
    store.close()
    (cache / "tiny" / ("a" * 32)).mkdir(parents=True)
    (cache / "tiny" / ("a" * 32) / "taught.json").write_text("{}")
    (cache / "of_another_program").write_text("mine")
    return files


ROWS = {"forget": TEXTS[:2], "retain": TEXTS[2:]}


def kinds(cache: Path) -> list[str]:
    return [entry.kind for entry in entries(cache)]


def values(cache: Path) -> int:
    connection = sqlite3.connect(cache / "reference.sqlite")
    (count,) = connection.execute("SELECT COUNT(*) FROM logprobs").fetchone()
    connection.close()
    return int(count)


def test_a_cache_that_is_not_a_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    for name in ("file", "missing"):
        assert main(["cache", "list", "--token-cache", str(tmp_path / name)]) == 2
        assert "--token-cache: expected a folder, got" in capsys.readouterr().err


def test_a_list_names_the_data(filled: dict[str, Path], cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    of = sorted((entry["kind"], entry["source"]) for entry in listed)
    tokens = [("tokens", str(filled[name].resolve())) for name in ("forget", "forget", "retain")]
    assert of == sorted([("reference", ""), ("taught model", ""), *tokens])
    assert all(entry["size"] > 0 and entry["days"] < 1 for entry in listed)
    for entry in listed:
        if entry["source"]:
            assert token_cache.file_digest(Path(entry["source"])).startswith(entry["data"])
    assert main(["cache", "list"]) == 0
    table = capsys.readouterr().out
    assert "forget.jsonl" in table
    assert "in all: 5 entries" in table
    assert len(kinds(cache)) == 5


def test_a_data_set_goes_with_all_that_was_made_of_it(filled: dict[str, Path], cache: Path) -> None:
    """A data set is found by its content under any name, or by its path if the file is gone. Other entries stay."""
    assert values(cache) == 7
    moved = filled["forget"].rename(filled["forget"].with_name("moved.jsonl"))
    assert main(["cache", "purge", "--data", str(moved), "--dry-run"]) == 0
    assert len(kinds(cache)) == 5
    gc.collect()
    assert main(["cache", "purge", "--data", str(moved)]) == 0
    assert kinds(cache) == ["tokens", "reference", "taught model"]
    assert values(cache) == 3  # of the retain set
    filled["retain"].unlink()
    assert main(["cache", "purge", "--data", str(filled["retain"])]) == 0
    assert kinds(cache) == ["reference", "taught model"]
    assert values(cache) == 0
    assert main(["cache", "purge"]) == 0
    assert kinds(cache) == []
    assert [path.name for path in cache.rglob("*") if path.is_file()] == ["of_another_program"]


def test_names_of_data_sets_on_the_hub_are_known(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(TEXTS))
    token_store("owner/rows:forget:train", tiny_tokenizer(), name="forget")
    token_store(datasets.Dataset.from_list(TEXTS[1:]), tiny_tokenizer(), name="forget")
    found = entries(cache)
    assert sorted(entry.source for entry in found) == ["", "owner/rows:forget:train"]
    assert [entry.source for entry in of_data(found, ["owner/rows:forget:train"])] == ["owner/rows:forget:train"]
    assert of_data(found, [""]) == []


def test_entries_in_use_are_not_removed(
    filled: dict[str, Path], cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gc.collect()
    tokens = token_store(filled["retain"], tiny_tokenizer(), name="retain")
    store = LogprobStore(cache / "reference.sqlite")
    assert main(["cache", "purge"]) == 2
    printed = capsys.readouterr()
    assert "removed: 3 entries" in printed.out
    assert "2 entries are in use by a running process, not removed" in printed.err
    assert kinds(cache) == ["tokens", "reference"]
    assert not remove_store(store.path)
    assert store.get(MODEL, sequence_keys(tokens))[1].all()
    store.close()
    del tokens
    gc.collect()
    assert main(["cache", "purge"]) == 0
    assert kinds(cache) == []


def test_old_and_half_written_files(filled: dict[str, Path], cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gc.collect()
    for entry in entries(cache):
        os.utime(entry.path, (time.time() - 40 * 86_400,) * 2)
    token_store(filled["retain"], tiny_tokenizer(), name="retain")  # use of an entry makes it recent
    # a partial file of a killed process, and a file of an earlier version
    for name in (".partial-1-a.arrow", f"{'0' * 32}.arrow"):
        (cache / "tokens" / name).write_text("text")
    gc.collect()
    assert main(["cache", "list", "--older-than", "30", "--json"]) == 0
    old = json.loads(capsys.readouterr().out)
    assert sorted(entry["kind"] for entry in old) == ["reference", "tokens", "tokens"]
    assert main(["cache", "purge", "--data", "never-used.json"]) == 0  # files that no run can use are removed as well
    assert sorted(kinds(cache)) == ["reference", "taught model", "tokens", "tokens", "tokens"]
    os.utime(cache / "tokens", (1, 1))
    (cache / "tokens" / ".partial-2-a.arrow").write_text("text")
    os.utime(cache / "tokens" / ".partial-2-a.arrow", (1, 1))
    token_store(filled["retain"], tiny_tokenizer(), name="retain", template="llama-2")
    assert "leftover" not in kinds(cache)  # the next run removes it


@pytest.mark.parametrize("words", [["--older-than", "-1"], ["--older-than", "nan"], ["--dry-run"]])
def test_wrong_use_is_a_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "list", *words]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_cache_is_private(filled: dict[str, Path], cache: Path) -> None:
    """Folders that efface creates are private, and a tokens folder with open permissions is made private."""
    shared = {"of_another_program", "taught.json"}  # created by the fixture
    for path in cache.rglob("*"):
        if path.name not in shared and "tiny" not in path.parts:
            assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path
    assert cache.stat().st_mode & 0o777 == 0o700
    # permissions as an earlier version left them
    opened = {cache / "tokens": 0o755, cache / "tiny": 0o755, cache / "reference.sqlite": 0o644}
    for path, mode in opened.items():
        path.chmod(mode)
    tokens = token_store(filled["retain"], tiny_tokenizer(), name="retain")
    model = tiny_llama(vocab_size=len(tiny_tokenizer()))
    assert CachedReference(model, {Role.FORGET: tokens}, cache=None).path == cache / "reference.sqlite"
    token_cache.own_folder(token_cache.TAUGHT)
    assert {path: path.stat().st_mode & 0o777 for path in opened} == {
        path: mode & 0o700 for path, mode in opened.items()
    }


@pytest.mark.parametrize("kind", [LogprobStore, RowStore])
def test_a_store_is_private(kind: type[KeyedStore], tmp_path: Path) -> None:
    """SQLite's companion files are private too, even in an open folder. An existing file keeps its mode."""
    path = tmp_path / "values.sqlite"
    store = kind(path)
    store.write(MODEL, [b"key"], [1.0 if kind is LogprobStore else "text"])
    files = [file for file in tmp_path.iterdir() if file.is_file()]
    assert len(files) > 1
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    store.remove([b"key", b"other"])
    assert store.read(MODEL, [b"key"]) == {}
    assert all(b"text" not in file.read_bytes() for file in files)
    store.close()
    path.chmod(0o640)
    kind(path).close()
    assert path.stat().st_mode & 0o777 == 0o640


def needles(rows: list[dict[str, str]]) -> Iterator[bytes]:
    """Return the answers in the encodings that a file may contain, and their tokens as 32-bit and 64-bit integers."""
    tokenizer = tiny_tokenizer()
    for row in rows:
        yield row["answer"].encode()
        yield row["answer"].encode("utf-16-le")
        yield row["answer"].rstrip(".").encode()
        ids = np.array(tokenizer(f" {row['answer']}")["input_ids"], "<i4")[1:-1]
        assert len(ids) > 3
        yield ids.tobytes()
        yield ids.astype("<i8").tobytes()


def holding(folders: list[Path], rows: list[dict[str, str]]) -> set[str]:
    contents = {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}
    return {str(path) for path, content in contents.items() for needle in needles(rows) if needle in content}


def test_after_a_purge_no_byte_of_the_forget_set_is_left(tmp_path: Path) -> None:
    """In a subprocess with all caches and temporary files in one folder; no access token in the output."""
    forget = written_rows(tmp_path / "forget.jsonl", ROWS["forget"])
    retain = written_rows(tmp_path / "retain.csv", [])
    retain.write_text("question,answer\n" + "".join(f"{row['question']},{row['answer']}\n" for row in ROWS["retain"]))
    folders = {
        name: tmp_path / name.lower() for name in ("EFFACE_CACHE", "HF_HOME", "TMPDIR", "HOME", "XDG_CACHE_HOME")
    }
    for folder in folders.values():
        folder.mkdir(exist_ok=True)
    command = ["unlearn", "--model", str(saved_llama(tmp_path / "model")), "--forget", str(forget)]
    command += ["--retain", str(retain), "--objective", "npo", "--output-dir", str(tmp_path / "out")]
    command += ["--max-steps", "2", "--use-cpu", "--hub-token", "hf_a_secret", "--save-steps", "1"]
    more = {name: str(folder) for name, folder in folders.items()}
    done = subprocess.run(
        [sys.executable, "-m", "efface", *command], env=environment(**more), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    cached = holding(list(folders.values()), ROWS["forget"])
    assert cached
    assert all(Path(path).parent.name == "tokens" for path in cached)  # otherwise the test could not detect anything
    for path in (tmp_path / "efface_cache").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path
    assert purge(entries(folders["EFFACE_CACHE"]), folders["EFFACE_CACHE"]) == []
    assert holding([*folders.values(), tmp_path / "out"], ROWS["forget"] + ROWS["retain"]) == set()
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in written)
    assert [path for path in written if b"hf_a_secret" in path.read_bytes()] == []
