"""``efface evaluate`` for other metrics than TOFU's, and for FAME."""

import json
from pathlib import Path

import pytest

from efface.cli.main import main
from support.helpers import TEXTS, tiny_llama, tiny_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
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


def test_metrics_are_written_in_open_unlearnings_schema(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, forget, holdout = (str(folder / name) for name in ("model", "forget.json", "holdout.json"))
    words = ["evaluate", "--model", model, "--metrics", "extraction_strength,mia_loss", "--forget", forget]
    assert main([*words, "--holdout", holdout, "--output", str(folder / "out")]) == 0
    printed = capsys.readouterr().out
    summary = read(folder / "out" / "METRICS_SUMMARY.json")
    assert list(summary) == ["extraction_strength", "mia_loss"]
    for name, value in summary.items():
        assert f"{name} {value:.4f}" in " ".join(word for word in printed.split() if word != "3")
    assert read(folder / "out" / "METRICS_CONFIG.json")["benchmark"] == "METRICS"
    assert not (folder / "out" / "TOFU_EVAL.json").exists()
    assert main([*words, "--output", str(folder / "again")]) == 2
    assert "mia_loss: expected --holdout FILE" in capsys.readouterr().err


def test_texts_may_be_cut_and_read_in_windows(folder: Path) -> None:
    words = ["evaluate", "--model", str(folder / "model"), "--forget", str(folder / "forget.json")]
    words += ["--metrics", "perplexity,extraction_strength", "--output", str(folder / "out")]
    assert main([*words, "--window", "16", "--max-length", "40"]) == 0
    assert len(read(folder / "out" / "METRICS_SUMMARY.json")) == 2
    assert main(words) == 0  # a window may be longer than the text


def test_fame_by_language_and_topic(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", "--model", str(folder / "model"), "--benchmark", "fame", "--data", str(folder / "fame.json")]
    words += ["--forget-filter", "topic_id=1", "--max-new-tokens", "8", "--output", str(folder / "out")]
    assert main(words) == 0
    assert "language EN" in capsys.readouterr().out
    content = read(folder / "out" / "FAME_EVAL.json")
    assert {"forget_Q_A_Prob", "forget_Q_A_ROUGE", "retain_Q_A_Prob", "retain_Q_A_ROUGE"} <= set(content)
    assert set(read(folder / "out" / "FAME_SUMMARY.json")) <= set(content)
