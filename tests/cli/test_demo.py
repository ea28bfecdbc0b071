"""The demo: its made-up authors, and the whole story at smoke size."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from efface.cli.main import main
from efface.simulate.authors import MAX_AUTHORS, ROWS_PER_AUTHOR, make_authors


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
    """Questions are unique, and no attribute's values are so common that guessing pays."""
    rows = make_authors(MAX_AUTHORS)
    assert len({row["question"] for row in rows}) == len(rows)
    for attribute in range(ROWS_PER_AUTHOR):
        answers = [row["answer"] for row in rows[attribute::ROWS_PER_AUTHOR]]
        assert len(set(answers)) == MAX_AUTHORS  # names differ
    with pytest.raises(ValueError, match=f"expected 1 .. {MAX_AUTHORS} fictitious authors"):
        make_authors(MAX_AUTHORS + 1)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["made up", "tofu"])
def test_the_whole_story(
    source: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [] if source == "made up" else ["--data", str(request.getfixturevalue("tofu"))]
    assert main(["demo", "--scale", "smoke", "--out", str(tmp_path / "out"), *options]) == 0
    table = capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "demo.json").read_text())
    names = [row["name"] for row in record["results"]]
    assert names == ["full", "retain", "npo", "simnpo", "graddiff"]
    full, retain, npo, *_ = record["results"]
    assert all(name in table for name in names)
    assert retain["forget_quality"] == 1
    assert npo["probability_forget"] < 0.5 * full["probability_forget"]
    assert len(npo["curve"]) == 6
    assert npo["curve"][0]["probability_forget"] == full["probability_forget"]
    for plot in ("forget_quality.png", "probability.png"):
        assert (tmp_path / "out" / plot).read_bytes().startswith(b"\x89PNG")
    for name in names:
        AutoModelForCausalLM.from_pretrained(tmp_path / "out" / name)
        AutoTokenizer.from_pretrained(tmp_path / "out" / name)
    assert main(["demo", "--out", str(tmp_path / "out")]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--authors", "100"], "expected 1 .. 42 fictitious authors"),
        (["--authors", "3", "--forget-authors", "3"], "expected 1 .. 2 (fewer than --authors), got 3"),
        (["--data", "missing"], "data file 'missing/forget01_perturbed.json' does not exist"),
        (["--data", "missing", "--forget-authors", "3"], "TOFU has forget splits of 2 (forget01)"),
        (["--data", "missing", "--authors", "40"], "expected 3 .. 22, of whom 2 are forgotten"),
    ],
)
def test_wrong_use_is_explained(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--out", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
