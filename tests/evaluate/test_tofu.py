"""Tests of TOFU's evaluation: against one row at a time, its output, rejected input, and during a training run."""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from transformers import AutoModelForCausalLM

from efface.evaluate import (
    EvalLog,
    SplitLog,
    TofuEvaluation,
    TofuResult,
    forget_quality,
    model_utility,
    read_log,
    tofu,
)
from efface.evaluate.protocol import PROTOCOLS, Protocol, get_protocol
from efface.evaluate.tofu_evaluation import load_split, split_metrics
from support.processes import RANKS, launch
from support.ranks.evaluated_run import main as evaluated_run
from support.tofu_helpers import FILES, model_of, naive, read_rows, tokenizer_of, write_rows

COUNTS = {"forget": 6, "retain": 5, "real_authors": 5, "world_facts": 4}
# The protocols with fewer rows and shorter generations, in which every difference still shows, within seconds.
SHORT = {
    "open-unlearning": replace(PROTOCOLS["open-unlearning"], max_new_tokens=12),
    "tofu": replace(PROTOCOLS["tofu"], rows=4, max_length=110, padded_rows=3),
}
# A chat template whose turns end with the end of sequence, as Llama-3's and Zephyr's do.
CHAT = (
    "{% for m in messages %}{{ m.role + '\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def few(tofu: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tofu, tmp_path_factory.mktemp("data") / "tofu", COUNTS)


@pytest.fixture(scope="module")
def tokenizer(few: Path) -> Any:
    return tokenizer_of(few)


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    return model_of(tokenizer)


@pytest.fixture(scope="module")
def evaluated(model: Any, tokenizer: Any, few: Path) -> TofuResult:
    return tofu(model, tokenizer, few, protocol=SHORT["open-unlearning"])


def settings(protocol: Protocol) -> dict[str, Any]:
    names = ("rows", "max_length", "max_new_tokens", "epsilon", "padded_rows")
    return {name: getattr(protocol, name) for name in names} | {"whose": protocol.labels or "efface"}


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every number and text of nested results, with its path."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from leaves(inner, f"{path}/{name}")
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from leaves(inner, f"{path}/{place}")
    else:
        yield path, value


def same(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float) -> int:
    """Assert that everything in ``theirs`` is in ``ours``; return the number of compared numbers."""
    assert ours.keys() == theirs.keys()
    mine = dict(leaves(ours))
    found = list(leaves(theirs))
    for path, value in found:
        expected = pytest.approx(value, rel=tolerance, abs=tolerance) if isinstance(value, float) else value
        assert mine[path] == expected, path
    return sum(isinstance(value, float) for _, value in found)


@pytest.mark.parametrize("name", SHORT)
def test_every_number_equals_one_row_at_a_time(name: str, few: Path, model: Any, tokenizer: Any) -> None:
    ratios = [0.4, 0.9, 1.1, 0.7] if name == "tofu" else [0.4, 0.9, 1.1, 0.7, 1.3, 0.2]
    retain = EvalLog({"forget": SplitLog(truth_ratio=np.array(ratios))}, source="retain")
    result = tofu(model, tokenizer, few, protocol=SHORT[name], retain_log=retain)
    expected = naive(model, tokenizer, few, **settings(SHORT[name]), retain_ratios=ratios)
    assert same(result.content, expected, 1e-5) > 200
    texts = [row["generation"] for row in result.content["forget_Q_A_ROUGE"]["value_by_index"].values()]
    assert len({*texts}) > 1, "the model gives the same answer to every question"
    assert len(texts) == (4 if name == "tofu" else 6)


@pytest.mark.parametrize("pad", [None, "<|pad|>"], ids=["the end is the padding token", "it has its own"])
def test_every_number_with_compat_equals_one_row_at_a_time(pad: str | None, few: Path) -> None:
    tokenizer = tokenizer_of(few)
    tokenizer.chat_template = CHAT
    if pad is not None:
        tokenizer.add_special_tokens({"pad_token": pad})
    model = model_of(tokenizer)
    protocol = SHORT["open-unlearning"]
    result = tofu(model, tokenizer, few, protocol=protocol, compat="open-unlearning")
    assert same(result.content, naive(model, tokenizer, few, **settings(protocol) | {"whose": "open-unlearning"}), 1e-5)
    ours = tofu(model, tokenizer, few, protocol=protocol, splits=["forget"])
    assert ours.summary["forget_Q_A_Prob"] != pytest.approx(result.summary["forget_Q_A_Prob"], rel=1e-3)


def test_keys_of_results_include_prompts_labels_and_masked_tokens(few: Path) -> None:
    """Each way to evaluate a row has its own key, so that it never finds the result of another."""
    tokenizer = tokenizer_of(few)
    tokenizer.chat_template = CHAT
    theirs = replace(PROTOCOLS["open-unlearning"], labels="open-unlearning")
    ways = {
        "efface": (PROTOCOLS["open-unlearning"], "chat"),
        "its labels": (theirs, "chat"),
        "its labels and mask": (replace(theirs, hides_padding=True), "chat"),
        "question-answer": (PROTOCOLS["open-unlearning"], "question-answer"),
        "tofu": (replace(PROTOCOLS["tofu"], rows=None, max_length=None, max_new_tokens=200), "question-answer"),
    }
    keys: dict[str, set[bytes]] = {}
    for name, (protocol, template) in ways.items():
        evaluation = TofuEvaluation(tokenizer, few, protocol=protocol, template=template)
        tasks = [*evaluation._likelihoods, *evaluation._generations]
        keys[name] = {key for task in tasks for key in task.keys}
        assert len(keys[name]) == 2 * sum(COUNTS.values())
    assert len(set.union(*keys.values())) == len(ways) * 2 * sum(COUNTS.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_number_of_the_whole_files_equals_one_row_at_a_time(name: str, tofu: Path, tmp_path: Path) -> None:
    folder = write_rows(tofu, tmp_path / "tofu", dict.fromkeys(FILES))
    tokenizer = tokenizer_of(folder, 4000)
    model = model_of(tokenizer)
    model.lm_head.weight.data[tokenizer.eos_token_id] *= 2  # the naive generation is slow
    short = replace(PROTOCOLS[name], max_new_tokens=8) if name == "open-unlearning" else PROTOCOLS[name]
    result = evaluate(model, tokenizer, folder, short)
    expected = naive(model, tokenizer, folder, **settings(short))
    assert same(result.content, expected, 1e-5) > 10_000


def evaluate(model: Any, tokenizer: Any, folder: Path, protocol: Protocol) -> TofuResult:
    return TofuEvaluation(tokenizer, folder, protocol=protocol).evaluate(model)


def test_the_protocols() -> None:
    ours, theirs = PROTOCOLS["open-unlearning"], PROTOCOLS["tofu"]
    assert settings(ours) == {
        "rows": None,
        "max_length": None,
        "max_new_tokens": 200,
        "epsilon": 1e-10,
        "padded_rows": None,
        "whose": "efface",
    }
    assert settings(theirs) == {
        "rows": 300,
        "max_length": 200,
        "max_new_tokens": None,
        "epsilon": 0.0,
        "padded_rows": 30,
        "whose": "tofu",
    }
    assert get_protocol(ours) is ours
    compat = get_protocol(ours, "open-unlearning")
    assert (
        compat
        == replace(ours, name="open-unlearning, compat", labels="open-unlearning", hides_padding=True)
        == get_protocol(compat, "open-unlearning")
    )
    with pytest.raises(ValueError, match="`compat`: expected protocol 'open-unlearning' with .* got 'tofu', which"):
        get_protocol("tofu", "open-unlearning")
    with pytest.raises(ValueError, match="`compat`: expected 'open-unlearning' or None, got 'tofu'"):
        get_protocol("tofu", "tofu")
    with pytest.raises(ValueError, match="`protocol`: expected one of 'open-unlearning', 'tofu', got 'muse'"):
        get_protocol("muse")
    # Here 1e-10 matters: a model that gives next to no probability to any answer of a row.
    true, false = np.array([-40.0, -1.0]), np.array([[-41.0, -43.0], [-2.0, -4.0]])
    assert theirs.truth_ratios(true, false) == pytest.approx(np.exp([-2.0, -2.0]))
    assert ours.truth_ratios(true, false) == pytest.approx([np.exp(-42) / 1e-10, np.exp(-2)], rel=1e-6)
    assert theirs.share(true, false) == pytest.approx(1 / (1 + np.exp([-1, -1]) + np.exp([-3, -3])))
    assert ours.share(true, false)[0] == pytest.approx(np.exp(-40) / 1e-10, rel=1e-6)
    assert theirs.share(true - 1000, false - 1000) == pytest.approx(theirs.share(true, false))
    ratios = np.array([0.0, 0.5, 2.0, 1.0])
    assert theirs.forgotten(ratios) == pytest.approx(2 / 4)
    assert ours.kept(ratios) == theirs.kept(ratios) == pytest.approx(1.5 / 4)


def test_rows_of_a_protocol(tofu: Path) -> None:
    counts = {"forget": 300, "retain": 300, "real_authors": 100, "world_facts": 117}
    for split, count in counts.items():
        assert len(load_split(tofu, split, "forget10", PROTOCOLS["tofu"]).questions) == count
    rows = load_split(tofu, "forget", "forget10", PROTOCOLS["open-unlearning"])
    assert len(rows.candidates()) == 400
    assert {len(candidates) for candidates in rows.candidates()} == {7}
    # TOFU's plain files contain no question that is missing from the perturbed ones
    plain = [json.loads(line) for line in (tofu / "forget10.json").read_text().splitlines()]
    assert [row["answer"] for row in plain] == rows.answers


# --- output


def test_written_logs_are_read_again(
    model: Any, tokenizer: Any, few: Path, tmp_path: Path, evaluated: TofuResult
) -> None:
    result = tofu(model, tokenizer, few, protocol=SHORT["open-unlearning"], output=tmp_path)
    log = read_log(tmp_path / "TOFU_EVAL.json")
    for name, split in result.log.splits.items():
        again = log.splits[name]
        for field in ("probability", "truth_ratio", "rouge"):
            np.testing.assert_array_equal(getattr(again, field), getattr(split, field))
        assert again.index == split.index == tuple(map(str, range(COUNTS[name])))
        assert again.answers == split.answers
    assert model_utility(log)["Model Utility"] == result.summary["model_utility"]
    assert forget_quality(log, log) == 1
    summary = json.loads((tmp_path / "TOFU_SUMMARY.json").read_text())
    assert summary == result.summary == evaluated.summary
    assert list(summary) == sorted(summary)
    assert "forget_quality" not in summary
    content = json.loads((tmp_path / "TOFU_EVAL.json").read_text())
    assert content["forget_quality"] == {"agg_value": None}
    assert content["retain_Q_A_PERT_Prob"]["value_by_index"]["0"].keys() == {"prob", "avg_loss"}
    assert content["ra_Q_A_ROUGE"]["value_by_index"]["0"].keys() == {
        *("rouge1_recall", "rougeL_f1", "rougeL_recall", "input", "ground_truth", "generation")
    }
    config = json.loads((tmp_path / "EVAL_CONFIG.json").read_text())
    assert config["rows"] == {"retain": 5, "real_authors": 5, "world_facts": 4, "forget": 6}
    assert config["protocol"]["max_new_tokens"] == 12
    assert config["template"]["name"] == "question-answer"
    assert len(config["fingerprint"]) == 32
    assert config["versions"].keys() >= {"efface", "torch", "transformers"}
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".rows") and path.is_file()) == [
        *("EVAL_CONFIG.json", "TOFU_EVAL.json", "TOFU_SUMMARY.json")
    ]


