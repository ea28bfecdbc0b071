"""ROUGE of generated answers: how many of the reference's words come back (Lin 2004, "ROUGE")."""

import functools
from collections.abc import Sequence
from typing import Any

from rouge_score.rouge_scorer import RougeScorer


@functools.lru_cache(maxsize=1)
def _scorer() -> Any:
    return RougeScorer(["rouge1", "rougeL"], use_stemmer=True)


def rouge_recall(generated: str, reference: str) -> dict[str, float]:
    """Return ROUGE as TOFU and open-unlearning compute it: by ``rouge-score``, words stemmed.

    With r words in the reference and g in the generated text,

        rouge1_recall = Σ_w min(count_r(w), count_g(w)) / r
        rougeL_recall = LCS / r,   rougeL_f1 = 2 LCS / (r + g)

    LCS is the length of the longest common subsequence of words. Words are runs of a-z and 0-9 in lower case: of
    scripts without them nothing is left, and the score is 0. So is that of an empty text; ``empty_texts`` tells them.
    """
    scores = _scorer().score(reference, generated)
    return {
        "rouge1_recall": float(scores["rouge1"].recall),
        "rougeL_recall": float(scores["rougeL"].recall),
        "rougeL_f1": float(scores["rougeL"].fmeasure),
    }


def empty_texts(texts: Sequence[str]) -> int:
    """Return how many of the texts have no word that ROUGE reads, so that their score is 0 whatever the reference."""
    return sum(not any(c.isascii() and c.isalnum() for c in text.lower()) for text in texts)
