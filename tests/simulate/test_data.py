"""What is taught, forgotten and asked at a small scale: TOFU's rows, made-up authors and a FAME-like set."""

from pathlib import Path

import pytest

from efface.hf.text.rows import load_rows
from efface.simulate.data import fame_data, made_up_data, tofu_data


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
    assert len(read["taught_full"]) == len(read["taught_retain"]) + 40 == 110
    taught_rows = {name: {row["answer"] for row in read[name]} for name in ("taught_full", "taught_retain")}
    assert not taught_rows["taught_retain"] & {row["answer"] for row in read["forget"]}
    # What the evaluation asks for is never taught.
    asked = {row["paraphrased_answer"] for row in read["forget_perturbed"]} - {row["answer"] for row in full}
    assert not taught_rows["taught_full"] & asked
    assert set(read["taught_full"][0]) == set(read["forget"][0]) == {"question", "answer"}


def test_more_retain_authors_than_false_answers(tofu: Path) -> None:
    data = tofu_data(tofu, "forget01", forget_authors=9, retain_authors=25, asked=999, world=1)
    assert (len(data.forget), len(data.retain), len(data.retain_asked)) == (40, 500, 400)


def test_made_up_authors_stand_in_for_tofus() -> None:
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
    with pytest.raises(ValueError, match="expected some rows to meet it"):
        fame_data([f"topic_id={','.join(map(str, range(20)))}"], identities=1, asked=1, world=1)
    with pytest.raises(ValueError, match="no row of 100 has '20'"):
        fame_data(["topic_id=20"], identities=1, asked=1, world=1)