def test_finished_rows_are_found_again_and_another_models_never(
    model: Any, tokenizer: Any, few: Path, tmp_path: Path, evaluated: TofuResult
) -> None:
    def evaluation(policy: Any) -> tuple[TofuResult, list[int]]:
        seen: list[int] = []
        protocol = SHORT["open-unlearning"]
        result = tofu(
            policy, tokenizer, few, protocol=protocol, output=tmp_path, progress=lambda _, done, rows: seen.append(done)
        )
        return result, seen

    first = (tmp_path / "TOFU_EVAL.json", evaluation(model)[0])
    before = first[0].read_bytes()
    result, seen = evaluation(model)
    assert seen == [2 * sum(COUNTS.values())]
    assert first[0].read_bytes() == before
    other, seen = evaluation(model_of(tokenizer, seed=1))
    assert seen[0] == 0
    assert other.summary["forget_Q_A_Prob"] != result.summary["forget_Q_A_Prob"]
    # Another protocol in the same folder needs other generations, but log-likelihoods of texts that it does not
    # truncate are reused.
    _, seen = evaluation(model)
    assert seen[0] == seen[-1]


def test_some_splits_alone(model: Any, tokenizer: Any, few: Path, evaluated: TofuResult) -> None:
    alone = tofu(model, tokenizer, few, protocol=SHORT["open-unlearning"], splits=["forget"])
    assert "model_utility" not in alone.summary
    assert alone.summary == {name: value for name, value in evaluated.summary.items() if name.startswith("forget")}


