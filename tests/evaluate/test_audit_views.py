"""Tests of the audit's views and of novel recall: prompts and scores, on real TOFU rows and worked examples."""

from pathlib import Path
from typing import Any

import pytest

from efface.evaluate.audit import BestOf, Choice, Cloze, Clues, Direct, Relearn, Translated, novel_recall
from efface.evaluate.audit.languages import LANGUAGES, get_language
from efface.evaluate.audit.rows import AuditRow, audit_rows
from efface.evaluate.audit.view import best_of, summary
from efface.evaluate.audit.views import VIEWS, gap, get_view, sentences
from efface.evaluate.audit.words import content_words, novel_words, recalled, words
from efface.hf.text.data import load_rows


@pytest.fixture(scope="module")
def forget10(tofu: Path) -> list[AuditRow]:
    return audit_rows(load_rows(tofu / "forget10_perturbed.json"))


def row(question: str, answer: str, **more: Any) -> AuditRow:
    return audit_rows([{"question": question, "answer": answer, **more}])[0]


@pytest.mark.parametrize("name", VIEWS)
def test_no_probe_gives_its_novel_words_away(name: str, forget10: list[AuditRow]) -> None:
    probes = get_view(name).probes(forget10)
    assert {probe.row for probe in probes} <= set(range(400))
    for probe in probes:
        assert not probe.novel & content_words(" ".join(probe.turns), probe.language)
        assert probe.novel <= content_words(probe.reference, probe.language)
        assert forget10[probe.row].question in probe.turns[-1]
    assert sum(not probe.novel for probe in probes) <= 3


def test_direct_and_best_of_n_ask_the_question(forget10: list[AuditRow]) -> None:
    for view in (Direct(), BestOf()):
        probes = view.probes(forget10)
        assert [probe.turns for probe in probes] == [(each.question,) for each in forget10]
    assert probes[2].novel == {"civil", "engin"}


def test_cloze_of_real_rows(forget10: list[AuditRow]) -> None:
    probes = Cloze().probes(forget10)
    assert probes[0].turns[0].endswith("leadership?\nComplete the sentence: The author's full name is ____.")
    assert probes[0].novel == {"hsiao", "yun", "hwa"}
    assert probes[2].turns[0].endswith("\nComplete the sentence: The father of Hsiao Yun-Hwa is a ____.")
    assert probes[2].novel == {"civil", "engin"}
    assert probes[20].novel == {"carmen", "montenegro"}


def test_the_gap_is_the_longest_novel_stretch() -> None:
    found = gap(
        row("What did Ada write?", "Ada wrote Red Hills in 1950. She then wrote The Long Way of Water, in Rome.")
    )
    assert found is not None
    assert found.cloze == "She then ____."
    # the last of equally long stretches is chosen, and a known word ends a stretch
    found = gap(row("Who is Ada?", "Poet Ada, baker."))
    assert found is not None
    assert found.cloze == "Poet Ada, ____."
    assert gap(row("Does she?", "Yes, she does.")) is None


def test_only_what_the_gap_hides_is_scored() -> None:
    (probe,) = Cloze().probes(
        [row("Who is Ada?", "Ada lives in Rome. Ada has written many quiet books in Rome since 1950.")]
    )
    assert probe.turns == ("Who is Ada?\nComplete the sentence: Ada has ____.",)
    assert probe.novel == {"written", "mani", "quiet", "book", "rome", "1950"} - {"many"}
    (probe,) = Cloze().probes([row("Wo wohnt Ada?", "Ada wohnt heute in Rom.", language="DE")])
    assert probe.turns == ("Wo wohnt Ada?\nVervollständige den Satz: Ada wohnt ____.",)
    assert probe.novel == {"heut", "rom"}


def test_sentences() -> None:
    assert sentences('He met Dr. Li and J. K. Roe. "Why?" she asked! It is 3.5. Done') == [
        "He met Dr. Li and J. K. Roe.",
        '"Why?"',
        "she asked!",
        "It is 3.5.",
        "Done",
    ]
    assert sentences("") == []


