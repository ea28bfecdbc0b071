"""ROUGE: the stored logs' values, and closed forms."""

import json
import warnings
from pathlib import Path

import pytest

from efface.evaluate import rouge_recall
from efface.evaluate.rouge import empty_texts


def test_the_stored_generations_have_the_stored_recall(tofu_eval_logs: Path) -> None:
    log = json.loads((tofu_eval_logs / "llama2-7b_full.json").read_text())
    checked = 0
    for split in log.values():
        rows = split["generated_text"]
        rows = list(rows.values()) if isinstance(rows, dict) else rows
        for i, (_, generated, truth) in enumerate(rows):
            scores = rouge_recall(generated, truth)
            assert scores["rougeL_recall"] == split["rougeL_recall"][str(i)]
            assert scores["rouge1_recall"] == split["rouge1_recall"][str(i)]
            checked += 1
    assert checked == 817


def test_closed_forms() -> None:
    scores = rouge_recall("Lisbon was home. She lived there!", "She lives in Lisbon")
    assert scores["rouge1_recall"] == 3 / 4  # she, live, lisbon
    assert scores["rougeL_recall"] == 2 / 4  # she live
    assert scores["rougeL_f1"] == pytest.approx(2 * 2 / (4 + 6))
    assert rouge_recall("the same", "the same") == {"rouge1_recall": 1.0, "rougeL_recall": 1.0, "rougeL_f1": 1.0}


@pytest.mark.parametrize("text", ["", "  \n", "...", "作家"])
def test_texts_without_words_score_0_and_are_counted(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rouge_recall(text, "an answer") == {"rouge1_recall": 0.0, "rougeL_recall": 0.0, "rougeL_f1": 0.0}
        assert rouge_recall("an answer", text)["rougeL_recall"] == 0
    assert empty_texts([text, "a", "7", "Ä b"]) == 1
