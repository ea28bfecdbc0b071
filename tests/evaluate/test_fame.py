"""Tests of FAME by language and topic against explicit sums, and of the command's flags for it."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from efface.cli.evaluate import add_metrics_flags, read_values, run_fame, run_metrics
from efface.evaluate import GenerationTask, answer_logprobs, evaluate_metrics, fame, rouge_recall
from efface.evaluate.logs import write_results
from efface.evaluate.metrics import Reading, fame_table
from efface.evaluate.runner import run_tasks
from support.helpers import TEXTS, tiny_llama, tiny_tokenizer

SHORT = Reading(max_new_tokens=6)
LANGUAGES = {"en": "Who is {}?", "fr": "Qui est {} ?", "de": "Wer ist {}?"}
ROWS: list[dict[str, Any]] = [
    {
        "identity_id": identity,
        "language": language,
        "topic_id": topic,
        "question": question.format(row["answer"].split()[0]),
        "answer": f"{row['answer']} {language}",
        # topic 10 has false answers, in French only if the identity is even
        "perturbed_answer": [f"{n} {language}" for n in range(2 + identity % 2)]
        if topic == 10 and (language != "fr" or identity % 2 == 0)
        else None,
        "paraphrased_answer": f"so {row['answer']}" if identity == 0 else None,
    }
    for identity, row in enumerate(TEXTS[:3])
    for language, question in LANGUAGES.items()
    for topic in (2, 10)
]


def model() -> Any:
    return tiny_llama(max_position_embeddings=256, vocab_size=300, initializer_range=0.3)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return fame(model(), tiny_tokenizer(), ROWS, forget_filter=["identity_id=0,1"], reading=SHORT)


def by_hand() -> list[dict[str, float]]:
    tokenizer, policy = tiny_tokenizer(), model()
    questions = [row["question"] for row in ROWS]
    [texts] = run_tasks(policy, [GenerationTask(tokenizer, questions, max_new_tokens=6)])
    values = []
    for row, made in zip(ROWS, texts, strict=True):
        true = row["paraphrased_answer"] or row["answer"]
        answers = [row["answer"], true, *(row["perturbed_answer"] or [])]
        answer, paraphrase, *false = answer_logprobs(policy, tokenizer, [row["question"]] * len(answers), answers)
        value = {"prob": math.exp(answer), "rouge": rouge_recall(made["text"], row["answer"])["rougeL_recall"]}
        if false:
            value["ratio"] = math.exp(sum(false) / len(false)) / (math.exp(paraphrase) + 1e-10)
        values.append(value)
    return values


def test_groups_are_the_means_of_their_rows(found: dict[str, Any]) -> None:
    rows = by_hand()
    shown = {
        "prob": lambda values, _: np.mean(values),
        "rouge": lambda values, _: np.mean(values),
        "ratio": lambda values, side: np.mean(
            [min(v, 1 / (v + 1e-10)) if side == "forget" else max(0, 1 - v) for v in values]
        ),
    }
    names = {
        "prob": "{}_Q_A_Prob",
        "rouge": "{}_Q_A_ROUGE",
        "ratio": "{}_Truth_Ratio",
    }
    for side, wanted in (("forget", (0, 1)), ("retain", (2,))):
        for field, name in names.items():
            metric = found[name.format(side) if (side, field) != ("forget", "ratio") else "forget_truth_ratio"]
            mine = [i for i, row in enumerate(ROWS) if row["identity_id"] in wanted and field in rows[i]]
            assert list(metric["value_by_index"]) == [str(i) for i in mine]
            scores = [row["score"] for row in metric["value_by_index"].values()]
            np.testing.assert_allclose(scores, [rows[i][field] for i in mine], rtol=1e-4)
            for group in ("language", "topic_id"):
                expected: dict[str, list[float]] = {}
                for i in mine:
                    expected.setdefault(str(ROWS[i][group]), []).append(rows[i][field])
                assert metric[f"by_{group}"].keys() == expected.keys()
                for value, members in expected.items():
                    cell = metric[f"by_{group}"][value]
                    assert cell["rows"] == len(members)
                    assert cell["agg_value"] == pytest.approx(shown[field](members, side), rel=1e-4)
            assert metric["agg_value"] == pytest.approx(shown[field]([rows[i][field] for i in mine], side), rel=1e-4)
    assert found["retain_Truth_Ratio"]["by_topic_id"].keys() == {"10"}


def test_the_table(found: dict[str, Any]) -> None:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in fame_table(found).splitlines()]
    assert [line[0] for line in lines] == [
        *("", "---", "all", "language de", "language en", "language fr", "topic_id 2", "topic_id 10"),
    ]
    assert {len(line) for line in lines} == {7}
    assert lines[6][3] == "-"  # topic 2 has no false answers
    assert float(lines[2][1]) == pytest.approx(found["forget_Q_A_Prob"]["agg_value"], abs=1e-4)


def test_messages_name_the_files_rows() -> None:
    rows = [{**row} for row in ROWS]
    kept = next(number for number, row in enumerate(rows) if row["identity_id"] == 2)
    rows[kept]["answer"] = " "
    with pytest.raises(ValueError, match=rf"retain, row {kept}: expected a question"):
        fame(tiny_llama(), tiny_tokenizer(), rows, forget_filter=["identity_id=0,1"])


def test_other_columns_and_no_false_answers() -> None:
    rows = [{"q": row["question"], "a": row["answer"], "part": i // 3} for i, row in enumerate(TEXTS)]
    reading = Reading(question_column="q", answer_column="a", max_new_tokens=4)
    found = fame(
        model(),
        tiny_tokenizer(),
        rows,
        forget_filter={"part": 0},
        retain_filter="part=1",
        groups=["part"],
        reading=reading,
    )
    assert list(found) == ["forget_Q_A_Prob", "forget_Q_A_ROUGE", "retain_Q_A_Prob", "retain_Q_A_ROUGE"]
    assert list(found["retain_Q_A_Prob"]["value_by_index"]) == ["3", "4"]
    assert (
        fame(model(), tiny_tokenizer(), rows, forget_filter="part=0", groups=[], reading=reading).keys() == found.keys()
    )


def test_wrong_filters_and_columns() -> None:
    def refused(message: str, rows: list[dict[str, Any]], **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            fame(model(), tiny_tokenizer(), rows, **options)

    refused("`forget_filter`: expected a filter of the forgotten rows", ROWS, forget_filter=None)
    refused("none of 18 rows has 'it' in column 'language', which has 'en', 'fr'", ROWS, forget_filter="language=it")
    refused("got row 0 in both", ROWS, forget_filter="language=en", retain_filter="topic_id=2")
    refused("retain: expected at least one row, got none", ROWS, forget_filter="topic_id=2,10")
    refused(
        "expected a column 'topic_id'",
        [{"question": "q", "answer": "a", "language": "en"}],
        forget_filter="language=en",
    )
    refused(
        "row 0: expected a list of texts in column 'perturbed_answer', got str",
        [{**ROWS[0], "perturbed_answer": "no"}, ROWS[1]],
        forget_filter="topic_id=2",
    )


def test_a_broken_model() -> None:
    broken = model()
    with torch.no_grad():
        broken.lm_head.weight[7] = math.nan
    with pytest.raises((FloatingPointError, ValueError), match=r"forget, .*(NaN.* row \d|row \d.*nan)"):
        fame(broken, tiny_tokenizer(), ROWS, forget_filter="topic_id=2", reading=SHORT)


def flags(*words: str) -> argparse.Namespace:
    """Return a stand-in for the options that the command's own parser adds to these flags."""
    parser = argparse.ArgumentParser()
    add_metrics_flags(parser)
    parser.set_defaults(template="auto", token_budget=4096, dtype="float32", data=None, trust_remote_code=False)
    parser.add_argument("--data")
    return parser.parse_args(words)