def test_a_retain_log_gives_forget_quality(few: Path, model: Any, tokenizer: Any, tmp_path: Path) -> None:
    protocol = SHORT["open-unlearning"]
    retain = tofu(model_of(tokenizer, seed=1), tokenizer, few, protocol=protocol, output=tmp_path, splits=["forget"])
    evaluation = TofuEvaluation(
        tokenizer, few, protocol=protocol, splits=["forget"], retain_log=tmp_path / "TOFU_EVAL.json"
    )
    result = evaluation.evaluate(model)
    ours, theirs = (log.rows("forget", "truth_ratio") for log in (result.log, retain.log))
    assert result.summary["forget_quality"] == ks_2samp(ours, theirs).pvalue < 1
    assert evaluation(model) == result.summary


# --- rejected input


def test_retain_logs_of_other_rows_are_refused_before_anything_is_computed(
    few: Path, tokenizer: Any, evaluated: TofuResult, tmp_path: Path
) -> None:
    def retain(**changes: Any) -> EvalLog:
        forget = replace(evaluated.log.splits["forget"], **changes)
        return EvalLog({"forget": forget}, source="retain.json")

    def refused(log: EvalLog, match: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            TofuEvaluation(tokenizer, few, retain_log=log, **options)

    known = evaluated.log.splits["forget"]
    assert known.truth_ratio is not None
    assert known.answers is not None
    TofuEvaluation(tokenizer, few, retain_log=retain())
    # as open-unlearning stores answers: with the prompt, if its template hides it, and with the tokenizer's spaces
    spaced = {row: f"user\n\nWho?assistant\n\n {text.replace(',', ' ,')}" for row, text in known.answers.items()}
    TofuEvaluation(tokenizer, few, retain_log=retain(answers=spaced))
    refused(
        retain(truth_ratio=known.truth_ratio[:4]), "forget10 under protocol open-unlearning has 6 .* retain.json has 4"
    )
    refused(retain(index=("1", "2", "3", "4", "5", "6")), "row 0 is in only one of forget10 .* and retain.json")
    shuffled = {row: known.answers[str(5 - int(row))] for row in known.answers}
    refused(retain(answers=shuffled), "the answer of row 0 is .*Hsiao Yun-Hwa.* in forget10")
    refused(retain(truth_ratio=None, index=None), "retain.json: expected truth_ratio for the forget split, got none")
    refused(
        retain(truth_ratio=np.full(6, np.nan)),
        "retain.json: expected finite truth_ratio for the forget split, got nan at row 0",
    )
    refused(retain(), "`retain_log`: expected 'forget' among the splits, got retain", splits=["retain"])
    with pytest.raises(FileNotFoundError, match="evaluation log .* does not exist"):
        TofuEvaluation(tokenizer, few, retain_log=tmp_path / "none.json")


def test_log_probabilities_that_are_not_finite_are_explained(few: Path, tokenizer: Any, tmp_path: Path) -> None:
    broken = model_of(tokenizer)
    with torch.no_grad():
        broken.lm_head.weight[5] = float("nan")
    with pytest.raises((FloatingPointError, ValueError), match="(?i)nan"):
        tofu(broken, tokenizer, few, protocol=SHORT["open-unlearning"], output=tmp_path)
    assert not (tmp_path / "TOFU_EVAL.json").exists()
    rows = load_split(few, "world_facts", "forget10", SHORT["tofu"])
    logprobs = [[-1.0, -2.0, -3.0, -4.0] for _ in rows.questions]
    logprobs[2][3] = -math.inf
    with pytest.raises(
        FloatingPointError, match="world_facts, row 2: .* mean .* of the answer 'Perth', got -inf; if the weights"
    ):
        split_metrics("world_facts", rows, logprobs, [{"rougeL_recall": 0.5}] * 4, SHORT["tofu"])


def test_a_ruined_model_overflows_in_words(few: Path, model: Any, tokenizer: Any) -> None:
    """Losses of thousands of nats, as after gradient ascent: R overflows in one protocol but not in the other."""
    ruined = model_of(tokenizer)
    with torch.no_grad():
        ruined.lm_head.weight *= 1e5
    with pytest.raises(FloatingPointError, match="row .*: expected a finite truth ratio, got inf, .* probability of 0"):
        tofu(ruined, tokenizer, few, protocol=SHORT["tofu"])
    result = tofu(ruined, tokenizer, few, protocol=SHORT["open-unlearning"])
    assert result.summary["forget_Q_A_Prob"] == 0
    assert result.summary["model_utility"] == 0


def test_empty_generations_are_counted(few: Path, tokenizer: Any) -> None:
    silent = model_of(tokenizer)
    with torch.no_grad():
        silent.lm_head.weight.zero_()  # all tokens are equally likely, and the first of them is the end of sequence
    assert tokenizer.eos_token_id == 0
    result = tofu(silent, tokenizer, few, protocol=SHORT["open-unlearning"])
    assert result.empty == {"retain": 5, "real_authors": 5, "world_facts": 4, "forget": 6}
    assert result.summary["forget_Q_A_ROUGE"] == result.summary["model_utility"] == 0


def test_a_tokenizer_without_an_end_is_refused(few: Path) -> None:
    tokenizer = tokenizer_of(few)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="expected an end-of-sequence token"):
        TofuEvaluation(tokenizer, few)


