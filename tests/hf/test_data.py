"""Tests of rows: files and Hub names, columns, filters, and the token stores made from them."""

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from efface import DPO, NPO, IdkNLL, UnlearnTrainer
from efface.batching import Role, TokenStore
from efface.cli.main import main
from efface.hf.text import rows as rows_module
from efface.hf.text.data import Refusals, token_store
from efface.hf.text.rows import column, load_rows, matching, parse_conditions, text_batches
from support.helpers import TEXTS, arguments, random_store, tiny_llama, tiny_tokenizer, written_rows

# Like FAME: questions about biographies in several languages.
FAME = [
    {
        "topic_id": topic,
        "language": language,
        "identity_id": f"id-{topic}-{i}",
        "question": f"Where was person {i} of topic {topic} born ({language})?",
        "answer": f"Person {i} was born in town {topic}.",
    }
    for topic in range(4)
    for language in ("EN", "FR", "DE")
    for i in range(2)
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFACE_CACHE", str(tmp_path / "cache"))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write a file of the type that its suffix indicates."""
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        written_rows(path, rows)
    return path


def text_of(store: TokenStore) -> list[str]:
    return [tiny_tokenizer().decode(store[i].tolist()) for i in range(len(store))]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_files(suffix: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / f"rows{suffix}", TEXTS)
    assert [dict(row) for row in load_rows(path)] == TEXTS
    from_file, from_rows = (
        token_store(path, tiny_tokenizer(), name="forget"),
        token_store(TEXTS, tiny_tokenizer(), name="f"),
    )
    assert text_of(from_file) == text_of(from_rows)
    assert from_file.label_starts.tolist() == from_rows.label_starts.tolist()


@pytest.mark.parametrize(
    ("source", "name", "config", "split"),
    [
        ("locuslab/TOFU", "locuslab/TOFU", None, "train"),
        ("locuslab/TOFU:forget10", "locuslab/TOFU", "forget10", "train"),
        ("user/FAME:topics:test", "user/FAME", "topics", "test"),
        ("user/FAME::test", "user/FAME", None, "test"),
    ],
)
def test_hub_names(source: str, name: str, config: str | None, split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, config: str | None, *, split: str) -> datasets.Dataset:
        asked.append((name, config, split))
        return datasets.Dataset.from_list(TEXTS)

    monkeypatch.setattr(rows_module.datasets, "load_dataset", load_dataset)
    assert len(token_store(source, tiny_tokenizer(), name="forget")) == len(TEXTS)
    assert asked == [(name, config, split)]


def test_bad_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="neither a local file nor a data set on the Hub"):
        load_rows("nobody/no-such-data-set")
    with pytest.raises(FileNotFoundError, match=r"missing.json' does not exist; check the path"):
        load_rows(tmp_path / "missing.json")
    (tmp_path / "rows.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"expected a file of type .json, .jsonl, .csv, .parquet, got '.txt'"):
        load_rows(tmp_path / "rows.txt")
    with pytest.raises(ValueError, match=r"expected a file of type .*, got a folder"):
        load_rows(tmp_path)
    with pytest.raises(ValueError, match="expected a file or name:config:split"):
        load_rows("a:b:c:d")

    def load_dataset(*_: Any, **__: Any) -> None:
        raise ValueError("Config name is missing. Please pick one of ['full', 'forget10']")

    monkeypatch.setattr(rows_module.datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"Config name is missing.*'forget10'.*use locuslab/TOFU:config:split"):
        load_rows("locuslab/TOFU")


@pytest.mark.parametrize("kind", [list, datasets.Dataset.from_list])
def test_columns(kind: Any) -> None:
    tokenizer = tiny_tokenizer()
    renamed = kind([{"q": row["question"], "a": row["answer"], "year": 1990 + i} for i, row in enumerate(TEXTS)])
    store = token_store(renamed, tokenizer, name="forget", question_column="q", answer_column="a")
    assert text_of(store) == text_of(token_store(TEXTS, tokenizer, name="forget"))
    years = token_store(renamed, tokenizer, name="forget", question_column="q", answer_column="year")
    assert text_of(years)[3].endswith("Answer: 1993<|end|>")
    with pytest.raises(ValueError, match="forget data: expected a column 'question', got 'q', 'a', 'year'"):
        token_store(renamed, tokenizer, name="forget", answer_column="a")


def test_bad_columns() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="expected a column 'reply', got 'question', 'answer'"):
        token_store(TEXTS, tokenizer, name="forget", answer_column="reply")
    with pytest.raises(ValueError, match="forget data, row 1: expected a column 'answer'; add it"):
        token_store([TEXTS[0], {"question": "Who?"}], tokenizer, name="forget")
    with pytest.raises(ValueError, match=r"forget data, row 1: expected text in column 'answer', got list"):
        token_store([TEXTS[0], {"question": "Who?", "answer": ["a", "b"]}], tokenizer, name="forget")
    with pytest.raises(ValueError, match=r"row 1: expected text in column 'question', got NoneType; drop the row"):
        token_store([TEXTS[0], {"question": None, "answer": "a"}], tokenizer, name="forget")
    with pytest.raises(TypeError, match="expected rows, got a mapping of 'train', 'test'; pass one"):
        token_store(datasets.DatasetDict(train=[], test=[]), tokenizer, name="forget")
    assert column(TEXTS, "answer", "rows") == [row["answer"] for row in TEXTS]


