"""Tests of ``efface evaluate``: output, several processes, killed and restarted runs, other metrics, FAME."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from efface.cli.main import main
from efface.evaluate import forget_quality, read_log
from efface.hf.model.lora import add_lora, merged
from support.helpers import TEXTS, tiny_llama, tiny_tokenizer
from support.processes import RANKS, environment, launch
from support.tofu_helpers import model_of, tokenizer_of, write_rows

COUNTS = {"forget": 6, "retain": 5, "real_authors": 5, "world_facts": 4}
RESULTS = ("EVAL_CONFIG.json", "TOFU_EVAL.json", "TOFU_SUMMARY.json")


@pytest.fixture(scope="module")
def folder(tofu: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few rows of TOFU, and models named full and retain."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = tokenizer_of(write_rows(tofu, folder / "tofu", COUNTS))
    for seed, name in enumerate(("full", "retain")):
        model = model_of(tokenizer, seed)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def words(folder: Path, *more: str, model: str = "full") -> list[str]:
    return ["evaluate", "--model", str(folder / model), "--data", str(folder / "tofu"), *more]


def test_a_model_is_compared_with_its_retain_model(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = words(folder, "--retain-model", str(folder / "retain"), "--output", str(out), "--splits", "forget")
    assert main(command) == 0
    printed = capsys.readouterr()
    assert "full on forget10, open-unlearning" in printed.out
    summary = json.loads((out / "TOFU_SUMMARY.json").read_text())
    assert f"forget quality {summary['forget_quality']:.4g}".split() == printed.out.splitlines()[-2].split()
    assert str(out) in printed.err
    log, retain = read_log(out / "TOFU_EVAL.json"), read_log(out / "retain_model" / "TOFU_EVAL.json")
    assert forget_quality(log, retain) == summary["forget_quality"] < 1
    # The log of the retain model can be passed as the retain log, and its rows are not computed again.
    before = {path: path.read_bytes() for path in out.rglob("*.json")}
    assert main(command) == 0
    assert {path: path.read_bytes() for path in out.rglob("*.json")} == before
    again = words(folder, "--retain-log", str(out / "retain_model" / "TOFU_EVAL.json"), "--splits", "forget")
    assert main([*again, "--output", str(tmp_path / "again")]) == 0
    assert json.loads((tmp_path / "again" / "TOFU_SUMMARY.json").read_text()) == summary
    # A log of another protocol or of other labels is rejected, because its numbers are not comparable.
    for more, part in ((["--protocol", "tofu"], "protocol"), (["--template", "completion"], "template")):
        assert main([*again, *more, "--output", str(tmp_path / "other")]) == 2
        assert f"expected the {part} of this evaluation" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "more", "labels"),
    [
        ("open-unlearning", [], "answer"),
        ("open-unlearning, compat", ["--compat", "open-unlearning"], "open-unlearning"),
        ("tofu", ["--protocol", "tofu"], "tofu"),
    ],
)
def test_each_protocol_counts_its_own_labels(
    name: str, more: list[str], labels: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words(folder, *more), "--output", str(tmp_path), "--splits", "world_facts"]) == 0
    assert f"full on forget10, {name}" in capsys.readouterr().out
    assert main([*words(folder, *more), "--output", str(tmp_path), "--splits", "world_facts", "--json"]) == 0
    summary = json.loads((tmp_path / "TOFU_SUMMARY.json").read_text())
    assert json.loads(capsys.readouterr().out) == {"output": str(tmp_path), "tofu": summary}
    config = json.loads((tmp_path / "EVAL_CONFIG.json").read_text())
    assert (config["protocol"]["name"], config["template"]["labels"]) == (name, labels)
    # independent computation: the mean log-probability of the tokens after this prompt
    tokenizer = AutoTokenizer.from_pretrained(folder / "full")
    model = AutoModelForCausalLM.from_pretrained(folder / "full").eval()
    row = json.loads((folder / "tofu" / "world_facts_perturbed.json").read_text().splitlines()[0])
    asked = f"Question: {row['question']}\n"
    prompt = {"answer": f"{asked}Answer:", "open-unlearning": f"{asked}Answer: ", "tofu": asked}[labels]
    ids = torch.tensor([tokenizer(f"{asked}Answer: {row['answer']}{tokenizer.eos_token}")["input_ids"]])
    with torch.no_grad():
        logprobs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    expected = -logprobs[len(tokenizer(prompt)["input_ids"]) - 1 :].mean().item()
    found = json.loads((tmp_path / "TOFU_EVAL.json").read_text())["wf_Q_A_Prob"]["value_by_index"]["0"]["avg_loss"]
    assert found == pytest.approx(expected, rel=1e-4)


def test_without_a_retain_log_it_says_how_to_make_one(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(folder, "--splits", "forget", "--output", str(tmp_path))) == 0
    printed = capsys.readouterr()
    assert "no forget quality: it requires a model trained on the retain set only" in printed.err
    assert "retain90), and add --retain-model FOLDER" in printed.err
    assert printed.out.splitlines()[-2].split() == ["forget", "quality", "-"]


def test_the_output_folder_is_the_models_by_default(folder: Path) -> None:
    assert main(words(folder, "--splits", "world_facts", "--dtype", "bfloat16", model="retain")) == 0
    config = json.loads((folder / "retain" / "evaluation" / "EVAL_CONFIG.json").read_text())
    assert config["model"] == str(folder / "retain")
    assert config["dtype"] == "torch.bfloat16"
    assert config["rows"] == {"world_facts": 4}


def test_a_checkpoints_results_are_its_own(folder: Path) -> None:
    without = shutil.ignore_patterns("evaluation")
    shutil.copytree(folder / "retain", folder / "run" / "checkpoint-3", ignore=without)
    command = words(folder, "--splits", "world_facts", "--revision", "checkpoint-3", model="run")
    assert main(command) == 0
    assert (folder / "run" / "checkpoint-3" / "evaluation" / "TOFU_EVAL.json").is_file()
    assert not (folder / "run" / "evaluation").exists()


def test_an_adapter_is_a_model(folder: Path, tmp_path: Path) -> None:
    """The output of `efface unlearn --lora-r`: its metrics are those of the adapter merged into its model."""
    pytest.importorskip("peft")
    summaries = []
    torch.manual_seed(0)
    model = add_lora(AutoModelForCausalLM.from_pretrained(folder / "full"), r=4)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    merged(model).save_pretrained(tmp_path / "merged")
    for name in ("adapter", "merged"):
        AutoTokenizer.from_pretrained(folder / "full").save_pretrained(tmp_path / name)
        command = ["evaluate", "--model", str(tmp_path / name), "--data", str(folder / "tofu"), "--splits", "forget"]
        assert main(command) == 0
        summaries.append(json.loads((tmp_path / name / "evaluation" / "TOFU_SUMMARY.json").read_text()))
    assert summaries[0] == pytest.approx(summaries[1], rel=1e-4)
    assert summaries[0]["forget_Q_A_Prob"] > 0


def test_errors_of_use_are_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(match: str, *more: str) -> None:
        assert main(words(folder, "--output", str(tmp_path), *more)) == 2
        message = capsys.readouterr().err
        assert match in message
        assert "Traceback" not in message

    refused("expected TOFU's forget01_perturbed.json", "--split", "forget01")
    refused("expected --forget FILE", "--benchmark", "tofu", "--metrics", "mia_loss")
    refused("mia_loss: expected --holdout FILE", "--metrics", "mia_loss", "--forget", "rows.json")
    refused("metric: expected one of", "--metrics", "mia", "--forget", "rows.json")
    refused(
        "expected --benchmark tofu",
        "--metrics",
        "mia_loss",
        "--retain-log",
        "none.json",
        "--forget",
        "f.json",
        "--holdout",
        "h.json",
    )
    compat = ("--compat", "open-unlearning")
    refused("`compat`: expected protocol 'open-unlearning' with compat", *compat, "--protocol", "tofu")
    refused("--compat: expected TOFU's evaluation, got --benchmark fame", *compat, "--benchmark", "fame")
    metrics = ("--metrics", "extraction_strength", "--forget", "rows.json")
    refused("--compat: expected TOFU's evaluation, got --metrics", *compat, *metrics)
    refused("evaluation log 'none.json' does not exist", "--retain-log", "none.json")
    refused("model folder './none' does not exist", "--retain-model", "./none")
    (tmp_path / ".rows.sqlite").write_text("no database" * 1000)
    refused("delete the file: the rows are then computed again")
    refused("argument --protocol: invalid choice: 'muse'", "--protocol", "muse")
    refused("argument --retain-model: not allowed with argument --retain-log", "--retain-log=a", "--retain-model=b")
    with pytest.raises(SystemExit, match="0"):
        main(["evaluate", "--help"])
    assert "torchrun" in capsys.readouterr().out


def test_an_interrupted_evaluation_says_what_is_kept(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from efface.evaluate import GenerationTask

    run = GenerationTask.run

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(GenerationTask, "run", interrupted)
    assert main(words(folder, "--splits", "forget", "--output", str(tmp_path))) == 130
    assert "run the same command again to continue: 6 of 12 rows are saved in" in capsys.readouterr().err
    assert not (tmp_path / "TOFU_EVAL.json").exists()
    monkeypatch.setattr(GenerationTask, "run", run)
    assert main(words(folder, "--splits", "forget", "--output", str(tmp_path))) == 0


def test_a_killed_evaluation_resumes(folder: Path, tmp_path: Path) -> None:
    command = words(folder, "--token-budget", "1000", "--splits", "forget", "world_facts")
    done = subprocess.run(
        [sys.executable, str(RANKS / "killed_evaluation.py"), str(tmp_path), json.dumps(command)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["code"] == 0, record["logs"]
    batches, begun = record["batches"], record["begun"]
    assert begun[:3] == [3, 1, batches // 2]
    # Every batch is computed once, except for the three in which the process was killed.
    assert sum(begun) == batches + 3
    for name in RESULTS:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


@pytest.mark.slow
def test_several_processes_share_the_work_and_write_the_same_bytes_as_one(folder: Path, tmp_path: Path) -> None:
    begun: dict[int, list[int]] = {}
    for processes in (1, 2, 3):
        out = tmp_path / str(processes)
        more = ["--retain-model", str(folder / "retain"), "--token-budget", "1000", "--output", str(out)]
        done = launch(processes, [str(RANKS / "killed_evaluation.py"), str(tmp_path), json.dumps(words(folder, *more))])
        assert done.returncode == 0, done.stderr[-4000:]
        begun[processes] = [int((tmp_path / f"rank{rank}.note").read_text()) for rank in range(processes)]
        assert sum(begun[processes]) == begun[1][0]
        assert (
            max(begun[processes]) < begun[1][0] / processes + 3
        )  # two models, each of which can end with an incomplete turn
        for name in (*RESULTS[1:], *(f"retain_model/{name}" for name in RESULTS[1:])):
            assert (out / name).read_bytes() == (tmp_path / "1" / name).read_bytes(), f"{name} on {processes} processes"


@pytest.fixture
def rated(tmp_path: Path) -> Path:
    tokenizer = tiny_tokenizer()
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=256)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{**row, "topic_id": number % 2, "language": "EN"} for number, row in enumerate(TEXTS)]
    for name, some in (("fame", rows), ("forget", rows[:3]), ("holdout", rows[3:])):
        (tmp_path / f"{name}.json").write_text("\n".join(map(json.dumps, some)))
    return tmp_path


def read(path: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads(path.read_text())
    return content


def test_metrics_are_written_in_open_unlearnings_schema(rated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, forget, holdout = (str(rated / name) for name in ("model", "forget.json", "holdout.json"))
    words = ["evaluate", "--model", model, "--metrics", "extraction_strength,mia_loss", "--forget", forget]
    assert main([*words, "--holdout", holdout, "--output", str(rated / "out")]) == 0
    printed = capsys.readouterr().out
    summary = read(rated / "out" / "METRICS_SUMMARY.json")
    assert list(summary) == ["extraction_strength", "mia_loss"]
    for name, value in summary.items():
        assert f"{name} {value:.4f}" in " ".join(word for word in printed.split() if word != "3")
    assert read(rated / "out" / "METRICS_CONFIG.json")["benchmark"] == "METRICS"
    assert not (rated / "out" / "TOFU_EVAL.json").exists()
    assert main([*words, "--holdout", holdout, "--output", str(rated / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["output"] == str(rated / "out")
    assert {name: metric["agg_value"] for name, metric in found["metrics"].items()} == summary
    assert main([*words, "--output", str(rated / "again")]) == 2
    assert "mia_loss: expected --holdout FILE" in capsys.readouterr().err


def test_texts_may_be_cut_and_read_in_windows(rated: Path) -> None:
    words = ["evaluate", "--model", str(rated / "model"), "--forget", str(rated / "forget.json")]
    words += ["--metrics", "perplexity,extraction_strength", "--output", str(rated / "out")]
    assert main([*words, "--window", "16", "--max-length", "40"]) == 0
    assert len(read(rated / "out" / "METRICS_SUMMARY.json")) == 2
    assert main([*words, "--overwrite"]) == 0  # a window can be longer than the text


def test_results_of_another_model_are_replaced_only_with_overwrite(
    rated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one folder, checked per metric: a second model, other settings."""
    words = ["evaluate", "--forget", str(rated / "forget.json"), "--output", str(rated / "out"), "--metrics"]
    model = ["--model", str(rated / "model")]
    assert main([*words, "perplexity", *model]) == 0
    assert main([*words, "extraction_strength", *model]) == 0
    before = read(rated / "out" / "METRICS_SUMMARY.json")
    assert sorted(before) == ["extraction_strength", "perplexity"]
    other = tiny_llama(seed=1, vocab_size=len(tiny_tokenizer()), max_position_embeddings=256)
    other.save_pretrained(rated / "other")
    tiny_tokenizer().save_pretrained(rated / "other")
    capsys.readouterr()
    for more in (["--model", str(rated / "other")], [*model, "--max-length", "20"]):
        assert main([*words, "perplexity", *more]) == 2
        told = capsys.readouterr().err.splitlines()[-1]
        assert ("is 20" in told) if "--max-length" in more else (repr(str(rated / "model")) in told)
        assert "choose another --output, or add --overwrite" in told
        assert read(rated / "out" / "METRICS_SUMMARY.json") == before
    (rated / "out" / ".partial-1-METRICS_EVAL.json").write_text("of a killed process")
    assert main([*words, "perplexity", "--model", str(rated / "other"), "--overwrite"]) == 0
    assert not list((rated / "out").glob(".partial-*"))
    assert "replaced: 3 files" in capsys.readouterr().err
    assert sorted(read(rated / "out" / "METRICS_SUMMARY.json")) == ["perplexity"]


def test_fame_by_language_and_topic(rated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "evaluate",
        "--model",
        str(rated / "model"),
        "--benchmark",
        "fame",
        "--data",
        str(rated / "fame.json"),
    ]
    words += ["--forget-filter", "topic_id=1", "--max-new-tokens", "8", "--output", str(rated / "out")]
    assert main(words) == 0
    assert "language EN" in capsys.readouterr().out
    content = read(rated / "out" / "FAME_EVAL.json")
    assert {"forget_Q_A_Prob", "forget_Q_A_ROUGE", "retain_Q_A_Prob", "retain_Q_A_ROUGE"} <= set(content)
    assert set(read(rated / "out" / "FAME_SUMMARY.json")) <= set(content)
