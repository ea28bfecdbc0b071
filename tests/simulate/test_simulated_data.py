"""Tests of synthetic authors, the FAME-like data, and the rows to learn, forget and evaluate at small scale."""

import json
from collections import defaultdict
from pathlib import Path

import pytest

from efface.hf.text.rows import load_rows, matching, parse_conditions
from efface.simulate.authors import MAX_AUTHORS, ROWS_PER_AUTHOR, make_authors
from efface.simulate.data import fame_data, made_up_data, tofu_data
from efface.simulate.fame import (
    CHOICES,
    LANGUAGES,
    MAX_IDENTITIES,
    TOPICS,
    fame_like,
    real_authors,
    world_facts,
    write_rows,
)


def test_authors_are_deterministic_and_in_tofus_columns() -> None:
    rows = make_authors(6)
    assert rows == make_authors(6)
    assert rows != make_authors(6, seed=1)
    assert len(rows) == 6 * ROWS_PER_AUTHOR
    for row in rows:
        assert set(row) == {"question", "answer", "paraphrased_answer", "perturbed_answer"}
        wrong = row["perturbed_answer"]
        assert len({*wrong, row["paraphrased_answer"]}) == 6


def test_facts_must_be_memorised() -> None:
    """Questions are unique, and no value of an attribute is so common that a guess is often right."""
    rows = make_authors(MAX_AUTHORS)
    assert len({row["question"] for row in rows}) == len(rows)
    for attribute in range(ROWS_PER_AUTHOR):
        answers = [row["answer"] for row in rows[attribute::ROWS_PER_AUTHOR]]
        assert len(set(answers)) == MAX_AUTHORS  # names differ
    with pytest.raises(ValueError, match=f"expected 1 .. {MAX_AUTHORS} fictitious authors"):
        make_authors(MAX_AUTHORS + 1)


def test_data_are_tofus_last_and_first_authors(tofu: Path, tmp_path: Path) -> None:
    data = tofu_data(tofu, "forget05", forget_authors=2, retain_authors=3, asked=99, world=5)
    folder = data.write(tmp_path)
    read = {path.stem: [dict(row) for row in load_rows(path)] for path in folder.glob("*.json")}
    full = [dict(row) for row in load_rows(tofu / "full.json")]
    assert [row["answer"] for row in read["forget"]] == [row["answer"] for row in full[-40:]]
    assert [row["answer"] for row in read["retain"]] == [row["answer"] for row in full[:60]]
    assert [len(read[f"{name}_perturbed"]) for name in ("forget", "retain", "real_authors", "world_facts")] == [
        40,
        60,
        5,
        5,
    ]
    assert len(read["train_full"]) == len(read["train_retain"]) + 40 == 110
    training_rows = {name: {row["answer"] for row in read[name]} for name in ("train_full", "train_retain")}
    assert not training_rows["train_retain"] & {row["answer"] for row in read["forget"]}
    # Answers that the evaluation scores are never trained on.
    asked = {row["paraphrased_answer"] for row in read["forget_perturbed"]} - {row["answer"] for row in full}
    assert not training_rows["train_full"] & asked
    assert set(read["train_full"][0]) == set(read["forget"][0]) == {"question", "answer"}


def test_more_retain_authors_than_false_answers(tofu: Path) -> None:
    data = tofu_data(tofu, "forget01", forget_authors=9, retain_authors=25, asked=999, world=1)
    assert (len(data.forget), len(data.retain), len(data.retain_asked)) == (40, 500, 400)


def test_synthetic_authors_replace_missing_tofu_files() -> None:
    data = made_up_data(forget_authors=1, retain_authors=2, asked=9, world=3)
    assert (len(data.forget), len(data.retain), len(data.retain_asked)) == (16, 32, 9)
    assert data.name.startswith("made-up authors in place of TOFU's")
    assert not {row["answer"] for row in data.forget} & {row["answer"] for row in data.retain}


def test_fame_is_split_by_its_filter() -> None:
    data = fame_data(["topic_id=3"], identities=2, asked=20, world=10)
    assert len(data.forget) == 10
    assert {row["topic_id"] for row in data.forget} == {3}
    assert 3 not in {row["topic_id"] for row in data.retain}
    assert {row["language"] for row in data.retain_asked} == {"EN", "FR", "DE", "IT", "ES"}
    assert (len(data.retain), len(data.retain_asked), len(data.world_facts)) == (190, 20, 10)
    with pytest.raises(ValueError, match="expected a filter that some rows meet"):
        fame_data([f"topic_id={','.join(map(str, range(20)))}"], identities=1, asked=1, world=1)
    with pytest.raises(ValueError, match="none of 100 rows has '20'"):
        fame_data(["topic_id=20"], identities=1, asked=1, world=1)