def test_the_flags(tmp_path: Path, found: dict[str, Any]) -> None:
    file = tmp_path / "fame.json"
    file.write_text(json.dumps(ROWS), encoding="utf-8")
    policy, tokenizer = model(), tiny_tokenizer()
    short = ("--max-new-tokens", "6")
    options = flags("--data", str(file), "--forget-filter", "identity_id=0,1", *short)
    assert run_fame(policy, tokenizer, options) == found

    model().save_pretrained(tmp_path / "reference")
    metrics = ["mia_loss", "mia_reference", "rouge", "privleak"]
    retain = tmp_path / "retain"
    write_results(retain, {"mia_min_k": {"agg_value": 0.25, "value_by_index": {}}}, {}, benchmark="METRICS")
    assert sorted(path.name for path in retain.iterdir()) == [
        *("METRICS_CONFIG.json", "METRICS_EVAL.json", "METRICS_SUMMARY.json"),
    ]
    assert (
        read_values(retain / "METRICS_EVAL.json") == read_values(retain / "METRICS_SUMMARY.json") == {"mia_min_k": 0.25}
    )
    options = flags(
        *("--metrics", ", ".join(metrics), "--forget", str(file), "--forget-filter", "language=en"),
        *("--holdout", str(file), "--holdout-filter", "language=fr", "--reference-model", str(tmp_path / "reference")),
        *("--retain-metrics", str(retain / "METRICS_EVAL.json"), *short),
    )
    ours = run_metrics(policy, tokenizer, options)
    english, french = ([row for row in ROWS if row["language"] == language] for language in ("en", "fr"))
    assert ours == evaluate_metrics(
        policy,
        tokenizer,
        english,
        metrics,
        holdout=french,
        reference_model=model(),
        reading=Reading(max_new_tokens=6, token_budget=4096),
        retain_values={"mia_min_k": 0.25},
    )
    assert ours["mia_reference"]["auc"] == 0.5  # the reference is the model itself

    with pytest.raises(ValueError, match="--metrics: expected --forget FILE"):
        run_metrics(policy, tokenizer, flags("--metrics", "rouge"))
    with pytest.raises(ValueError, match="--benchmark fame: expected --data FILE"):
        run_fame(policy, tokenizer, flags())
    with pytest.raises(FileNotFoundError, match=r"results file .* does not exist"):
        read_values(tmp_path / "none.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match="expected metrics by name, got a list"):
        read_values(tmp_path / "list.json")
