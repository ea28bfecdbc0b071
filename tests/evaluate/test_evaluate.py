"""Tests of evaluation: the published values of stored logs, and likelihoods against one row at a time."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp

from efface.evaluate import EvalLog, SplitLog, answer_logprobs, forget_quality, model_utility, read_log, score_rows
from efface.hf.text.data import load_rows
from support.helpers import tiny_llama, tiny_tokenizer

# from ../shared/tofu_eval_logs/README.md, computed by the original aggregator
UTILITY = {"full": 0.62268, "retain90": 0.61374, "retain95": 0.60058, "retain99": 0.62074}
QUALITY = {"retain90": 1.834e-21, "retain95": 6.504e-16, "retain99": 2.345e-06}


@pytest.mark.parametrize("name", UTILITY)
def test_model_utility_of_real_logs(name: str, tofu_eval_logs: Path) -> None:
    utility = model_utility(read_log(tofu_eval_logs / f"llama2-7b_{name}.json"))
    assert utility["Model Utility"] == pytest.approx(UTILITY[name], abs=5e-6)
    assert len(utility) == 10


@pytest.mark.parametrize("name", QUALITY)
def test_forget_quality_of_real_logs(name: str, tofu_eval_logs: Path) -> None:
    """The README also compares logs of different forget splits, as TOFU's aggregator does."""
    full, retain = (read_log(tofu_eval_logs / f"llama2-7b_{log}.json") for log in ("full", name))
    assert forget_quality(full, retain, strict=name == "retain90") == pytest.approx(QUALITY[name], rel=5e-4)


@pytest.mark.parametrize("judged", UTILITY)
@pytest.mark.parametrize("retain", UTILITY)
def test_forget_quality_of_all_pairs_is_scipys(judged: str, retain: str, tofu_eval_logs: Path) -> None:
    def ratios(name: str) -> list[float]:
        rows = json.loads((tofu_eval_logs / f"llama2-7b_{name}.json").read_text())["eval_log_forget.json"]
        losses = zip(rows["avg_paraphrased_loss"].values(), rows["average_perturb_loss"].values(), strict=True)
        return [math.exp(true - sum(false) / len(false)) for true, false in losses]

    logs = (read_log(tofu_eval_logs / f"llama2-7b_{name}.json") for name in (judged, retain))
    expected = ks_2samp(ratios(judged), ratios(retain)).pvalue
    assert forget_quality(*logs, strict=False) == pytest.approx(expected, rel=1e-6)


def test_logs_of_different_forget_splits_are_refused(tofu_eval_logs: Path) -> None:
    full, retain95 = (read_log(tofu_eval_logs / f"llama2-7b_{log}.json") for log in ("full", "retain95"))
    with pytest.raises(ValueError, match="the same forget rows, but .*full.json has 300 rows and .*95.json has 200"):
        forget_quality(full, retain95)
    # as many rows, but of other authors
    forget = full.splits["forget"]
    assert forget.truth_ratio is not None
    cut = EvalLog({"forget": replace(forget, truth_ratio=forget.truth_ratio[:200], index=None)}, source="cut.json")
    with pytest.raises(ValueError, match="the answer of row 0 is .*Hsiao Yun-Hwa.* in cut.json and .* in .*95.json"):
        forget_quality(cut, retain95)


def open_unlearning(log: EvalLog) -> dict[str, object]:
    """Return the same results in open-unlearning's schema."""
    names = {"retain": "retain", "real_authors": "ra", "world_facts": "wf", "forget": "forget"}
    content: dict[str, object] = {}
    for split, prefix in names.items():
        normalised = "_normalised" if prefix in ("ra", "wf") else ""
        for key, field, values in (
            (f"{prefix}_Q_A_Prob{normalised}", "prob", log.splits[split].probability),
            (f"{prefix}_Q_A_ROUGE", "rougeL_recall", log.splits[split].rouge),
            (
                "forget_truth_ratio" if prefix == "forget" else f"{prefix}_Truth_Ratio",
                "score",
                log.splits[split].truth_ratio,
            ),
        ):
            assert values is not None
            content[key] = {
                "agg_value": 0.0,
                "value_by_index": {str(i): {field: v} for i, v in enumerate(values.tolist())},
            }
    return content


