"""Tests of ``--share-prefixes`` and of the figures about shared prefixes, in every command that has them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from efface.cli import plan as plan_command
from efface.cli.main import main
from support.helpers import CHAT_TEXTS, TEXTS, saved_llama, written_rows

SAID = re.compile(r"shared prefixes are run once, which saves (\d+)% of the tokens")


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Flags of ``efface unlearn`` for a model and rows that begin with the same system prompt."""
    saved_llama(tmp_path / "model", max_position_embeddings=256)
    sets = [
        word
        for name, rows in (("forget", CHAT_TEXTS[:2]), ("retain", CHAT_TEXTS[2:]))
        for word in (f"--{name}", str(written_rows(tmp_path / f"{name}.json", rows)))
    ]
    options = ["--use-cpu", "--num-train-epochs", "2", "--pairs-per-step", "3", "--logging-steps", "1"]
    return ["--model", str(tmp_path / "model"), *sets, *options]


def run(tmp_path: Path, *words: str) -> list[dict[str, Any]]:
    """Run a command that trains, and return its logged figures."""
    assert main([*words, "--output", str(tmp_path / "out"), "--overwrite", "--save-strategy", "no"]) == 0
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


@pytest.mark.parametrize("command", ["unlearn", "finetune"])
def test_a_run_says_what_sharing_saves(
    command: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if command == "finetune":
        words = [*words[:2], "--data", words[5], *words[6:]]
    logged = run(tmp_path, command, *words)
    said = capsys.readouterr().err
    found = SAID.search(said)
    assert found is not None
    assert said.count("shared prefixes") == 1
    assert "prefixes_saved" not in said  # only in the log, as other figures that hardly change
    assert 0.2 < logged[0]["prefixes_saved"] < 0.9
    assert float(found[1]) == pytest.approx(100 * logged[0]["prefixes_saved"], abs=3)
    for wanted in (["--share-prefixes", "false"], ["--share_prefixes=False"], ["--no-share-prefixes"]):
        apart = run(tmp_path, command, *words, *wanted)
        assert "shared prefixes" not in capsys.readouterr().err
        assert not any("prefixes_saved" in entry for entry in apart)
        for mine, theirs in zip(logged, apart, strict=True):
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_plan_shows_what_sharing_saves(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["plan", "--tokenizer", *words[1:6], "--pairs-per-step", "2", "--token-budget", "512"]
    assert main([*words, "--json"]) == 0
    (shared,) = json.loads(capsys.readouterr().out)
    assert 0.2 < shared["prefixes_saved"] < 0.9
    for wanted in (["--share-prefixes", "false"], ["--share_prefixes", "no"]):
        assert main([*words, *wanted, "--json"]) == 0
        (apart,) = json.loads(capsys.readouterr().out)
        assert apart["prefixes_saved"] == 0
        assert apart["tokens"] > 1.5 * shared["tokens"]
        assert apart["padding_saved"] == shared["padding_saved"]
        assert apart["steps"] == shared["steps"]
    for wanted in (["--share-prefixes", "true"], ["--share-prefixes"]):
        assert main([*words, *wanted, "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == [shared]
    assert main(words) == 0
    table = capsys.readouterr().out
    assert re.search(r"passes +tokens +shared +no padding", table)
    assert f"{shared['prefixes_saved']:.1%}" in table


def test_the_table_of_a_plan_fits_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"processes": 8, "steps": 12_345, "micro_batches_per_step": 12.34, "tokens": 123_456_789}
    row |= dict.fromkeys(("prefixes_saved", "padding_saved", "efficiency", "efficiency_with_last"), 0.987)
    Console(width=80).print(plan_command._table([row], 40_000, 4_000_000))
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert "123,456,789" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_a_dry_run_shows_what_sharing_saves(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    reports = []
    for wanted in ([], ["--share-prefixes", "false"]):
        assert main(["unlearn", *words, *wanted, "--dry-run", "--json"]) == 0
        reports.append(json.loads(capsys.readouterr().out)["run"])
    shared, apart = reports
    assert 0.2 < shared["prefixes saved"] < 0.9
    assert apart["prefixes saved"] == 0
    assert apart["tokens"] > 1.5 * shared["tokens"]
    assert apart["padding saved"] == shared["padding saved"]
    assert main(["unlearn", *words, "--dry-run"]) == 0
    assert re.search(r"^ +prefixes saved +0\.\d+$", capsys.readouterr().out, re.MULTILINE)


def test_a_reference_that_was_cached_serves_runs_with_and_without_sharing(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = ["--reference-cache", str(tmp_path / "reference.db")]
    assert main(["cache-reference", *words, *cache]) == 0
    assert "2 sequences computed, 0 already cached" in capsys.readouterr().err
    assert main(["cache-reference", *words, *cache, "--share-prefixes", "false"]) == 0
    assert "0 sequences computed, 2 already cached" in capsys.readouterr().err
    for wanted in ("true", "false"):
        logged = run(tmp_path, "unlearn", *words, *cache, "--share-prefixes", wanted)
        assert "2 of 2 sequences to compute" not in capsys.readouterr().err
        assert logged[0]["mean_log_ratio"] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("command", ["unlearn", "finetune", "cache-reference"])
def test_help_all_lists_the_flag_with_training(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for word in ("--help", "--help-all"):
        with pytest.raises(SystemExit, match="0"):
            main([command, word])
        shown.append(capsys.readouterr().out)
    assert "--share-prefixes" not in shown[0]
    groups = re.split(r"^(?=\S.*:$)", shown[1], flags=re.MULTILINE)
    assert [each.partition(":")[0] for each in groups if "  --share-prefixes" in each] == ["training"]


@pytest.mark.parametrize("command", ["unlearn", "finetune", "cache-reference", "plan"])
def test_a_value_that_is_neither_is_refused(command: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if command == "plan":
        words = ["--tokenizer", *words[1:6]]
    assert main([command, *words, "--share-prefixes", "maybe"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"efface {command}: error: argument --share-prefixes: ")
    assert "maybe" in said


def test_a_file_of_flags_can_turn_it_off(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("share_prefixes", "share-prefixes"):
        (tmp_path / "run.yaml").write_text(f"{name}: false\n")
        assert main(["unlearn", "--config", str(tmp_path / "run.yaml"), *words, "--dry-run", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["run"]["prefixes saved"] == 0


def test_an_unfinished_run_continues_only_with_the_same_value(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As other recorded arguments: results are equal only up to rounding, and a resumed run has the same bits."""
    out = tmp_path / "out"
    words = ["unlearn", *words, "--output", str(out), "--save-schedule", "1"]
    assert main(words) == 0
    whole, record = (out / "model.safetensors").read_bytes(), json.loads((out / "run.json").read_text())
    assert record["identity"]["arguments"]["share_prefixes"] is True
    (out / "model.safetensors").unlink()
    (out / "run.json").write_text(json.dumps({**record, "finished": False}))
    capsys.readouterr()
    assert main([*words, "--share-prefixes", "false"]) == 2
    assert "Differences: share_prefixes: was True, is False" in capsys.readouterr().err
    assert main([*words, "--share-prefixes"]) == 0
    assert "continuing from" in capsys.readouterr().err
    assert (out / "model.safetensors").read_bytes() == whole


def test_rows_with_little_in_common_are_not_shared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved_llama(tmp_path / "model", max_position_embeddings=256)
    names = [row["answer"] for row in TEXTS]
    rows = [{"text": f"{name} {names[i - 1]} {names[i - 2]}"} for i, name in enumerate(names)]
    data = str(written_rows(tmp_path / "rows.json", rows))
    words = ["--model", str(tmp_path / "model"), "--forget", data, "--use-cpu", "--alpha", "0", "--max-steps", "1"]
    logged = run(tmp_path, "unlearn", *words, "--template", "completion", "--logging-steps", "1")
    assert "shared prefixes" not in capsys.readouterr().err
    assert "prefixes_saved" not in logged[0]
