"""Tests of files of rows: broken ones are rejected with the line number, and the current content is read."""

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from efface.batching import TokenStore
from efface.cli.audit import audit_data
from efface.cli.evaluate import _rows as metrics_rows
from efface.cli.main import main
from efface.evaluate.audit.rows import audit_rows
from efface.evaluate.logs import read_json
from efface.evaluate.protocol import get_protocol
from efface.evaluate.tofu_evaluation import load_split
from efface.hf.text import data, row_files
from efface.hf.text.data import Refusals, token_store
from efface.hf.text.row_files import FileRows
from efface.hf.text.rows import load_rows, matching, parse_conditions, texts
from efface.simulate.data import tofu as demo_rows
from efface.simulate.data import tofu_data
from support.helpers import TEXTS, tiny_tokenizer, written_rows

BROKEN: dict[str, tuple[str, bytes, str]] = {
    "too many fields": (
        ".csv",
        b"question,answer\na,b\nWhere?,In Ghent, Belgium.\n",
        r"line 3: expected 2 fields \(question, answer\), got 3; put a field that contains a comma in double quotes",
    ),
    "too few fields": (".csv", b"question,answer\n\na\n", r"line 3: expected 2 fields .*, got 1"),
    "a line end in a field": (".csv", b'question,answer\n"a\nb",c\na\n', r"line 4: expected 2 fields .*, got 1"),
    "an open quote": (".csv", b'question,answer\na,"b\nc,d\n', r"line 2: expected CSV fields, .*close each quoted"),
    "text behind a quote": (".csv", b'question,answer\na,"b" c\n', r"line 2: expected CSV fields"),
    "a name twice": (".csv", b"answer,answer\na,b\n", r"line 1: expected distinct column names, got 'answer' twice"),
    "no names": (".csv", b"\na,b\n", r"line 1: expected column names, got a blank line"),
    "semicolons": (
        ".csv",
        b"question;answer\na;b\n",
        r"line 1: .* separated by commas, got 'question;answer'; save .*';'",
    ),
    "empty CSV": (".csv", b"", r"expected a line of column names, got an empty file"),
    "Latin-1 CSV": (
        ".csv",
        "q,a\nWo?,In Málaga.\n".encode("cp1252"),
        r"line 2: expected UTF-8, got byte 0xe1 at offset 12",
    ),
    "UTF-16 CSV": (
        ".csv",
        "question,answer\na,b\n".encode("utf-16"),
        "expected UTF-8, got UTF-16; save the file as UTF-8",
    ),
    "UTF-16 without its mark": (
        ".csv",
        "question,answer\na,b\n".encode("utf-16-le"),
        "expected (UTF-8|CSV fields), got",
    ),
    "empty JSON": (".json", b"\n \n", "expected rows, got an empty file"),
    "a comma at the end": (".json", b'[{"answer": "b"},]', r"line 1: expected an array of JSON objects.*column 1[78]"),
    "an array that is cut off": (
        ".json",
        b'[{"answer": "b"},\n{"answer"',
        r"line 2: expected an array of JSON objects",
    ),
    "an array of texts": (".json", b'[{"answer": "b"}, "a"]', r"row 1: expected a JSON object, got str"),
    "a line that is cut off": (
        ".jsonl",
        b'{"answer": "b"}\n\n{"answer',
        r"line 3: expected a JSON object, .*\(Untermin",
    ),
    "two objects in a line": (
        ".jsonl",
        b'{"answer": "b"} {"answer": "c"}\n',
        r"line 1: expected a JSON object, .*Extra",
    ),
    "an object over lines": (
        ".json",
        b'{\n"answer": "b"}\n',
        r"line 1: expected a JSON object, .*write one object per line",
    ),
    "a list in a line": (".jsonl", b'{"answer": "b"}\n["answer"]\n', r"line 2: expected a JSON object, got list"),
    "a key twice": (".json", b'[{"a": "b", "a": "c"}]', r"expected distinct names in an object, got 'a' twice"),
    "a key twice in a line": (".jsonl", b'\n{"a": "b", "a": "c"}', r"line 2: expected distinct names.*, got 'a' twice"),
    "Latin-1 JSON": (
        ".jsonl",
        '{}\n{"a": "á"}'.encode("latin-1"),
        r"line 2: expected UTF-8, got byte 0xe1 at offset 10",
    ),
    "UTF-16 JSON": (".json", '[{"a": "b"}]'.encode("utf-16"), "expected UTF-8, got UTF-16"),
    "deep JSON": (".json", b"[" * 100_000, "expected rows of text, got JSON nested too deeply"),
    "text as Parquet": (
        ".parquet",
        b"question,answer\n",
        "expected a Parquet file, got invalid data .*; create the file again",
    ),
    "empty Parquet": (".parquet", b"", "expected a Parquet file, got invalid data"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_with_its_line(name: str, tmp_path: Path) -> None:
    suffix, content, message = BROKEN[name]
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(content)
    limit = csv.field_size_limit()
    for read in (load_rows, lambda source: token_store(source, tiny_tokenizer(), name="forget")):
        with pytest.raises(ValueError, match=rf"rows{suffix}'.*{message}"):
            read(path)
    assert csv.field_size_limit() == limit
    assert not list((tmp_path / "efface-cache").rglob("*.*"))


def test_a_parquet_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_list(TEXTS).to_parquet(str(path))
    content = path.read_bytes()
    for cut in (content[:-1], content[:200], content[:100] + bytes(200) + content[300:]):
        path.write_bytes(cut)
        with pytest.raises(ValueError, match=r"rows.parquet': expected a Parquet file, got invalid data"):
            load_rows(path)


GOOD: dict[str, tuple[str, bytes, list[dict[str, Any]]]] = {
    "a byte-order mark": (".csv", "\ufeffq,a\nä,b".encode(), [{"q": "ä", "a": "b"}]),
    "CRLF": (".csv", b"q,a\r\nc,b\r\n", [{"q": "c", "a": "b"}]),
    "CR": (".csv", b"q,a\rc,b\r", [{"q": "c", "a": "b"}]),
    "blank lines": (".csv", b"q,a\n\nc,b\n\n\nd,e\n\n", [{"q": "c", "a": "b"}, {"q": "d", "a": "e"}]),
    "empty fields": (".csv", b'q,a\n,""\n', [{"q": "", "a": ""}]),
    "a column of row numbers, as pandas writes": (".csv", b",a\n0,b\n", [{"": "0", "a": "b"}]),
    "names alone": (".csv", b"q,a\n", []),
    "a long field": (".csv", b"q\n" + b"a" * 200_000, [{"q": "a" * 200_000}]),
    "an array": (".json", b' \n[{"q": 1.10,\n "a": null}]\n', [{"q": "1.10", "a": None}]),
    "an empty array": (".json", b"[]", []),
    "a byte-order mark in JSON": (".json", "\ufeff[{}]".encode(), [{}]),
    "a byte-order mark in lines": (".jsonl", '\ufeff{"q": "ä"}\n'.encode(), [{"q": "ä"}]),
    "keys that rows lack": (
        ".jsonl",
        b'{"q": "c"}\n\n{"a": {"b": [1, true]}}\r\n',
        [{"q": "c", "a": None}, {"q": None, "a": {"b": ["1", True]}}],
    ),
    "a suffix in capitals": (".JSON", b'{"q": "c"}', [{"q": "c"}]),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_file_is_read_as_it_is(name: str, tmp_path: Path) -> None:
    suffix, content, rows = GOOD[name]
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(content)
    read = load_rows(path)
    assert list(read) == rows
    assert len(read) == len(rows)
    assert read[-1:] == rows[-1:]
    with pytest.raises(IndexError):
        read[len(rows)]


def test_rows_larger_than_memory_are_in_a_file_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_files, "IN_MEMORY", 1000)
    folder = tmp_path / "kept"
    path = written_rows(tmp_path / "rows.jsonl", ({"question": f"q{i}", "answer": f"a{i}"} for i in range(500)))
    rows = FileRows(path, cache_dir=folder)
    path.unlink()
    assert folder.exists()
    assert list(folder.iterdir()) == []  # private rows leave nothing behind, however the process ends
    assert [row["answer"] for row in rows] == [f"a{i}" for i in range(500)]
    assert rows[-1] == {"question": "q499", "answer": "a499"}
    blocked = tmp_path / "blocked"
    blocked.write_text("a file")
    written_rows(path, TEXTS * 50)
    with pytest.raises(OSError, match="blocked"):
        FileRows(path, cache_dir=blocked)


# Rows of the same length for names of the same length.
def _row(name: str) -> dict[str, Any]:
    about = {"question": f"Where was {name} born?", "answer": f"{name} was born there."}
    return {**about, "paraphrased_answer": f"There {name} was born.", "perturbed_answer": [f"{name} was not."] * 2}


def _write(path: Path, name: str, rows: int = 40) -> None:
    made = [_row(name)] * rows
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(made).to_parquet(str(path))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            flat = [{column: text for column, text in row.items() if isinstance(text, str)} for row in made]
            writer = csv.DictWriter(file, list(flat[0]))
            writer.writeheader()
            writer.writerows(flat)
    elif path.suffix == ".json":
        path.write_text(json.dumps(made))
    else:
        written_rows(path, made)


TOFU = ("forget10_perturbed", "retain_perturbed", "real_authors_perturbed", "world_facts_perturbed", "retain90")


def _text(store: TokenStore) -> str:
    return tiny_tokenizer().decode(store[0].tolist())


# Calls with which commands read the file of this name in a folder.
PLACES: dict[str, tuple[tuple[str, ...], Callable[[Path], str]]] = {
    "training": (
        (".json", ".jsonl", ".csv", ".parquet"),
        lambda path: _text(token_store(path, tiny_tokenizer(), name="forget")),
    ),
    "efface audit": (
        (".json", ".jsonl", ".csv", ".parquet"),
        lambda path: audit_rows(audit_data(str(path), None))[0].answer,
    ),
    "efface audit, folder": ((".json",), lambda path: audit_rows(audit_data(str(path.parent), "forget10"))[0].answer),
    "TOFU": (
        (".json", ".jsonl", ".parquet"),
        lambda path: load_split(path.parent, "forget", "forget10", get_protocol("tofu")).answers[0],
    ),
    "metrics and FAME": (
        (".json", ".jsonl", ".csv", ".parquet"),
        lambda path: texts(metrics_rows(str(path), None), "answer", "rows")[0],
    ),
    "efface demo": ((".json",), lambda path: demo_rows(path.parent, 21, 20).forget[0]["answer"]),
    "tiny": (
        (".json",),
        lambda path: tofu_data(path.parent, "forget10", forget_authors=2, retain_authors=2, asked=2, world=1).forget[0][
            "answer"
        ],
    ),
}


@pytest.mark.parametrize(
    ("place", "suffix"), [(place, suffix) for place, (suffixes, _) in PLACES.items() for suffix in suffixes]
)
def test_a_file_replaced_under_its_path_and_time_is_read(
    place: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As cp -p, rsync, tar and images with fixed times do; ``datasets`` would return the old rows."""
    hub = tmp_path / "hub"
    for name in ("HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, str(hub))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", hub)
    read = PLACES[place][1]
    folder = tmp_path / "data"
    folder.mkdir()
    for name in TOFU[1:]:
        _write(folder / f"{name}{suffix}", "Nobody")
    path = folder / f"{TOFU[0]}{suffix}"
    for name in ("Aiko", "Bram", "Aiko"):
        _write(path, name)
        os.utime(path, ns=(10**18, 10**18))
        assert name in read(path)
    assert not hub.exists()  # and no copy of private rows


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("moment", ["before it is opened", "while it is read", "in its place"])
def test_a_file_that_changes_while_it_is_read(
    moment: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new rows must not be cached under the content of the old file."""
    path, other = tmp_path / f"rows{suffix}", tmp_path / f"other{suffix}"
    _write(path, "Aiko")
    _write(other, "Bram")
    new = other.read_bytes()
    read = row_files.READERS[suffix]
    made = data.FileRows

    def reading(rows: FileRows, file: Any, source: str) -> Any:
        if moment == "while it is read":
            other.replace(path)  # the open file remains the old one
        elif moment == "in its place":
            path.write_bytes(new)
        return read(rows, file, source)

    def opening(*of: Any, **options: Any) -> FileRows:
        if moment == "before it is opened":
            other.replace(path)
        return made(*of, **options)

    with monkeypatch.context() as patch:
        patch.setitem(row_files.READERS, suffix, reading)
        patch.setattr(data, "FileRows", opening)
        if moment == "while it is read":
            assert "Aiko" in _text(token_store(path, tiny_tokenizer(), name="forget"))
        else:
            with pytest.raises(ValueError, match=rf"rows{suffix}'.* changed while it was read; start again"):
                token_store(path, tiny_tokenizer(), name="forget")
    assert "Bram" in _text(token_store(path, tiny_tokenizer(), name="forget"))
    _write(path, "Aiko")
    assert "Aiko" in _text(token_store(path, tiny_tokenizer(), name="forget"))


def test_data_sets_with_equal_fingerprints_and_different_content(tmp_path: Path) -> None:
    """A fingerprint identifies the operations, not their results."""
    from_aiko, from_bram = (datasets.Dataset.from_list([_row(name)]) for name in ("Aiko", "Bram"))
    from_bram._fingerprint = from_aiko._fingerprint
    word = {"name": "Aiko"}

    def mapped() -> datasets.Dataset:
        # The function reads something that is not part of its hash, such as a file.
        rows = datasets.Dataset.from_list(TEXTS)
        (tmp_path / "name.txt").write_text(word["name"])
        file = str(tmp_path / "name.txt")
        return rows.map(
            lambda _: {"answer": Path(file).read_text()}, load_from_cache_file=False, new_fingerprint="mapped"
        )

    first = mapped()
    word["name"] = "Bram"
    for one, other in ((from_aiko, from_bram), (first, mapped())):
        assert one._fingerprint == other._fingerprint
        for rows, name in ((one, "Aiko"), (other, "Bram")):
            assert name in _text(token_store(rows, tiny_tokenizer(), name="forget"))


def test_rows_of_a_file_have_its_key(tmp_path: Path) -> None:
    path = written_rows(tmp_path / "rows.jsonl", TEXTS)
    first, second = (token_store(source, tiny_tokenizer(), name="forget") for source in (path, load_rows(path)))
    assert _text(first) == _text(second)
    assert len(list((tmp_path / "efface-cache" / "tokens").iterdir())) == 1


def test_equal_content_has_one_key_in_any_layout(tmp_path: Path) -> None:
    tokens = tmp_path / "efface-cache" / "tokens"
    rows = datasets.Dataset.from_list([{**_row(str(i)), "id": i} for i in range(30)])
    parts = datasets.concatenate_datasets([rows.select(range(7)), rows.select(range(7, 30))])
    indexed = rows.select([*range(29, -1, -1)]).select([*range(29, -1, -1)])
    for same in (rows, parts, indexed, rows.with_format("numpy"), rows.add_column("more", list(range(30)))):
        token_store(same, tiny_tokenizer(), name="forget", rows_filter="id!=3")
    assert len(list(tokens.iterdir())) == 1
    for other in (rows.select(range(29)), indexed.select([*range(29, -1, -1)]), rows.rename_column("id", "ID")):
        condition = "ID!=3" if "ID" in other.column_names else "id!=3"
        token_store(other, tiny_tokenizer(), name="forget", rows_filter=condition)
    assert len(list(tokens.iterdir())) == 4


def test_a_transform_is_read_through() -> None:
    """A transform is not part of the content, so the tokens are not cached."""
    rows = datasets.Dataset.from_list([_row("Aiko"), _row("Bram")])
    changed = rows.with_transform(lambda batch: {name: [str(v).upper() for v in batch[name]] for name in batch})
    for _ in range(2):
        assert "WHERE WAS AIKO" in _text(token_store(changed, tiny_tokenizer(), name="forget"))
        assert "Where was Aiko" in _text(token_store(rows, tiny_tokenizer(), name="forget"))
    assert texts(changed, "answer", "rows")[1] == "BRAM WAS BORN THERE."
    assert matching(changed, parse_conditions({"answer": "BRAM WAS BORN THERE."}), "rows").tolist() == [1]
    assert texts(rows.with_format("numpy"), "answer", "rows", np.array([1])) == ["Bram was born there."]


def test_a_folder_is_not_a_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``datasets`` would read the files in the folder, identified by path and time, and keep a copy."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").mkdir()
    _write(tmp_path / "rows" / "train.jsonl", "Aiko")
    with pytest.raises(ValueError, match="'rows' is a folder"):
        load_rows("rows:default:train")


@pytest.mark.parametrize(
    "words",
    [
        ("evaluate", "--model", "nowhere", "--metrics", "probability", "--forget"),
        ("evaluate", "--model", "nowhere", "--metrics", "mia_loss", "--forget", "GOOD", "--holdout"),
        ("audit", "--model", "nowhere", "--output", "out", "--views", "direct", "--data"),
        ("plan", "--tokenizer", "MODEL", "--retain", "GOOD", "--forget"),
    ],
    ids=lambda words: words[0],
)
def test_a_command_refuses_rows_before_it_loads_a_model(
    words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = written_rows(tmp_path / "good.jsonl", TEXTS), tmp_path / "bad.jsonl"
    written_rows(bad, [*TEXTS, {"question": "When?", "answer": None}])
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    given = {"GOOD": str(good), "MODEL": str(tmp_path / "model"), "out": str(tmp_path / "out")}
    assert main([*(given.get(word, word) for word in words), str(bad)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"row {len(TEXTS)}: expected text in column 'answer', got NoneType; drop the row" in line
    assert not (tmp_path / "out").exists()


def test_refusals_are_read_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "idk.txt"
    path.write_bytes("\ufeffI don't\u2028know.\r\n\r\nNo\x0c idea.".encode())
    assert Refusals.read(path).lines == ("I don't\u2028know.", "No\x0c idea.")
    path.write_bytes(b"Non lo s\xf2.")
    with pytest.raises(ValueError, match=r"idk.txt': expected UTF-8, got .* position 8"):
        Refusals.read(path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000])
def test_results_that_are_not_json(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "TOFU_EVAL.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"TOFU_EVAL.json': expected a JSON file"):
        read_json(path, "log")
    path.write_bytes(b"\xef\xbb\xbf{}")
    assert read_json(path, "log") == {}