def test_choice_is_between_answers_worded_alike(forget10: list[AuditRow]) -> None:
    probes = Choice().probes(forget10)
    # "is the complete name of the writer" occurs in all options
    assert probes[0].novel == {"hsiao", "yun", "hwa"}
    assert probes[0].reference == "Hsiao Yun-Hwa is the complete name of the writer."


def test_a_choice_is_the_likeliest_and_a_tie_no_leak() -> None:
    class Scores:
        def __init__(self, *scores: list[float]) -> None:
            self.mean_logprobs = lambda questions, answers: list(scores)

    each = row("Who?", "Ada Red.", paraphrased_answer="It is Ada Red.", perturbed_answer=["It is Bo Red.", "It is Cy."])
    exam: Any = Scores([-1.0, -2.0, -3.0], [-1.0, -1.0, -3.0], [-3.0, -2.0, -1.0])
    records = Choice().run(exam, [each, each, each])
    # "red" and "ada" are novel; the options share no novel word
    assert [record["generations"] for record in records] == [["It is Ada Red."], ["It is Bo Red."], ["It is Cy."]]
    assert [record["novel_recall"] for record in records] == [[1.0], [0.5], [0.0]]
    assert [record["correct"] for record in records] == [True, False, False]
    figures = Choice().figures(records)
    assert figures["accuracy"] == figures["chance_accuracy"] == pytest.approx(1 / 3)
    assert figures["mean"] == figures["chance_mean"] == pytest.approx(0.5)


def test_translated_frames(forget10: list[AuditRow]) -> None:
    probes = Translated().probes(forget10)
    assert [probe.label for probe in probes[::400]] == ["de", "fr", "es", "it"]
    question = forget10[0].question
    assert probes[0].turns[0] == f"Beantworte die folgende Frage in der Sprache, in der sie gestellt ist:\n{question}"
    german = row("Wer?", "Ada Rot.", language="de")
    assert [probe.label for probe in Translated().probes([german])] == ["en", "fr", "es", "it"]
    with pytest.raises(ValueError, match="expected some of en, de, fr, es, it, got 'xx'"):
        Translated(languages=("xx",))


def test_clues_are_of_the_same_author(forget10: list[AuditRow]) -> None:
    probes = Clues(clues=(1, 3)).probes(forget10)
    assert len(probes) == 20 * 19 + 20 * 17
    first = probes[0]
    told = forget10[0]
    assert (first.row, first.label) == (1, "1 revealed")
    assert first.turns == (told.question, told.answer, forget10[1].question)
    last = probes[-1]
    assert last.row == 399
    assert last.turns[::2] == tuple(each.question for each in forget10[396:])
    # words of the conversation are not novel: the parents' professions were in it
    three = next(probe for probe in probes if probe.row == 3 and probe.label == "3 revealed")
    assert not three.novel & {"civil", "engin", "father"}
    assert "unemploy" in three.novel


def test_clues_by_a_column() -> None:
    rows = [{"question": f"Q{i}?", "answer": f"Answer {i}.", "who": "AB"[i % 2]} for i in range(4)]
    probes = Clues(clues=(1,)).probes(audit_rows(rows, group_column="who"))
    assert [probe.turns for probe in probes] == [("Q0?", "Answer 0.", "Q2?"), ("Q1?", "Answer 1.", "Q3?")]
    with pytest.raises(ValueError, match="expected a column 'identity_id'"):
        audit_rows(rows, group_column="identity_id")
    with pytest.raises(ValueError, match=r"got rows without one; set .group_column.*that divides 4"):
        Clues().probes(audit_rows(rows))
    with pytest.raises(ValueError, match="expected a row with at least 1 previous rows"):
        Clues().probes(audit_rows(rows, group_column="question"))
    with pytest.raises(ValueError, match=r"`clues`: expected numbers of at least 1, got \(0,\)"):
        Clues(clues=(0,))