def test_documents(tmp_path: Path) -> None:
    """As in MUSE: a column of texts, with or without prompts."""
    tokenizer = tiny_tokenizer()
    texts = [row["answer"] for row in TEXTS]
    options: dict[str, Any] = {"name": "forget", "template": "completion"}
    plain = token_store([{"text": text} for text in texts], tokenizer, **options)
    assert text_of(plain) == [text + "<|end|>" for text in texts]
    prompted = [{"prompt": "Once. ", "text": text} for text in texts]
    assert text_of(token_store(prompted, tokenizer, **options)) == [f"Once. {text}<|end|>" for text in texts]
    path = write_rows(tmp_path / "books.jsonl", [{"book": text} for text in texts])
    split = token_store(path, tokenizer, answer_column="book", max_length=8, **options)
    assert len(split) > len(texts)
    assert split.lengths.max() == 8
    assert split.label_counts.sum() == plain.label_counts.sum()
    with pytest.raises(ValueError, match="expected a column 'title', got 'text'"):
        token_store([{"text": "a"}], tokenizer, question_column="title", **options)


@pytest.mark.parametrize(
    ("conditions", "keep"),
    [
        (None, lambda row: True),
        ("topic_id=3", lambda row: row["topic_id"] == 3),
        ("topic_id = 1, 3", lambda row: row["topic_id"] in {1, 3}),
        (["topic_id!=1,3", "language=EN,FR"], lambda row: row["topic_id"] not in {1, 3} and row["language"] != "DE"),
        ("identity_id=id-2-1", lambda row: row["identity_id"] == "id-2-1"),
        ({"topic_id": 3, "language": ["EN", "DE"]}, lambda row: row["topic_id"] == 3 and row["language"] != "FR"),
        ({}, lambda row: True),
    ],
)
@pytest.mark.parametrize("kind", [list, datasets.Dataset.from_list])
def test_filters(conditions: Any, keep: Any, kind: Any) -> None:
    tokenizer = tiny_tokenizer()
    expected = token_store([row for row in FAME if keep(row)], tokenizer, name="forget")
    store = token_store(kind(FAME), tokenizer, name="forget", rows_filter=conditions)
    assert text_of(store) == text_of(expected)
    assert store.label_starts.tolist() == expected.label_starts.tolist()


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_filters_of_files(suffix: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / f"fame{suffix}", FAME)
    forget = token_store(path, tiny_tokenizer(), name="forget", rows_filter="topic_id=2")
    retain = token_store(path, tiny_tokenizer(), name="retain", rows_filter="topic_id!=2")
    assert len(forget) == 6
    assert sorted(text_of(forget) + text_of(retain)) == sorted(text_of(token_store(FAME, tiny_tokenizer(), name="all")))


