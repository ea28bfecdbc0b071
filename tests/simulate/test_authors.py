"""The made-up authors."""

import pytest

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