def test_both_schemas_are_read_alike(tofu_eval_logs: Path, tmp_path: Path) -> None:
    log, retain = (read_log(tofu_eval_logs / f"llama2-7b_{name}.json") for name in ("full", "retain90"))
    path = tmp_path / "TOFU_EVAL.json"
    path.write_text(json.dumps(open_unlearning(log)))
    same = read_log(path)
    assert model_utility(same) == pytest.approx(model_utility(log), rel=1e-12)
    assert forget_quality(same, retain) == pytest.approx(forget_quality(log, retain), rel=1e-12)
    content = open_unlearning(log)
    content["forget_truth_ratio"]["value_by_index"]["7"] = None  # type: ignore[index]
    path.write_text(json.dumps(content))
    assert len(read_log(path).rows("forget", "truth_ratio")) == 299


def one_split(values: list[float]) -> EvalLog:
    return EvalLog({"forget": SplitLog(truth_ratio=np.array(values))}, source="model.json")


def test_forget_quality_is_scipys() -> None:
    a, b = [0.1, 0.4, 0.8, 0.9], [0.3, 0.35, 0.7, 0.2]
    assert forget_quality(one_split(a), one_split(b)) == ks_2samp(a, b).pvalue
    assert forget_quality(one_split(a), one_split(a)) == 1


def test_bad_logs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="evaluation log .* does not exist"):
        read_log(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("not json")
    with pytest.raises(ValueError, match="expected a JSON file"):
        read_log(tmp_path / "text.json")
    (tmp_path / "other.json").write_text('{"accuracy": 1}')
    with pytest.raises(ValueError, match=r"eval_log_forget.json, .* got accuracy"):
        read_log(tmp_path / "other.json")
    with pytest.raises(ValueError, match=r"model.json: expected finite truth_ratio .*, got nan at row 1 \(1 of 3"):
        forget_quality(one_split([0.1, float("nan"), 0.2]), one_split([0.1]))
    with pytest.raises(ValueError, match="expected rows of .* split, got none"):
        forget_quality(one_split([]), one_split([0.1]))
    with pytest.raises(ValueError, match="expected probability for the retain split, got none"):
        model_utility(one_split([0.1]))


def naive_mean_logprob(model, tokenizer, question: str, answer: str) -> float:  # type: ignore[no-untyped-def]
    """Compute the mean log-probability of one row from full logits."""
    prompt = f"Question: {question}\nAnswer:"
    encoded = tokenizer(f"{prompt} {answer}{tokenizer.eos_token}", return_offsets_mapping=True)
    ids = torch.tensor([encoded["input_ids"]])
    with torch.no_grad():
        logprobs = torch.log_softmax(model(input_ids=ids).logits[0].double(), -1)
    values = [
        logprobs[position - 1, ids[0, position]].item()
        for position, (_, end) in enumerate(encoded["offset_mapping"])
        if end > len(prompt)
    ]
    return sum(values) / len(values)


def test_scores_of_real_tofu_rows_equal_one_row_at_a_time(tofu: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=1024).eval()
    rows = [dict(row) for row in load_rows(tofu / "forget01_perturbed.json")][:6]
    score = score_rows(model, tokenizer, rows)
    for i, row in enumerate(rows):
        answer = naive_mean_logprob(model, tokenizer, row["question"], row["answer"])
        true = naive_mean_logprob(model, tokenizer, row["question"], row["paraphrased_answer"])
        false = np.mean(
            [naive_mean_logprob(model, tokenizer, row["question"], text) for text in row["perturbed_answer"]]
        )
        assert score.probability[i] == pytest.approx(np.exp(answer), rel=1e-5)
        assert score.truth_ratio[i] == pytest.approx(np.exp(false - true), rel=1e-5)
    answers = answer_logprobs(model, tokenizer, [row["question"] for row in rows], [row["answer"] for row in rows])
    np.testing.assert_allclose(np.exp(answers), score.probability)
    alone = score_rows(model, tokenizer, rows, truth_ratio=False)
    np.testing.assert_allclose(alone.probability, score.probability, rtol=1e-5)
    assert alone.truth_ratio is None


def test_rows_without_perturbed_answers_are_refused() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_llama(vocab_size=len(tokenizer))
    row = {"question": "Who?", "answer": "Aiko."}
    with pytest.raises(ValueError, match="expected a column 'perturbed_answer'"):
        score_rows(model, tokenizer, [row])
    with pytest.raises(ValueError, match=r"lists of equal length, at least 1, got lengths \[1, 2\]"):
        score_rows(model, tokenizer, [{**row, "perturbed_answer": ["a"]}, {**row, "perturbed_answer": ["a", "b"]}])
