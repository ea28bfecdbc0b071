"""Alternate answers: refusals from a file, a column, or given; and what objectives do with them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from efface import DPO, NPO, IdkNLL, UnlearnTrainer
from efface.batching import Role
from efface.cli.main import main
from efface.hf.text.data import Refusals, token_store
from support.helpers import TEXTS, arguments, random_store, tiny_llama, tiny_tokenizer

LINES = ("I don't know.", "I cannot say.", "That is not something that I was told.")


@pytest.fixture
def refusals(tmp_path: Path) -> Path:
    file = tmp_path / "idk.txt"
    file.write_text("\n".join([*LINES, "", ""]), encoding="utf-8")
    return file


def test_every_row_gets_a_refusal_of_its_own_whatever_other_rows_there_are(refusals: Path) -> None:
    drawn = Refusals.read(refusals, seed=3)
    assert drawn.lines == LINES
    answers = drawn.answers(range(300))
    assert answers[7] == drawn.answers([7])[0] == drawn.answers([250, 7])[1]
    counts = [answers.count(line) for line in LINES]
    assert min(counts) > 70  # of 100 expected each: five standard deviations of 8
    assert answers != Refusals.read(refusals, seed=4).answers(range(300))


def test_refusals_take_the_place_of_the_answers(refusals: Path) -> None:
    tokenizer, drawn = tiny_tokenizer(), Refusals.read(refusals)
    store = token_store(TEXTS, tokenizer, name="forget", refusals=drawn, template="question-answer")
    rows = [{**row, "answer": answer} for row, answer in zip(TEXTS, drawn.answers(range(len(TEXTS))), strict=True)]
    expected = token_store(rows, tokenizer, name="forget", template="question-answer")
    assert [store[i].tolist() for i in range(len(store))] == [expected[i].tolist() for i in range(len(store))]


def test_a_pair_shares_a_micro_batch_on_every_budget(tmp_path: Path) -> None:
    trainer = UnlearnTrainer(
        tiny_llama(),
        arguments(tmp_path, pairs_per_step=6, token_budget=50),
        forget=random_store(12, seed=1),
        retain=random_store(9, seed=2),
        alternate=random_store(12, seed=3),
        objective=DPO(),
    )
    for step in trainer.get_train_dataloader():
        for batch in step.batches:
            roles, sequences = batch.roles.numpy(), batch.sequences.numpy()
            forget = np.flatnonzero(roles == Role.FORGET)
            assert (roles[forget + 1] == Role.ALTERNATE).all()
            assert (sequences[forget + 1] == sequences[forget]).all()


@pytest.mark.parametrize("objective", [DPO(), IdkNLL()], ids=lambda o: o.name)
@pytest.mark.parametrize("source", ["file", "column", "rows"])
def test_each_source_trains(objective: Any, source: str, refusals: Path, tmp_path: Path) -> None:
    rows = [{**row, "other": "Nobody knows."} for row in TEXTS[:3]]
    changes = {"file": {"refusal_file": str(refusals)}, "column": {"alternate_column": "other"}, "rows": {}}[source]
    trainer = UnlearnTrainer(
        tiny_llama(vocab_size=300),
        arguments(tmp_path / "run", num_train_epochs=12, learning_rate=3e-3, **changes),
        forget=rows,
        retain=TEXTS[3:],
        alternate=[{**row, "answer": "Nobody knows."} for row in rows] if source == "rows" else None,
        objective=objective,
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    losses = [log["forget_loss"] for log in trainer.state.log_history if "forget_loss" in log]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({}, {}, r"'dpo' trains other answers to the forget questions, got none; set --refusal_file"),
        ({}, {"refusal_file": "missing.txt"}, r"refusal file 'missing.txt' does not exist"),
        ({}, {"refusal_file": "EMPTY"}, r"expected an answer a line, got no text"),
        ({}, {"alternate_column": "reply"}, r"expected a column 'reply'"),
        ({}, {"refusal_file": "FILE", "alternate_column": "answer"}, r"`refusal_file` or `alternate_column`, got both"),
        ({"alternate": random_store(2, vocabulary=90)}, {}, r"`alternate`: expected 3 sequences, .* got 2"),
        ({"alternate": random_store(3, vocabulary=900)}, {}, r"`alternate`: expected token ids in 0 .. 299"),
        ({"forget": random_store(3)}, {"refusal_file": "FILE"}, r"or give `alternate`"),
    ],
)
def test_bad_alternates_are_refused(
    change: dict[str, Any], settings: dict[str, Any], message: str, refusals: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty.txt").write_text(" \n\n")
    names = {"FILE": str(refusals), "EMPTY": str(tmp_path / "empty.txt")}
    settings = {name: names.get(value, value) for name, value in settings.items()}
    options: dict[str, Any] = {"forget": TEXTS[:3], "retain": TEXTS[3:], "processing_class": tiny_tokenizer()}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        UnlearnTrainer(
            tiny_llama(vocab_size=300),
            arguments(tmp_path / "run", **settings),
            objective=DPO(),
            **{**options, **change},
        )


def test_an_objective_without_alternates_ignores_their_settings(refusals: Path, tmp_path: Path) -> None:
    trainer = UnlearnTrainer(
        tiny_llama(vocab_size=300),
        arguments(tmp_path, refusal_file=str(refusals)),
        forget=TEXTS[:3],
        retain=TEXTS[3:],
        objective=NPO(),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()


def test_the_command_line_takes_every_objective(
    refusals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    checkpoint = tmp_path / "model"
    tiny_llama(vocab_size=300).save_pretrained(checkpoint)
    tiny_tokenizer().save_pretrained(checkpoint)
    for name, rows in (("forget", TEXTS[:3]), ("retain", TEXTS[3:])):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    flags = ["unlearn", "--model", str(checkpoint), "--use_cpu", "--max_steps", "1", "--save_strategy", "no"]
    flags += [word for name in ("forget", "retain") for word in (f"--{name}", str(tmp_path / f"{name}.json"))]
    runs = {
        "dpo": ["--refusal_file", str(refusals), "--beta", "0.2"],
        "idk_nll": ["--refusal_file", str(refusals)],
        "npo": ["--retain_loss_type", "KL", "--reference", "live"],
        "satimp": ["--objective_options", "beta1=2.0", "beta2=0.5"],
        "rmu": ["--objective_options", r"module_regex=model\.layers\.0", "trainable_params_regex=['.*mlp.*']"],
        "wga": ["--compat", "open-unlearning"],
    }
    for name, options in runs.items():
        out = tmp_path / name
        assert main([*flags, "--objective", name, "--output_dir", str(out), *options]) == 0, name
        assert (out / "model.safetensors").is_file()
    assert main([*flags, "--output_dir", str(tmp_path / "bad"), "--objective_options", "beta"]) == 2
    assert "--objective-options: expected name=value, got 'beta'" in capsys.readouterr().err
