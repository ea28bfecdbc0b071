"""Tests of the token cache: found by content, complete or absent, larger than memory."""

import multiprocessing
import os
import resource
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from efface.batching import TokenStore
from efface.batching.store import Chunk
from efface.hf.text import data, token_cache
from efface.hf.text.data import token_store
from efface.hf.text.templates import Template, encode_batches, get_template
from support.helpers import TEXTS, tiny_tokenizer, written_rows
from support.processes import environment

linux = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's /proc/self/maps")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EFFACE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return written_rows(tmp_path / "rows.jsonl", ({**row, "id": i} for i, row in enumerate(TEXTS)))


def content(store: TokenStore) -> tuple[list[list[int]], list[int]]:
    return [store[i].tolist() for i in range(len(store))], store.label_starts.tolist()


def files(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir()) if cache.exists() else []


class Unread:
    """A stand-in for functions that a second run must not call."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("called")


def test_a_second_run_reads_neither_text_nor_tokenizer(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_tokenizer()
    in_memory = token_store(TEXTS, tokenizer, name="forget")
    assert files(cache) == []  # rows in memory are not cached
    first = token_store(source, tokenizer, name="forget")
    assert content(first) == content(in_memory)
    assert len(files(cache)) == 1
    monkeypatch.setattr(type(tokenizer), "__call__", Unread())
    monkeypatch.setattr(data, "FileRows", Unread())
    second = token_store(source, tokenizer, name="retain")
    assert content(second) == content(in_memory)
    moved = source.rename(source.with_name("moved.jsonl"))
    assert content(token_store(moved, tiny_tokenizer(), name="forget")) == content(in_memory)
    assert len(files(cache)) == 1


def test_a_data_set_is_known_by_its_content(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    first = token_store(datasets.Dataset.from_list(TEXTS), tokenizer, name="forget")
    token_store(datasets.Dataset.from_list(TEXTS[1:]), tokenizer, name="forget")
    assert len(files(cache)) == 2
    monkeypatch.setattr(type(tokenizer), "__call__", Unread())
    assert content(token_store(datasets.Dataset.from_list(TEXTS), tokenizer, name="forget")) == content(first)


@linux
def test_the_arrays_are_the_file(source: Path, cache: Path) -> None:
    """Read-only views of a memory map, with the packer's dtypes. The file is an ordinary Arrow data set."""
    store = token_store(source, tiny_tokenizer(), name="forget")
    ((ids, offsets, starts),) = store.chunks
    assert (ids.dtype, offsets.dtype, starts.dtype) == (np.int32, np.int64, np.int64)
    assert not any(array.flags.owndata or array.flags.writeable for array in (ids, offsets, starts))
    (path,) = cache.iterdir()
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    spans = [tuple(int(end, 16) for end in line[0].split("-")) for line in maps]
    for array in (ids, offsets, starts):
        address = array.__array_interface__["data"][0]
        assert any(low <= address < high for low, high in spans)
    rows = datasets.Dataset.from_file(str(path))
    assert rows.features == token_cache.FEATURES
    assert (rows["input_ids"][:], rows["label_start"][:]) == content(store)


