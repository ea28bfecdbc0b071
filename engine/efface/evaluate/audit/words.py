"""Novel recall: of an answer's content words that are not in the prompt, the share that a generation contains."""

import re
import unicodedata
from dataclasses import dataclass

from efface.evaluate.audit.languages import LANGUAGES, Language, stem

# A number, optionally with thousands separators (1,250) or an ordinal ending (3rd), or a run of letters and digits.
_WORDS = re.compile(r"(\d{1,3}(?:,\d{3})+|\d+)(?:st|nd|rd|th)?(?![^\W_])|([^\W_]+)")

ENGLISH = LANGUAGES["en"]


@dataclass(frozen=True)
class Word:
    """A word of a text.

    Attributes:
        start: index of its first character in the NFC-normalised text.
        end: index after its last character.
        content: the normalised form that comparisons use; None for a stop word.
    """

    start: int
    end: int
    content: str | None


def words(text: str, language: Language = ENGLISH) -> list[Word]:
    """Return the words of a text, in order.

    A word is a number or a run of letters and digits. Thousands separators, leading zeros and ordinal endings of
    numbers are removed: 1,250 becomes 1250, 05 becomes 5, 3rd becomes 3. Every other word is casefolded. If it is not a
    stop word, it is also stemmed, and its accents are removed. A date is split into its numbers and words, and 3.5
    into 3 and 5.
    """
    found = []
    for match in _WORDS.finditer(unicodedata.normalize("NFC", text)):
        number, other = match.groups()
        content = _plain_number(number) if number else _content(unicodedata.normalize("NFKC", other), language)
        found.append(Word(match.start(), match.end(), content))
    return found


def _plain_number(number: str) -> str:
    return number.replace(",", "").lstrip("0") or "0"


def _content(word: str, language: Language) -> str | None:
    folded = word.casefold()
    if folded in language.stop_words:
        return None
    marked = unicodedata.normalize("NFKD", stem(folded, language))
    return "".join(letter for letter in marked if not unicodedata.combining(letter))


def content_words(text: str, language: Language = ENGLISH) -> frozenset[str]:
    """Return W(text), the set of content words of a text."""
    return frozenset(word.content for word in words(text, language) if word.content is not None)


def novel_words(answer: str, prompt: str, language: Language = ENGLISH) -> frozenset[str]:
    """Return the content words of the answer that are not in the prompt: W(answer) without W(prompt)."""
    return content_words(answer, language) - content_words(prompt, language)


def recalled(novel: frozenset[str], generation: str, language: Language = ENGLISH) -> float:
    """Return the share of the novel words that the generation contains: |novel ∩ W(generation)| / |novel|."""
    return len(novel & content_words(generation, language)) / len(novel)


def novel_recall(answer: str, prompt: str, generation: str, *, language: Language = ENGLISH) -> float | None:
    """Return |N ∩ W(generation)| / |N| with N = W(answer) without W(prompt), or None if N is empty.

    W(·) is the set of content words; see ``words``. Repeating the prompt does not raise the score, and text beyond the
    answer does not lower it. Source: the novel-recall scorer of "Do Unlearned LLMs Really Forget? A Multi-View Audit of
    TOFU Unlearning", as its model cards describe it. The definitions of words, stems and stop words are ours.

    Args:
        answer: the true answer.
        prompt: all text that the model was shown.
        generation: the model's answer.
        language: language of the answer.
    """
    novel = novel_words(answer, prompt, language)
    return recalled(novel, generation, language) if novel else None
