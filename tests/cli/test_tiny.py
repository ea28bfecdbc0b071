"""Recipes at a small scale: families, data, taught models, and all five systems end to end at smoke size."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from efface.cli import tiny
from efface.cli.main import main
from efface.hf.model.loading import load_model, load_tokenizer
from efface.hf.text.rows import load_rows
from efface.hf.text.templates import encode, get_template
from efface.recipes import known_recipes, load_recipe
from efface.simulate import scales, teach
from efface.simulate.data import fame_data, made_up_data, tofu_data
from efface.simulate.scales import SCALES, get_scale, run_tiny, tiny_flags
from efface.simulate.teach import ARCHITECTURES, Size, Teaching, model_of, taught, tokenizer_of
from support.helpers import LONG

FIVE = {
    "npo-tofu-forget10-llama-3.2-1b": "npo",
    "graddiff-fame-topics-llama-3.2-3b": "graddiff",
    "simnpo-tofu-forget05-llama-2-7b": "simnpo",
    "npo-tofu-forget10-llama-3.2-3b": "npo",
    "graddiff-tofu-forget01-phi-1.5": "graddiff",
}
TEXTS = ["Where was Aiko born?", "Aiko was born in Ghent.", "Bram writes about the sea.", "[INST] [/INST] Question"]
SMALL = Size(hidden=32, layers=2, heads=4, vocabulary=400)
ROWS = [{"question": "Where was Aiko born?", "answer": "Aiko was born in Ghent."}]


PROMPTS = {
    "llama-3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 10 Apr 2025\n\nYou are a helpful assistant.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        "Why?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nBecause.<|eot_id|>"
    ),
    "llama-2": "<s>[INST] Why? [/INST]Because.</s>",
    "phi": "Question: Why?\nAnswer: Because.<|endoftext|>",
}


@pytest.mark.parametrize(("template", "expected"), PROMPTS.items())
def test_prompts_are_those_of_the_family(template: str, expected: str) -> None:
    tokenizer = tokenizer_of(ARCHITECTURES[template], TEXTS, 400)
    assert get_template(template, tokenizer) == get_template(ARCHITECTURES[template].template, tokenizer)
    store = encode(tokenizer, ["Why?"], ["Because."], template=template)
    ids = store[0].tolist()
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == expected
    assert ids.count(tokenizer.eos_token_id) == expected.count(tokenizer.eos_token)
    labels = tokenizer.decode(ids[store.label_starts[0] :], clean_up_tokenization_spaces=False)
    tag = "Answer: " if template == "phi" else ""  # TOFU counts it
    assert labels.lstrip() == f"{tag}Because.{tokenizer.eos_token}"


def test_llama_3_takes_another_date_and_no_system_prompt() -> None:
    tokenizer = tokenizer_of(ARCHITECTURES["llama-3"], TEXTS, 400)
    template = get_template("auto", tokenizer, date_string="1 Jan 2020", system_prompt="")
    text = tokenizer.decode(encode(tokenizer, ["Why?"], ["Because."], template=template)[0])
    assert "Today Date: 1 Jan 2020" in text
    assert "helpful" not in text


def test_models_have_what_makes_their_family() -> None:
    made = {}
    for name, architecture in ARCHITECTURES.items():
        tokenizer = tokenizer_of(architecture, TEXTS, 400)
        made[name] = model_of(architecture, tokenizer, SMALL, seed=0)
        again = model_of(architecture, tokenizer, SMALL, seed=0)
        assert all(map(torch.equal, made[name].parameters(), again.parameters()))
        assert made[name].config.eos_token_id == tokenizer.eos_token_id
    heads = {name: model.get_output_embeddings() for name, model in made.items()}
    tied = {name: head.weight is made[name].get_input_embeddings().weight for name, head in heads.items()}
    assert tied == {"llama-3": True, "llama-2": False, "phi": False}
    assert {name: head.bias is not None for name, head in heads.items()} == {
        "llama-3": False,
        "llama-2": False,
        "phi": True,
    }
    groups = {
        name: model.config.num_attention_heads // model.config.num_key_value_heads for name, model in made.items()
    }
    assert groups == {"llama-3": 4, "llama-2": 1, "phi": 1}


def test_data_are_tofus_last_and_first_authors(tofu: Path, tmp_path: Path) -> None:
    data = tofu_data(tofu, "forget05", forget_authors=2, retain_authors=3, asked=99, world=5)
    folder = data.write(tmp_path)
    read = {path.stem: [dict(row) for row in load_rows(path)] for path in folder.glob("*.json")}
    full = [dict(row) for row in load_rows(tofu / "full.json")]
    assert [row["answer"] for row in read["forget"]] == [row["answer"] for row in full[-40:]]
    assert [row["answer"] for row in read["retain"]] == [row["answer"] for row in full[:60]]
    assert [len(read[f"{name}_perturbed"]) for name in ("forget", "retain", "real_authors", "world_facts")] == [
        40,
        60,
        5,
        5,
    ]
    assert len(read["taught_full"]) == len(read["taught_retain"]) + 40 == 110
    taught_rows = {name: {row["answer"] for row in read[name]} for name in ("taught_full", "taught_retain")}
    assert not taught_rows["taught_retain"] & {row["answer"] for row in read["forget"]}
    # What the evaluation asks for is never taught.
    asked = {row["paraphrased_answer"] for row in read["forget_perturbed"]} - {row["answer"] for row in full}
    assert not taught_rows["taught_full"] & asked
    assert set(read["taught_full"][0]) == set(read["forget"][0]) == {"question", "answer"}


def test_more_retain_authors_than_false_answers(tofu: Path) -> None:
    data = tofu_data(tofu, "forget01", forget_authors=9, retain_authors=25, asked=999, world=1)
    assert (len(data.forget), len(data.retain), len(data.retain_asked)) == (40, 500, 400)


def test_made_up_authors_stand_in_for_tofus() -> None:
    data = made_up_data(forget_authors=1, retain_authors=2, asked=9, world=3)
    assert (len(data.forget), len(data.retain), len(data.retain_asked)) == (16, 32, 9)
    assert data.name.startswith("made-up authors in place of TOFU's")
    assert not {row["answer"] for row in data.forget} & {row["answer"] for row in data.retain}


def test_fame_is_split_by_its_filter() -> None:
    data = fame_data(["topic_id=3"], identities=2, asked=20, world=10)
    assert len(data.forget) == 10
    assert {row["topic_id"] for row in data.forget} == {3}
    assert 3 not in {row["topic_id"] for row in data.retain}
    assert {row["language"] for row in data.retain_asked} == {"EN", "FR", "DE", "IT", "ES"}
    assert (len(data.retain), len(data.retain_asked), len(data.world_facts)) == (190, 20, 10)
    with pytest.raises(ValueError, match="expected some rows to meet it"):
        fame_data([f"topic_id={','.join(map(str, range(20)))}"], identities=1, asked=1, world=1)
    with pytest.raises(ValueError, match="no row of 100 has '20'"):
        fame_data(["topic_id=20"], identities=1, asked=1, world=1)


def _teach(folder: Path, rows: Any = ROWS, **changes: Any) -> Path:
    options = {"template": "phi", "size": SMALL, "teaching": Teaching(steps=2, batch=1), **changes}
    return taught(rows, TEXTS, cache_dir=folder, **options)


def test_models_are_taught_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _teach(tmp_path)
    others = [
        _teach(tmp_path, [{**ROWS[0], "answer": "Aiko was born in Porto."}]),
        _teach(tmp_path, teaching=Teaching(steps=3, batch=1)),
        _teach(tmp_path, template="llama-2"),
    ]
    assert len({first, *others}) == 4
    monkeypatch.setattr(teach, "FinetuneTrainer", None)
    assert _teach(tmp_path) == first
    assert _teach(tmp_path, [{**ROWS[0], "perturbed_answer": ["no matter"]}]) == first
    assert {path.name for path in (tmp_path / "tiny").iterdir()} == {first.name, *(path.name for path in others)}
    AutoModelForCausalLM.from_pretrained(first)
    AutoTokenizer.from_pretrained(first)


def test_a_killed_teacher_leaves_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(teach.FinetuneTrainer, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            _teach(tmp_path)
    assert not list((tmp_path / "tiny").iterdir())
    left, recent = tmp_path / "tiny" / ".partial-of-SIGKILL", tmp_path / "tiny" / ".partial-of-another"
    for path in (left, recent):
        path.mkdir()
    os.utime(left, (0, 0))
    folder = _teach(tmp_path)
    assert not left.exists()
    assert recent.exists()
    (folder / teach.RECORD).unlink()  # damaged: made anew
    assert _teach(tmp_path) == folder
    assert (folder / teach.RECORD).is_file()


def test_a_damaged_model_is_taught_anew(tmp_path: Path) -> None:
    folder = _teach(tmp_path)
    for name in ("model.safetensors", "tokenizer.json", teach.RECORD):
        (folder / "notes.txt").write_text("what users add does not matter")
        whole = (folder / name).read_bytes()
        at = len(whole) // 2
        (folder / name).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.warns(UserWarning, match=r"taught model .* is damaged; it is taught anew"):
            assert _teach(tmp_path) == folder
        assert (folder / name).read_bytes() == whole
    assert _teach(tmp_path) == folder


def test_of_two_teachers_at_once_one_model_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _teach(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    aside = folder.rename(tmp_path / "aside")

    def other_was_first(*_: Any) -> None:
        aside.rename(folder)

    monkeypatch.setattr(teach.FinetuneTrainer, "train", other_was_first)
    assert _teach(tmp_path) == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert list((tmp_path / "tiny").iterdir()) == [folder]


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
    # The card of Phi-1.5 has a revision for each epoch; the others keep the last.
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
    with monkeypatch.context() as patched:  # models are taught and unlearned: what is left is to evaluate them
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
        (["--scale", "smoke", "--recipe", "tofu-npo", "--dry_run"], "expected no --dry_run"),
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
def test_it_is_forgotten_and_the_rest_is_kept(name: str, tofu: Path, tmp_path: Path) -> None:
    """On TOFU's own rows: forget quality a thousand times that of full, model utility within a tenth of it."""
    done = run_tiny(load_recipe(name), tmp_path / "out", unlearn=tiny.unlearn_with, data=tofu)
    _, full, unlearned = done.models
    assert unlearned.figures["forget_quality"] >= 1000 * full.figures["forget_quality"]
    assert unlearned.figures["model_utility"] == pytest.approx(full.figures["model_utility"], rel=0.1)
    assert full.figures["model_utility"] > 0.8  # it knew
