"""The card of a model says what made it, to people and to programs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import ModelCard

import efface
from efface import NPO, UnlearnTrainer
from efface.batching import TokenStore
from efface.cli.main import main
from efface.hf.text.data import store_fingerprint
from efface.hf.train.publish import final_metrics
from efface.hf.train.record import command_line
from support.helpers import TEXTS, arguments, random_store, saved_llama, tiny_llama, written_rows


def test_the_card_of_a_command(tmp_path: Path) -> None:
    saved_llama(tmp_path / "model")
    data = written_rows(tmp_path / "rows.json", ({**row, "id": i % 2} for i, row in enumerate(TEXTS)))
    words = ["unlearn", "--model", str(tmp_path / "model"), "--forget", str(data), "--retain", str(data)]
    words += ["--output_dir", str(tmp_path / "out"), "--use_cpu", "True", "--max_steps", "2", "--logging_steps", "1"]
    words += [
        "--forget_filter",
        "id=1",
        "--retain_filter",
        "id!=1",
        "--beta",
        "0.3",
        "--save_schedule",
        "1",
        "--hub_token=hf_secret",
    ]
    assert main(words) == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    facts = card.data.to_dict()["efface"]
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert facts["objective"] == {"name": "npo", "retain_loss_type": "NLL", "beta": 0.3, "gamma": 1.0, "alpha": 1.0}
    assert (facts["base_model"], facts["revision"], facts["step"]) == (str(tmp_path / "model"), "main", 2)
    assert facts["data"]["forget"]["rows"] == 2
    assert facts["data"]["forget"]["filters"] == ["id=1"]
    assert [(one["taken"], one["available"]) for one in facts["data"].values()] == [(2, 5), (3, 5)]
    assert "| forget | " in card.text
    assert " | 2 of 5 rows | " in card.text
    assert facts["data"]["retain"]["source"] == str(data)
    assert facts["arguments"]["max_steps"] == 2
    assert facts["plan"]["seed"] == 42
    assert facts["metrics"]["forget_loss"] == state["log_history"][1]["forget_loss"]
    assert facts["versions"]["efface"] == efface.__version__
    assert facts["versions"]["transformers"] == transformers.__version__
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["command"].startswith("efface unlearn --model ")
    assert "machine-unlearning" in card.data.tags
    assert card.data.base_model is None  # a folder of ours is no name on the Hub
    for part in ("hf_secret", str(tmp_path / "out" / "checkpoint-1")):
        assert part not in card.content
    assert "| `beta` | `0.3` |" in card.text
    assert facts["command"] in card.text
    first = ModelCard.load(tmp_path / "out" / "checkpoint-1" / "README.md").data.to_dict()["efface"]
    assert first["step"] == 1
    assert first["metrics"]["loss"] == state["log_history"][0]["loss"]


def test_the_card_of_a_python_run_claims_no_command(tmp_path: Path) -> None:
    model = tiny_llama()
    model.config._name_or_path = "meta-llama/Llama-2-7b-chat-hf"
    forget, retain = random_store(4, seed=1), random_store(6, seed=2)
    args = arguments(tmp_path, max_steps=1, weight_decay=0.25)
    trainer = UnlearnTrainer(model, args, forget=forget, retain=retain, objective=NPO())
    trainer.train()
    trainer.state.log_history.append({"eval_forget_rouge": 0.25, "eval_bad": float("nan"), "step": 1})
    trainer.save_model(str(tmp_path / "model"))
    card = ModelCard.load(tmp_path / "model" / "README.md")
    facts = card.data.to_dict()["efface"]
    assert card.data.base_model == "meta-llama/Llama-2-7b-chat-hf"
    assert facts["command"] is None
    assert "## Reproduce" not in card.text
    assert facts["data"]["forget"] == {
        "source": "TokenStore in memory",
        "rows": 4,
        "fingerprint": store_fingerprint(forget),
        "filters": [],
        "hub_name": "",
        "taken": None,
        "available": None,
    }
    assert facts["arguments"]["weight_decay"] == 0.25
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("eval_forget_rouge", 0.25)
    assert facts["reference"] == "cached"


def test_metrics_are_the_last_finite_ones() -> None:
    log = [{"loss": 2.0, "eval_a": 1.0, "epoch": 1}, {"loss": 1.5, "retain_loss": 3}, {"eval_a": float("nan")}]
    assert final_metrics([*log, {"train_loss": 9.0}]) == ({"loss": 1.5, "retain_loss": 3.0}, {"eval_a": 1.0})


def test_a_data_fingerprint_is_of_the_content() -> None:
    rows = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    whole = TokenStore.from_sequences(rows, [1, 1, 2])
    parts = [TokenStore.from_sequences(rows[:1], [1]), TokenStore.from_sequences(rows[1:], [1, 2])]
    assert store_fingerprint(whole) == store_fingerprint(TokenStore([store.chunks[0] for store in parts]))
    ids, offsets, starts = whole.chunks[0]
    view = TokenStore([(ids, offsets[1:], starts[1:])])  # a slice whose first tokens belong to no sequence of it
    assert store_fingerprint(view) == store_fingerprint(parts[1])
    others = [
        TokenStore.from_sequences([[1, 2, 3], [4, 5], [6, 7, 8, 8]], [1, 1, 2]),
        TokenStore.from_sequences(rows, [1, 1, 1]),
        TokenStore.from_sequences(rows[::-1], [2, 1, 1]),
        TokenStore.from_sequences([[1, 2, 3, 4], [5, 6], [7, 8, 9]], [1, 1, 2]),
        TokenStore.empty(),
    ]
    assert len({store_fingerprint(store) for store in [whole, *others]}) == 6
    assert np.array_equal(whole[1], [4, 5])


@pytest.mark.parametrize("words", [["--hub_token", "hf_x"], ["--hub-token=hf_x"], ["--push_to_hub_token", "hf_x"]])
def test_a_command_line_has_no_secrets(words: list[str]) -> None:
    line = command_line([*words, "--forget_filter", "a b=1"])
    assert "hf_x" not in line
    assert line.endswith("--forget_filter 'a b=1'")
