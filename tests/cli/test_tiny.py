"""Tests of recipes at a small scale: their flags, and all five systems end to end at smoke size."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from efface.cli import tiny
from efface.cli.main import main
from efface.hf.model.loading import load_model, load_tokenizer
from efface.recipes import known_recipes, load_recipe
from efface.simulate import scales, teach
from efface.simulate.scales import SCALES, get_scale, run_tiny, tiny_flags
from efface.simulate.teach import ARCHITECTURES
from support.helpers import LONG

FIVE = {
    "npo-tofu-forget10-llama-3.2-1b": "npo",
    "graddiff-fame-topics-llama-3.2-3b": "graddiff",
    "simnpo-tofu-forget05-llama-2-7b": "simnpo",
    "npo-tofu-forget10-llama-3.2-3b": "npo",
    "graddiff-tofu-forget01-phi-1.5": "graddiff",
}


def test_the_flags_of_a_scale() -> None:
    recipe = load_recipe("simnpo-tofu-forget05-llama-2-7b")
    flags = tiny_flags(recipe, SCALES["tiny"])
    kept = {name: flags[name] for name in ("objective", "beta", "delta", "alpha", "seed", "template", "weight_decay")}
    assert kept == {name: recipe.unlearn[name] for name in kept}
    assert not {"model", "forget", "retain"} & set(flags)
    assert (flags["dtype"], flags["bf16"], flags["optim"]) == ("float32", False, "adamw_torch")
    with pytest.raises(ValueError, match="--scale: expected one of tiny, smoke, got 'huge'"):
        get_scale("huge")


def test_every_recipe_has_a_tiny_form() -> None:
    for name in known_recipes():
        recipe = load_recipe(name)
        assert recipe.unlearn["template"] in ARCHITECTURES
        assert recipe.unlearn["objective"] == tiny_flags(recipe, SCALES["tiny"])["objective"]


@pytest.mark.parametrize("name", FIVE)
def test_the_five_systems_at_smoke_size(
    name: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = load_recipe(name), tmp_path / "out"
    on_tofu = "1b" in name or "phi" in name
    words = ["unlearn", "--recipe", name, "--scale", "smoke", "--output_dir", str(out)]
    assert main([*words, *(["--data", str(request.getfixturevalue("tofu"))] if on_tofu else [])]) == 0
    table = capsys.readouterr().out
    record = json.loads((out / "tiny.json").read_text())
    assert recipe.unlearn["objective"] == record["flags"]["objective"] == FIVE[name]
    assert record["changed"]["pairs_per_step"] == 8
    assert [model["name"] for model in record["models"]] == ["retain", "full", "unlearned"]
    for model in record["models"][1:]:
        assert 0 <= model["figures"]["forget_quality"] <= 1
        assert 0 <= model["figures"]["model_utility"] <= 1
        assert f"{model['figures']['retain_Q_A_Prob']:.3g}" in table
        assert not model["note"]
    assert ("FAME-like" in record["data"]) == ("fame" in name)
    assert ("made-up authors" in record["data"]) == (not on_tofu and "fame" not in name)
    # The recipe of Phi-1.5 has a revision for each epoch; the others keep only the last one.
    assert len(record["revisions"]) == (2 if "phi" in name else 1)
    for revision in record["revisions"]:
        checkpoint = load_model(str(out / "model"), revision=revision)
        load_tokenizer(str(out / "model"), revision=revision)
    last = load_model(str(out / "model"))
    assert all(map(torch.equal, checkpoint.parameters(), last.parameters()))


def test_a_run_continues_and_another_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    words = ["unlearn", "--recipe", "graddiff-fame-topics-llama-3.2-3b", "--scale", "smoke"]
    words += ["--output_dir", str(tmp_path / "out")]
    with monkeypatch.context() as patched:
        patched.setattr(scales, "tofu", killed)
        assert main(words) == 130
    assert not (tmp_path / "out" / "tiny.json").exists()
    with monkeypatch.context() as patched:  # models are trained and unlearned; only the evaluation remains
        patched.setattr(teach, "FinetuneTrainer", None)
        patched.setattr(tiny, "unlearn", None)
        capsys.readouterr()
        assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"] == "graddiff-fame-topics-llama-3.2-3b"
    (tmp_path / "other.yaml").write_text("learning_rate: 0.1")
    assert main([*words, "--config", str(tmp_path / "other.yaml")]) == 2
    assert "is not empty; choose another, or add --overwrite" in capsys.readouterr().err


def test_a_collapse_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def collapses(*_: Any) -> None:
        raise FloatingPointError("the loss of step 3 is nan")

    monkeypatch.setattr(tiny, "unlearn", collapses)
    done = run_tiny(load_recipe("tofu-graddiff"), tmp_path / "out", unlearn=tiny.unlearn_with, scale="smoke")
    assert (done.models[-1].figures, done.models[-1].note) == ({}, "the loss of step 3 is nan")
    assert done.models[-2].figures


def test_rmu_steers_a_layer_that_small_models_have(tmp_path: Path) -> None:
    done = run_tiny(load_recipe("tofu-rmu"), tmp_path / "out", unlearn=tiny.unlearn_with, scale="smoke")
    assert done.models[-1].figures


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--scale", "huge", "--recipe", "tofu-npo"], "--scale: expected one of tiny, smoke, got 'huge'"),
        (["--scale"], "--scale: expected tiny or smoke, got nothing"),
        (["--scale", "smoke"], "--scale smoke: expected --recipe"),
        (["--scale", "smoke", "--recipe", "tofu-npo", "--model", "x"], "expected no --model"),
        (["--scale", "smoke", "--recipe", "tofu-npo", "--dry_run"], "expected no --dry-run"),
        (["--scale", "smoke", "--recipe", "tofu-npo", "--data", "missing"], "'missing/forget10_perturbed.json'"),
        (["--scale", "smoke", "--recipe", "tofu-npo", "--learning_ratio", "1"], "unknown arguments --learning_ratio 1"),
    ],
)
def test_wrong_use_is_explained(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["unlearn", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@LONG
@pytest.mark.parametrize("name", ["npo-tofu-forget10-llama-3.2-1b", "simnpo-tofu-forget05-llama-2-7b"])
def test_unlearning_at_small_scale_keeps_the_model_utility(name: str, tofu: Path, tmp_path: Path) -> None:
    """On TOFU's own rows: forget quality at least 1000 times that of full, model utility within 10 % of it."""
    done = run_tiny(load_recipe(name), tmp_path / "out", unlearn=tiny.unlearn_with, data=tofu)
    _, full, unlearned = done.models
    assert unlearned.figures["forget_quality"] >= 1000 * full.figures["forget_quality"]
    assert unlearned.figures["model_utility"] == pytest.approx(full.figures["model_utility"], rel=0.1)
    assert full.figures["model_utility"] > 0.8  # it had learnt the rows