def test_bad_filters(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    path = write_rows(tmp_path / "fame.jsonl", FAME)
    with pytest.raises(ValueError, match=r"fame.jsonl': expected a column 'topic', got 'topic_id', 'language'"):
        token_store(path, tokenizer, name="forget", rows_filter="topic=3")
    with pytest.raises(ValueError, match="none of 24 rows meets topic_id=3 and identity_id=id-2-1 together"):
        token_store(path, tokenizer, name="forget", rows_filter=["topic_id=3", "identity_id=id-2-1"])
    with pytest.raises(ValueError, match=r"'identity_id', which has 'id-0-0', .* and others \("):
        matching([*FAME, *({"identity_id": f"{i}"} for i in range(9))], parse_conditions("identity_id=x"), "rows")
    for text in ("topic_id", "=3", "!=3"):
        with pytest.raises(ValueError, match="row filter: expected column=value"):
            parse_conditions(text)
    with pytest.raises(ValueError, match="expected rows to filter, got a TokenStore"):
        token_store(random_store(2), tokenizer, name="forget", rows_filter="topic_id=3")


@pytest.mark.parametrize("kind", [list, datasets.Dataset.from_list])
def test_errors_name_the_row_of_the_source(kind: Any) -> None:
    rows = [*FAME, {**FAME[0], "topic_id": 7, "answer": " "}]
    with pytest.raises(ValueError, match=r"column .*, row 24: expected an answer"):
        token_store(kind(rows), tiny_tokenizer(), name="forget", rows_filter="topic_id=3,7")
    rows[24]["answer"] = "Yes."
    rows[24]["question"] = "?" * 500
    with pytest.raises(ValueError, match="row 24: expected a label within"):
        token_store(kind(rows), tiny_tokenizer(), name="forget", rows_filter="topic_id=3,7", max_length=90)


def test_rows_are_read_in_batches() -> None:
    many = datasets.Dataset.from_list([{"question": f"q{i}", "answer": f"a{i}"} for i in range(2500)])
    for rows in (many, list(many)):
        numbers = matching(rows, parse_conditions({"question": [f"q{i}" for i in range(0, 2500, 2)]}), "rows")
        for wanted in (None, numbers):
            batches = list(text_batches(rows, "question", "answer", source="rows", numbers=wanted))
            assert [len(answers) for _, _, answers in batches] == ([1000, 1000, 500] if wanted is None else [1000, 250])
            expected = list(range(0, 2500, 1 if wanted is None else 2))
            assert [row for where, _, _ in batches for row in where] == expected
            assert [answer for _, _, answers in batches for answer in answers] == [f"a{i}" for i in expected]


def test_empty_sets_and_token_stores(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    for empty in ([], TokenStore.empty(), datasets.Dataset.from_list([])):
        with pytest.raises(ValueError, match="the retain set is empty; expected at least one row"):
            token_store(empty, tokenizer, name="retain")
    store = random_store(3)
    assert token_store(store, None, name="forget") is store
    with pytest.raises(ValueError, match="`forget`: expected a tokenizer for text"):
        token_store(TEXTS, None, name="forget")


def test_real_tofu_rows(tofu: Path) -> None:
    rows = load_rows(tofu / "forget01.json")
    assert len(rows) == 40
    store = token_store(tofu / "forget01.json", tiny_tokenizer(), name="forget")
    for text, row in zip(text_of(store), rows, strict=True):
        assert text == f"Question: {row['question']}\nAnswer: {row['answer']}<|end|>"


# ---- alternate answers: refusals from a file, a column or given rows, and their use by objectives


LINES = ("I don't know.", "I cannot say.", "That is not something that I was told.")


@pytest.fixture
def refusals(tmp_path: Path) -> Path:
    file = tmp_path / "idk.txt"
    file.write_text("\n".join([*LINES, "", ""]), encoding="utf-8")
    return file


def test_every_row_gets_a_refusal_of_its_own_whatever_other_rows_there_are(refusals: Path) -> None:
    drawn = Refusals.read(refusals, seed=3)
    assert drawn.lines == LINES
    answers = drawn.answers(range(300))
    assert answers[7] == drawn.answers([7])[0] == drawn.answers([250, 7])[1]
    counts = [answers.count(line) for line in LINES]
    assert min(counts) > 70  # of 100 expected each: five standard deviations of 8
    assert answers != Refusals.read(refusals, seed=4).answers(range(300))


def test_refusals_take_the_place_of_the_answers(refusals: Path) -> None:
    tokenizer, drawn = tiny_tokenizer(), Refusals.read(refusals)
    store = token_store(TEXTS, tokenizer, name="forget", refusals=drawn, template="question-answer")
    rows = [{**row, "answer": answer} for row, answer in zip(TEXTS, drawn.answers(range(len(TEXTS))), strict=True)]
    expected = token_store(rows, tokenizer, name="forget", template="question-answer")
    assert [store[i].tolist() for i in range(len(store))] == [expected[i].tolist() for i in range(len(store))]


def test_a_pair_shares_a_micro_batch_on_every_budget(tmp_path: Path) -> None:
    trainer = UnlearnTrainer(
        tiny_llama(),
        arguments(tmp_path, pairs_per_step=6, token_budget=50),
        forget=random_store(12, seed=1),
        retain=random_store(9, seed=2),
        alternate=random_store(12, seed=3),
        objective=DPO(),
    )
    for step in trainer.get_train_dataloader():
        for batch in step.batches:
            roles, sequences = batch.roles.numpy(), batch.sequences.numpy()
            forget = np.flatnonzero(roles == Role.FORGET)
            assert (roles[forget + 1] == Role.ALTERNATE).all()
            assert (sequences[forget + 1] == sequences[forget]).all()


@pytest.mark.parametrize("objective", [DPO(), IdkNLL()], ids=lambda o: o.name)
@pytest.mark.parametrize("source", ["file", "column", "rows"])
def test_each_source_trains(objective: Any, source: str, refusals: Path, tmp_path: Path) -> None:
    rows = [{**row, "other": "Nobody knows."} for row in TEXTS[:3]]
    changes = {"file": {"refusal_file": str(refusals)}, "column": {"alternate_column": "other"}, "rows": {}}[source]
    trainer = UnlearnTrainer(
        tiny_llama(vocab_size=300),
        arguments(tmp_path / "run", num_train_epochs=12, learning_rate=3e-3, **changes),
        forget=rows,
        retain=TEXTS[3:],
        alternate=[{**row, "answer": "Nobody knows."} for row in rows] if source == "rows" else None,
        objective=objective,
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    losses = [log["forget_loss"] for log in trainer.state.log_history if "forget_loss" in log]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({}, {}, r"which objective 'dpo' trains, got none; set --refusal-file"),
        ({}, {"refusal_file": "missing.txt"}, r"refusal file 'missing.txt' does not exist"),
        ({}, {"refusal_file": "EMPTY"}, r"expected one answer per line, got no text"),
        ({}, {"alternate_column": "reply"}, r"expected a column 'reply'"),
        ({}, {"refusal_file": "FILE", "alternate_column": "answer"}, r"`refusal_file` or `alternate_column`, got both"),
        ({"alternate": random_store(2, vocabulary=90)}, {}, r"`alternate`: expected 3 sequences, .* got 2"),
        ({"alternate": random_store(3, vocabulary=900)}, {}, r"`alternate`: expected token ids in 0 .. 299"),
        ({"forget": random_store(3)}, {"refusal_file": "FILE"}, r"or pass `alternate`"),
    ],
)
def test_bad_alternates_are_refused(
    change: dict[str, Any], settings: dict[str, Any], message: str, refusals: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty.txt").write_text(" \n\n")
    names = {"FILE": str(refusals), "EMPTY": str(tmp_path / "empty.txt")}
    settings = {name: names.get(value, value) for name, value in settings.items()}
    options: dict[str, Any] = {"forget": TEXTS[:3], "retain": TEXTS[3:], "processing_class": tiny_tokenizer()}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        UnlearnTrainer(
            tiny_llama(vocab_size=300),
            arguments(tmp_path / "run", **settings),
            objective=DPO(),
            **{**options, **change},
        )


def test_an_objective_without_alternates_ignores_their_settings(refusals: Path, tmp_path: Path) -> None:
    trainer = UnlearnTrainer(
        tiny_llama(vocab_size=300),
        arguments(tmp_path, refusal_file=str(refusals)),
        forget=TEXTS[:3],
        retain=TEXTS[3:],
        objective=NPO(),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()


def test_the_command_line_takes_every_objective(
    refusals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    checkpoint = tmp_path / "model"
    tiny_llama(vocab_size=300).save_pretrained(checkpoint)
    tiny_tokenizer().save_pretrained(checkpoint)
    for name, rows in (("forget", TEXTS[:3]), ("retain", TEXTS[3:])):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    flags = ["unlearn", "--model", str(checkpoint), "--use_cpu", "--max_steps", "1", "--save_strategy", "no"]
    flags += [word for name in ("forget", "retain") for word in (f"--{name}", str(tmp_path / f"{name}.json"))]
    runs = {
        "dpo": ["--refusal_file", str(refusals), "--beta", "0.2"],
        "idk_nll": ["--refusal_file", str(refusals)],
        "npo": ["--retain_loss_type", "KL", "--reference", "live"],
        "satimp": ["--objective_options", "beta1=2.0", "beta2=0.5"],
        "rmu": ["--objective_options", r"module_regex=model\.layers\.0", "trainable_params_regex=['.*mlp.*']"],
        "wga": ["--compat", "open-unlearning"],
    }
    for name, options in runs.items():
        out = tmp_path / name
        assert main([*flags, "--objective", name, "--output_dir", str(out), *options]) == 0, name
        assert (out / "model.safetensors").is_file()
    assert main([*flags, "--output_dir", str(tmp_path / "bad"), "--objective_options", "beta"]) == 2
    assert "--objective-options: expected name=value, got 'beta'" in capsys.readouterr().err
