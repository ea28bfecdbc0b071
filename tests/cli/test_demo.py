"""Tests of ``efface demo`` at smoke size."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from efface.cli.main import main


@pytest.mark.slow
@pytest.mark.parametrize("source", ["made up", "tofu"])
def test_the_demo_from_training_to_evaluation(
    source: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--json"] if source == "made up" else ["--data", str(request.getfixturevalue("tofu"))]
    assert main(["demo", "--scale", "smoke", "--out", str(tmp_path / "out"), *options]) == 0
    table = capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert ("probability_forget" in table) == (source == "made up")
    assert source == "tofu" or json.loads(table) == record
    names = [row["name"] for row in record["results"]]
    assert names == ["full", "retain", "npo", "simnpo", "graddiff"]
    full, retain, npo, *_ = record["results"]
    assert all(name in table for name in names)
    assert retain["forget_quality"] == 1
    assert npo["probability_forget"] < 0.5 * full["probability_forget"]
    assert len(npo["curve"]) == 6
    assert npo["curve"][0]["probability_forget"] == full["probability_forget"]
    for plot in ("forget_quality.png", "probability.png"):
        assert (tmp_path / "out" / plot).read_bytes().startswith(b"\x89PNG")
    for name in names:
        AutoModelForCausalLM.from_pretrained(tmp_path / "out" / name)
        AutoTokenizer.from_pretrained(tmp_path / "out" / name)
    data = tmp_path / "out" / "data"
    assert {"forget.json", "retain.json", "forget_perturbed.json"} <= {path.name for path in data.iterdir()}
    assert all(path.stat().st_size for path in data.iterdir())
    assert main(["demo", "--out", str(tmp_path / "out")]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--authors", "100"], "expected 1 .. 42 fictitious authors"),
        (["--authors", "3", "--forget-authors", "3"], "expected 1 .. 2 (fewer than --authors), got 3"),
        (["--data", "missing"], "data file 'missing/forget01_perturbed.json' does not exist"),
        (["--data", "missing", "--forget-authors", "3"], "expected 2 (forget01)"),
        (["--data", "missing", "--authors", "40"], "expected 3 .. 22, including 2 to forget"),
    ],
)
def test_wrong_use_is_explained(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--out", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
