"""Novel recall: worked by hand."""

import pytest

from efface.evaluate.audit import novel_recall
from efface.evaluate.audit.languages import LANGUAGES, get_language
from efface.evaluate.audit.words import content_words, novel_words, recalled, words

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
    # an English stop word is none in German, and the other way round
    assert content_words("the", LANGUAGES["de"]) == {"the"}
    assert content_words("der") == {"der"}
    with pytest.raises(ValueError, match="expected one of en, de, fr, es, it, got 'nl'"):
        get_language("nl")


QUESTION = "What is the profession of Hsiao Yun-Hwa's father?"
ANSWER = "The father of Hsiao Yun-Hwa is a civil engineer."
# N = {civil, engin}: father, Hsiao, Yun, Hwa are in the question
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


def test_what_the_prompt_says_is_not_novel() -> None:
    assert novel_recall(ANSWER, f"{QUESTION} Was he a civil servant?", "A civil engineer") == 1.0
    assert novel_recall(ANSWER, f"{QUESTION} Was he a civil servant?", "A civil servant") == 0.0
    # nothing novel: left out, not counted as forgotten
    assert novel_recall("Yes, she does.", "Does she?", "Yes, she does.") is None
    assert novel_recall(ANSWER, ANSWER, ANSWER) is None


def test_recalled_is_a_share() -> None:
    assert recalled(frozenset({"5", "may", "taipei"}), "in taipei, the 5th of June") == pytest.approx(2 / 3)