COLUMNS = [
    "identity_id",
    "name",
    "language",
    "topic_id",
    "question",
    "answer",
    "paraphrased_answer",
    "perturbed_answer",
]


def test_the_size_of_fame_topics() -> None:
    rows = fame_like(200)
    assert len(rows) == 20_000
    assert len({(row["identity_id"], row["language"]) for row in rows}) == 1000
    assert {row["topic_id"] for row in rows} == set(range(20))
    assert {row["language"] for row in rows} == {"EN", "FR", "DE", "IT", "ES"}
    assert len({row["name"] for row in rows}) == 200
    # wordings are drawn at random, but a name and a topic occur together only once
    assert len({row["question"] for row in rows}) > 19_000


def test_rows_are_deterministic_and_a_smaller_set_is_a_beginning() -> None:
    rows = fame_like(5)
    assert rows == fame_like(5)
    assert rows != fame_like(5, seed=1)
    assert rows[:200] == fame_like(2)
    assert [row for row in rows if row["language"] == "DE"] == fame_like(5, languages=["DE"])
    # The exact text, so that a machine or Python version with other draws fails here.
    assert rows[45]["answer"] == "Das Instrument von Gideon Eklund ist die Flöte."


def test_every_topic_has_five_names_and_values_in_five_languages() -> None:
    assert len(TOPICS) == 20
    for topic in TOPICS:
        assert len(topic.name) == len(LANGUAGES)
        assert all(len(value) == len(LANGUAGES) and all(value) for value in topic.values)
        for column in range(len(LANGUAGES)):
            words = [value[column] for value in topic.values]
            assert len(set(words)) == len(words) >= 6, topic.name[0]  # one true value and five false ones


def test_a_fact_is_the_same_in_every_language() -> None:
    facts = defaultdict(set)
    for row in fame_like(30):
        topic = TOPICS[row["topic_id"]]
        column = LANGUAGES.index(row["language"])
        words = [value[column] for value in topic.values]
        told = [i for i, word in enumerate(words) if row["answer"].endswith(f" {word}.")]
        fact = max(told, key=lambda i: len(words[i]))  # 'Sofia', not a shorter value that it ends with
        assert words[fact].casefold() in row["paraphrased_answer"].casefold()
        facts[row["identity_id"], row["topic_id"]].add(fact)
    assert all(len(values) == 1 for values in facts.values())
    assert len({tuple(values) for values in facts.values()}) > 5


def test_rows_can_be_evaluated() -> None:
    for row in fame_like(10):
        assert list(row) == COLUMNS
        wrong = row["perturbed_answer"]
        assert len({*wrong, row["paraphrased_answer"], row["answer"]}) == 7
        assert row["name"] in row["question"]
        assert all(row["name"] in text for text in [row["answer"], row["paraphrased_answer"], *wrong])
        assert "{" not in "".join([row["question"], row["answer"], *wrong])


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_written_rows_are_read_again(suffix: str, tmp_path: Path) -> None:
    rows = fame_like(2)
    read = load_rows(write_rows(rows, tmp_path / "new" / f"fame.{suffix}"))
    assert [dict(row)["answer"] for row in read] == [row["answer"] for row in rows]
    wrong = dict(read[7])["perturbed_answer"]
    assert (json.loads(wrong) if suffix == "csv" else wrong) == rows[7]["perturbed_answer"]
    chosen = matching(read, parse_conditions(["topic_id=3", "language=IT,DE"]), "fame")
    assert chosen is not None
    assert chosen.tolist() == [i for i, r in enumerate(rows) if r["topic_id"] == 3 and r["language"] in ("IT", "DE")]


def test_the_world_in_five_languages() -> None:
    for make in (real_authors, world_facts):
        rows = make(LANGUAGES)
        assert len(rows) == 100
        assert rows[:20] == make()
        assert len({row["question"] for row in rows}) == 100
        assert all(len({row["answer"], *row["perturbed_answer"]}) == 1 + CHOICES for row in rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"identities": 0}, "`identities`: expected 1 .. "),
        ({"identities": MAX_IDENTITIES + 1}, f"expected 1 .. {MAX_IDENTITIES}"),
        ({"identities": 1, "languages": ["EN", "NL"]}, "expected some of EN, FR, DE, IT, ES, got 'NL'"),
    ],
)
def test_wrong_use_is_explained(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fame_like(**options)


def test_an_unknown_suffix_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected .json, .jsonl, .csv or .parquet"):
        write_rows(fame_like(1), tmp_path / "fame.txt")