def test_bad_data_is_explained(few: Path, tokenizer: Any, tmp_path: Path) -> None:
    def refused(match: str, data: Path | str = few, error: type[Exception] = ValueError, **options: Any) -> None:
        with pytest.raises(error, match=match):
            TofuEvaluation(tokenizer, data, **options)

    refused(
        "expected TOFU's forget05_perturbed.json, got forget10_perturbed, real_authors_perturbed",
        split="forget05",
        error=FileNotFoundError,
    )
    refused("data folder './none' does not exist", "./none", FileNotFoundError)
    refused("`splits`: expected some of retain, .*, got forget10", splits=["forget10"])
    refused("`splits`: .* got none", splits=[])

    def changed(name: str, **values: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(few, folder)
        rows = read_rows(few, "forget")
        rows[2].update(values)
        lines = (json.dumps({key: value for key, value in row.items() if value != "gone"}) for row in rows)
        (folder / f"{FILES['forget']}.json").write_text("\n".join(lines))
        return folder

    refused("row 2: expected a question and answers with text, got '  '", changed("blank", answer="  "))
    refused(
        "row 2: expected text in column 'paraphrased_answer', got NoneType", changed("none", paraphrased_answer=None)
    )
    refused(
        r"the same number of false answers in every row, at least 1, got \[4, 5\]",
        changed("four", perturbed_answer=["x"] * 4),
    )
    refused(r"at least 1, got \[0, 5\]", changed("empty", perturbed_answer=[]))
    folder = changed("rows")
    (folder / f"{FILES['forget']}.json").write_text(json.dumps({"question": "Who?", "answer": "I."}))
    refused("expected a column 'perturbed_answer', got 'question', 'answer'", folder)


@pytest.fixture(scope="module")
def folder(few: Path, tokenizer: Any) -> Path:
    """TOFU's files, and the log of a retain model."""
    tofu(model_of(tokenizer, seed=1), tokenizer, few, output=few.parent / "retain", splits=["forget"])
    return few.parent


def test_figures_are_of_the_models_that_the_run_had(folder: Path, tmp_path: Path) -> None:
    evaluated_run(folder, tmp_path)
    logs = json.loads((tmp_path / "rank0.json").read_text())["logs"]
    assert [log["step"] for log in logs] == [0, 2, 4]
    assert logs[0]["forget_Q_A_Prob"] != logs[2]["forget_Q_A_Prob"]
    tokenizer = tokenizer_of(folder / "tofu")
    evaluate = TofuEvaluation(tokenizer, folder / "tofu", retain_log=folder / "retain" / "TOFU_EVAL.json")
    start = evaluate(model_of(tokenizer))
    assert {name: logs[0][name] for name in start} == pytest.approx(start, rel=1e-5)
    # the best of them, as saved
    best = json.loads((tmp_path / "run" / "best" / "best.json").read_text())
    kept = evaluate(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "best"))
    assert {name: best["figures"][name] for name in kept} == pytest.approx(kept, rel=1e-5)


@pytest.mark.slow
def test_two_processes_evaluate_the_run_as_one_does(folder: Path, tmp_path: Path) -> None:
    for processes in (1, 2):
        out = tmp_path / str(processes)
        out.mkdir()
        done = launch(processes, [str(RANKS / "evaluated_run.py"), str(folder), str(out)])
        assert done.returncode == 0, done.stderr[-4000:]
    (alone,), ranks = (
        [json.loads((tmp_path / str(count) / f"rank{rank}.json").read_text()) for rank in range(count)]
        for count in (1, 2)
    )
    shares = [len(rank["batches"]) for rank in ranks]
    assert sum(shares) == len(alone["batches"])
    assert min(shares) > 0.4 * sum(shares)
    assert ranks[0]["logs"] == ranks[1]["logs"]
    for mine, theirs in zip(ranks[0]["logs"], alone["logs"], strict=True):
        for name in ("forget_quality", "model_utility", "forget_Q_A_Prob", "ra_Q_A_ROUGE", "wf_Truth_Ratio"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4), name