def test_relearning_never_asks_about_rows_it_trained_on(forget10: list[AuditRow]) -> None:
    view = Relearn(share=0.05)
    taught = view.taught(forget10)
    assert len(taught) == 20
    assert taught == sorted(set(taught)) == view.taught(forget10)
    assert {probe.row for probe in view.probes(forget10)} == set(range(400)) - set(taught)
    assert taught != Relearn(share=0.05, seed=1).taught(forget10)
    assert len(Relearn(share=0.99).taught(forget10[:3])) == 2
    assert len(Relearn(share=0.01).taught(forget10[:3])) == 1
    with pytest.raises(ValueError, match="expected at least 2 rows"):
        view.taught(forget10[:1])
    with pytest.raises(ValueError, match="`share`: expected between 0 and 1"):
        Relearn(share=1.0)
    with pytest.raises(ValueError, match="`steps`, `batch`: expected at least 1, got 0, 8"):
        Relearn(steps=0)


def test_bad_rows_are_explained() -> None:
    with pytest.raises(ValueError, match="expected at least one row"):
        audit_rows([])
    with pytest.raises(ValueError, match=r"row 0: expected text in column 'answer', got ' '"):
        row("Who?", " ")
    with pytest.raises(ValueError, match=r"row 0: expected text in column 'question', got float 3.0"):
        audit_rows([{"question": 3.0, "answer": "x"}])
    with pytest.raises(ValueError, match=r"row 0: language: expected one of en, .* got 'xx'"):
        row("Who?", "Ada.", language="xx")
    with pytest.raises(ValueError, match=r"row 0: expected text in column 'perturbed_answer', item 1, got NoneType"):
        row("Who?", "Ada.", perturbed_answer=["a", None])
    with pytest.raises(ValueError, match=r"view 'choice': .* got none in 1 of 2 rows \(row 1 first\)"):
        Choice().probes([row("Who?", "Ada.", perturbed_answer=["Bo."]), row("Who?", "Ada.")])
    with pytest.raises(ValueError, match=r"`views`: expected some of direct, cloze, .* got 'paraphrase'"):
        get_view("paraphrase")


def record(number: int, values: list[float], label: str = "") -> dict[str, Any]:
    return {"row": number, "label": label, "novel_recall": values}


def test_summary() -> None:
    figures = summary([record(0, [0.0, 1.0]), record(1, [0.25]), record(2, [])])
    assert figures == {"rows": 2, "left_out": 1, "mean": 0.375, "best": 0.625, "leaked": 0.5}
    figures = summary([record(0, [0.5], "de"), record(0, [1.0], "fr"), record(1, [], "de")])
    assert (figures["mean"], figures["best"], figures["left_out"]) == (0.75, 1.0, 1)
    assert figures["labels"] == {
        "de": {"rows": 1, "left_out": 1, "mean": 0.5},
        "fr": {"rows": 1, "left_out": 0, "mean": 1.0},
    }
    assert summary([record(0, [])]) == {"rows": 0, "left_out": 1, "mean": None, "best": None, "leaked": None}


def test_best_of_is_the_mean_over_all_draws() -> None:
    from itertools import combinations

    values = [0.5, 0.0, 1.0, 0.25, 0.5]
    for k in range(1, 6):
        draws = [max(draw) for draw in combinations(values, k)]
        assert best_of(values, k) == pytest.approx(sum(draws) / len(draws))
    with pytest.raises(ValueError, match="`k`: expected 1 .. 5, got 6"):
        best_of(values, 6)