def changed_chat(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return tokenizer


def changed_end(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer.eos_token = "."
    return tokenizer


def changed_word(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer.add_tokens(["Aiko"])
    return tokenizer


CHANGES: dict[str, dict[str, Any]] = {
    "template": {"template": "llama-2"},
    "template of one's own": {"template": Template("question-answer", "Q: {question} A: ")},
    "documents": {"template": "completion", "answer_column": "answer"},
    "maximum length": {"max_length": 1000},
    "question column": {"question_column": "answer"},
    "answer column": {"answer_column": "question"},
    "filter": {"rows_filter": "id=1,2"},
    "negated filter": {"rows_filter": "id!=1,2"},
    "other filter": {"rows_filter": "id=1"},
    "vocabulary": {"tokenizer": tiny_tokenizer(320)},
    "added token": {"tokenizer": changed_word(tiny_tokenizer())},
    "chat template": {"tokenizer": changed_chat(tiny_tokenizer())},
    "end of sequence": {"tokenizer": changed_end(tiny_tokenizer())},
    "kind of tokenizer": {"tokenizer": ByT5Tokenizer()},
}


def test_everything_that_changes_the_tokens_changes_the_key(source: Path, cache: Path) -> None:
    """Nothing else changes it: neither the name of the set nor earlier uses of the tokenizer."""
    seen: set[str] = set()
    for change in ({}, *CHANGES.values()):
        options = {"tokenizer": tiny_tokenizer(), "name": "forget", **change}
        token_store(source, **options)
        new = set(files(cache)) - seen
        assert len(new) == 1, change
        seen |= new
    source.write_text(source.read_text().replace("Ghent", "Paris"))
    token_store(source, tiny_tokenizer(), name="forget")
    assert len(files(cache)) == len(seen) + 1 == len(CHANGES) + 2

    tokenizer = tiny_tokenizer()
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=5)
    token_store(source, tokenizer, name="retain", rows_filter=[])
    assert len(files(cache)) == len(CHANGES) + 2


def test_a_chat_template_that_prints_the_date_is_known_by_the_day(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{{ date_string if date_string is defined else today() }}{% for m in messages %}|{{ m.content }}{% endfor %}"
    )
    stores = [
        token_store(source, tokenizer, name="forget", template="chat", date_string=date)
        for date in ("1 Jan 2025", "2 Jan 2025", "1 Jan 2025")
    ]
    assert len(files(cache)) == 2
    assert content(stores[0]) == content(stores[2]) != content(stores[1])


def test_a_key_is_the_same_in_another_process(source: Path, cache: Path) -> None:
    token_store(source, tiny_tokenizer(), name="forget")
    token_store(source, ByT5Tokenizer(), name="forget")
    before = files(cache)
    script = (
        "import sys; from support.helpers import tiny_tokenizer; from transformers import ByT5Tokenizer;"
        "from efface.hf.text.data import token_store;"
        "[token_store(sys.argv[1], tokenizer, name='f') for tokenizer in (tiny_tokenizer(), ByT5Tokenizer())]"
    )
    python(script, str(source))
    assert files(cache) == before


def python(script: str, *arguments: str) -> str:
    """Return the output of a new process."""
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, env=environment(PYTHONHASHSEED="7"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def without_its_trailer(path: Path) -> None:
    """Arrow itself reads such a file without an error."""
    path.write_bytes(path.read_bytes()[: -token_cache._COUNTS.size - token_cache._DIGEST_BYTES])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def noise(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(5000))


def damaged_header(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:20] + b"\xff" * 200 + whole[220:])


def missing_body(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:-200] + whole[-100:])


def foreign(path: Path) -> None:
    table = pa.table({"input_ids": [[1, 2]], "label_start": [1]})  # list, not large_list
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def of_another_key(path: Path) -> None:
    """A complete file under the name of another key."""
    other = path.with_name(f"{'0' * 32}.arrow")
    token_cache.write(other, [some_chunk()])
    other.replace(path)


@pytest.mark.parametrize(
    "damage",
    [truncated, without_its_trailer, empty, noise, damaged_header, missing_body, foreign, of_another_key],
)
def test_a_damaged_file_is_recomputed(damage: Any, source: Path, cache: Path) -> None:
    expected = content(token_store(source, tiny_tokenizer(), name="forget"))
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    damage(path)
    with pytest.warns(UserWarning, match="token cache: .* is damaged .*; it is built again"):
        assert content(token_store(source, tiny_tokenizer(), name="forget")) == expected
    assert path.read_bytes() == whole
    assert content(token_store(source, tiny_tokenizer(), name="forget")) == expected


def test_a_folder_that_cannot_be_written_to(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    expected = content(token_store(TEXTS, tiny_tokenizer(), name="forget"))
    with pytest.warns(UserWarning, match="cannot use the folder .* kept in memory.*; set EFFACE_CACHE"):
        store = token_store(source, tiny_tokenizer(), name="forget", cache_dir=tmp_path / "file" / "below")
    assert content(store) == expected


def test_a_full_disk(source: Path, cache: Path) -> None:
    source.write_text(source.read_text() * 200)
    expected = content(token_store(list(data.load_rows(source)), tiny_tokenizer(), name="forget"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.warns(UserWarning, match="cannot use the folder .* kept in memory"):
            store = token_store(source, tiny_tokenizer(), name="forget")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert content(store) == expected
    assert files(cache) == []


def test_errors_of_the_data_are_not_the_cache_s(source: Path, cache: Path) -> None:
    source.write_text(source.read_text().replace("Hana was born in Galway.", " "))
    for _ in range(2):
        with pytest.raises(ValueError, match="row 4: expected an answer"):
            token_store(source, tiny_tokenizer(), name="forget")
    assert files(cache) == []


def killed(path: Path) -> None:
    def chunks() -> Iterator[Chunk]:
        yield some_chunk()
        os._exit(9)

    token_cache.write(path, chunks())


def some_chunk() -> Chunk:
    return np.arange(6, dtype=np.int32), np.array([0, 2, 6]), np.array([1, 1])


def test_a_killed_process_leaves_no_file_under_the_name(cache: Path) -> None:
    path = cache / "key.arrow"
    process = multiprocessing.get_context("fork").Process(target=killed, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == 9
    assert not path.exists()
    assert len(files(cache)) == 1  # the partial file, which is never read
    store = token_cache.stored("key", lambda: ([some_chunk(), some_chunk()], None))
    assert content(store) == ([[0, 1], [2, 3, 4, 5]] * 2, [1, 1, 1, 1])


def test_two_at_once(cache: Path) -> None:
    """The second process replaces the file while it is mapped; the first one's map stays the same."""
    path = cache / "key.arrow"
    inner: list[TokenStore] = []

    def chunks() -> Iterator[Chunk]:
        yield some_chunk()
        inner.append(token_cache.stored("key", lambda: ([some_chunk()], None)))

    outer = token_cache.stored("key", lambda: (chunks(), None))
    assert content(outer) == content(inner[0])
    assert files(cache) == [path.name]


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert token_cache.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("EFFACE_CACHE")
    assert token_cache.cache_folder() == Path("/xdg/efface")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert token_cache.cache_folder() == tmp_path / ".cache" / "efface"
    assert token_cache.cache_folder("~/here") == tmp_path / "here"


def test_tokenising_streams(cache: Path) -> None:
    """Only a group of texts is in memory at a time, not the corpus."""
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "[eos]": 1}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[eos]")
    rows, words, batches = 50, 200, 60

    def read() -> Iterator[tuple[range, list[str], list[str]]]:
        for first in range(0, rows * batches, rows):
            yield range(first, first + rows), [""] * rows, ["a " * words] * rows

    template = get_template("completion", fast)
    tracemalloc.start()
    token_cache.write(cache / "key.arrow", encode_batches(fast, read(), template=template, max_length=None))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    store = token_cache.read(cache / "key.arrow")
    tokens = rows * batches * (words + 1)
    assert int(store.lengths.sum()) == tokens
    assert peak < 4 * tokens  # bytes; a list of Python integers alone would take twice as much


LARGER_THAN_MEMORY = """
import resource, sys
from pathlib import Path
import numpy as np
from efface.batching import pack_items
from efface.hf.text import token_cache

path, chunk, chunks = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
length = 1000

def make():
    for c in range(chunks):
        ids = np.arange(c, c + chunk, dtype=np.int32)
        yield ids, np.arange(0, chunk + 1, length), np.full(chunk // length, length // 2)

status = Path("/proc/self/status").read_text()
in_use = int(status.partition("VmData:")[2].split()[0]) << 10
limit = in_use + (64 << 20)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))  # private writable memory; mapped files do not count
token_cache.write(path, make())
store = token_cache.read(path)
assert path.stat().st_size > 4 * chunk * chunks > 2 * (64 << 20)
try:
    np.concatenate([ids for ids, _, _ in store.chunks])
except MemoryError:
    pass
else:
    raise AssertionError("the limit does not hold")
total, sequences = 0, np.arange(len(store))
for some in np.array_split(sequences, len(store) // 100):
    batch = pack_items([store], np.zeros(len(some), np.int8), some)
    assert int(batch.input_ids[0]) == int(store[int(some[0])][0])
    total += int(batch.input_ids.sum())
print(total, len(store))
"""


@linux
def test_a_corpus_larger_than_memory(cache: Path) -> None:
    """200 MB of tokens, written and packed within 64 MB."""
    chunk, chunks = 1_000_000, 50
    total, sequences = map(int, python(LARGER_THAN_MEMORY, str(cache / "key.arrow"), str(chunk), str(chunks)).split())
    (cache / "key.arrow").unlink()
    assert sequences == chunk * chunks // 1000
    assert total == sum(chunk * c + chunk * (chunk - 1) // 2 for c in range(chunks))


def test_real_tofu_rows_start_at_once(tofu: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    first = token_store(tofu / "full.json", tokenizer, name="retain")
    monkeypatch.setattr(type(tokenizer), "__call__", Unread())
    second = token_store(tofu / "full.json", tokenizer, name="retain")
    assert len(second) == 4000
    assert len(second.chunks) == 4
    for ours, theirs in zip(first.chunks, second.chunks, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
