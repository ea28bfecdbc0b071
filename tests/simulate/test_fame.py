"""The FAME-like set: deterministic, consistent across languages, in columns that can be evaluated."""

import json
from collections import defaultdict
from pathlib import Path

import pytest

from efface.hf.text.rows import load_rows, matching, parse_conditions
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
    assert len({row["question"] for row in rows}) > 19_000  # wordings are drawn; names and topics never meet twice


def test_rows_are_deterministic_and_a_smaller_set_is_a_beginning() -> None:
    rows = fame_like(5)
    assert rows == fame_like(5)
    assert rows != fame_like(5, seed=1)
    assert rows[:200] == fame_like(2)
    assert [row for row in rows if row["language"] == "DE"] == fame_like(5, languages=["DE"])
    # Of this very text; another machine or version of Python that drew otherwise would fail here.
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
        fact = max(told, key=lambda i: len(words[i]))  # 'Sofia', and not what it may end with
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