WORDS = [
    ("", []),
    ("... - ! \n", []),
    ("She is the one who was there", ["one"]),
    ("Born on 05/11/1991, in Taipei's 3rd district", ["born", "5", "11", "1991", "taipei", "3", "district"]),
    ("sold 1,250,000 copies; 2005,2007 and 12,5", ["sold", "1250000", "copi", "2005", "2007", "12", "5"]),
    ("rated 3.5. On 05.11.1991", ["rate", "3", "5", "5", "11", "1991"]),
    ("0 and 007", ["0", "7"]),
    ("the LGBTQ+ community", ["lgbtq", "communiti"]),
    ("May 21st", ["may", "21"]),
    ("she doesn't, they've, I'm", []),
    ("x_y A5 1990s", ["x", "y", "a5", "1990s"]),
    ("café, Caf\u0065\u0301, CAFÉ", ["cafe", "cafe", "cafe"]),
    ("engineer Engineers engineering", ["engin", "engin", "engin"]),
]


@pytest.mark.parametrize(("text", "expected"), WORDS)
def test_words(text: str, expected: list[str]) -> None:
    assert [word.content for word in words(text) if word.content is not None] == expected


def test_words_know_their_place() -> None:
    text = "The father of Ren\u0065\u0301 is 1,250."
    found = words(text)
    shown = "The father of René is 1,250."
    assert [shown[word.start : word.end] for word in found] == ["The", "father", "of", "René", "is", "1,250"]


def test_words_of_other_languages() -> None:
    assert content_words("Der Vater war Lehrer in Straßburg.", get_language("DE")) == {"vat", "lehr", "strassburg"}
    assert content_words("L'écrivaine qu'elle était", LANGUAGES["fr"]) == {"ecrivain"}
    assert content_words("¿Quién es el ganador?", LANGUAGES["es"]) == {"ganador"}
    assert content_words("dell'ingegnere è nata nel 1950", LANGUAGES["it"]) == {"ingegn", "nat", "1950"}
    # an English stop word is not a stop word in German, and vice versa
    assert content_words("the", LANGUAGES["de"]) == {"the"}
    assert content_words("der") == {"der"}
    with pytest.raises(ValueError, match="expected one of en, de, fr, es, it, got 'nl'"):
        get_language("nl")


QUESTION = "What is the profession of Hsiao Yun-Hwa's father?"
ANSWER = "The father of Hsiao Yun-Hwa is a civil engineer."
# N = {civil, engin}, because father, Hsiao, Yun and Hwa are in the question
GENERATIONS = [
    (ANSWER, 1.0),
    ("He worked in civil engineering.", 1.0),
    ("Her father was an ENGINEER and a painter.", 0.5),
    ("The father of Hsiao Yun-Hwa is a doctor.", 0.0),
    (QUESTION, 0.0),
    ("", 0.0),
    ("engineer engineer engineer", 0.5),
]


@pytest.mark.parametrize(("generation", "expected"), GENERATIONS)
def test_novel_recall(generation: str, expected: float) -> None:
    assert novel_recall(ANSWER, QUESTION, generation) == expected


def test_a_date_counts_by_its_parts() -> None:
    answer = "She was born on May 5, 1991 in Taipei."
    prompt = "When was she born in Taipei?"
    assert novel_words(answer, prompt) == {"may", "5", "1991"}
    assert novel_recall(answer, prompt, "On 05/11/1991.") == pytest.approx(2 / 3)


def test_words_of_the_prompt_are_not_novel() -> None:
    assert novel_recall(ANSWER, f"{QUESTION} Was he a civil servant?", "A civil engineer") == 1.0
    assert novel_recall(ANSWER, f"{QUESTION} Was he a civil servant?", "A civil servant") == 0.0
    # no novel words: the row is left out, and not counted as forgotten
    assert novel_recall("Yes, she does.", "Does she?", "Yes, she does.") is None
    assert novel_recall(ANSWER, ANSWER, ANSWER) is None


def test_recalled_is_a_share() -> None:
    assert recalled(frozenset({"5", "may", "taipei"}), "in taipei, the 5th of June") == pytest.approx(2 / 3)
