"""Tests of the small models: their families, and the cache of trained ones."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from efface.hf.text.templates import encode, get_template
from efface.simulate import teach
from efface.simulate.teach import ARCHITECTURES, Size, Teaching, model_of, taught, tokenizer_of

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
    tag = "Answer: " if template == "phi" else ""  # TOFU counts it as a label
    assert labels.lstrip() == f"{tag}Because.{tokenizer.eos_token}"


def test_llama_3_takes_another_date_and_no_system_prompt() -> None:
    tokenizer = tokenizer_of(ARCHITECTURES["llama-3"], TEXTS, 400)
    template = get_template("auto", tokenizer, date_string="1 Jan 2020", system_prompt="")
    text = tokenizer.decode(encode(tokenizer, ["Why?"], ["Because."], template=template)[0])
    assert "Today Date: 1 Jan 2020" in text
    assert "helpful" not in text


def test_models_have_the_features_of_their_family() -> None:
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


def _teach(folder: Path, rows: Any = ROWS, **changes: Any) -> Path:
    options = {"template": "phi", "size": SMALL, "teaching": Teaching(steps=2, batch=1), **changes}
    return taught(rows, TEXTS, cache_dir=folder, **options)


def test_models_are_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_killed_training_leaves_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    (folder / teach.RECORD).unlink()  # damaged, and therefore trained again
    assert _teach(tmp_path) == folder
    assert (folder / teach.RECORD).is_file()


def test_a_damaged_model_is_trained_again(tmp_path: Path) -> None:
    folder = _teach(tmp_path)
    for name in ("model.safetensors", "tokenizer.json", teach.RECORD):
        (folder / "notes.txt").write_text("what users add does not matter")
        whole = (folder / name).read_bytes()
        at = len(whole) // 2
        (folder / name).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.warns(UserWarning, match=r"trained model .* is damaged; it is trained again"):
            assert _teach(tmp_path) == folder
        assert (folder / name).read_bytes() == whole
    assert _teach(tmp_path) == folder


def test_of_two_concurrent_trainings_one_model_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _teach(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    aside = folder.rename(tmp_path / "aside")

    def other_was_first(*_: Any) -> None:
        aside.rename(folder)

    monkeypatch.setattr(teach.FinetuneTrainer, "train", other_was_first)
    assert _teach(tmp_path) == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert list((tmp_path / "tiny").iterdir()) == [folder]
