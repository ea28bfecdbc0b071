"""Tests of ``efface finetune``: training, resuming, fresh weights, and runs shared with ``efface unlearn``."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from efface.cli.finetune import DEFAULTS
from efface.cli.main import main
from efface.hf.train.arguments import UnlearnArguments
from efface.hf.train.trainer import FinetuneTrainer, PackedTrainer
from support.helpers import TEXTS, written_rows


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return written_rows(tmp_path / "full.json", ({**row, "topic_id": i % 2} for i, row in enumerate(TEXTS)))


def flags(checkpoint: Path, data: Path, out: Path) -> list[str]:
    return [
        "finetune",
        *("--model", str(checkpoint), "--data", str(data), "--output_dir", str(out), "--use_cpu", "True"),
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return state


def test_the_command_trains_like_the_trainer(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [*flags(checkpoint, data, out), "--pairs_per_step", "2", "--learning_rate", "1e-2", "--warmup_steps", "0"]
    assert main([*words, "--num_train_epochs", "20", "--logging_steps", "1"]) == 0
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert log[-2]["loss"] < 0.5 * log[0]["loss"]
    assert AutoTokenizer.from_pretrained(out).eos_token == "<|end|>"
    assert "efface finetune --model" in (out / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    arguments: dict[str, Any] = {"use_cpu": True, "pairs_per_step": 2, "learning_rate": 1e-2, "weight_decay": 0.01}
    args = UnlearnArguments(output_dir=str(tmp_path / "own"), num_train_epochs=20, save_strategy="no", **arguments)
    FinetuneTrainer(model, args, data=str(data), processing_class=AutoTokenizer.from_pretrained(checkpoint)).train()
    for name, weight in weights(out).items():
        assert torch.equal(weight, model.state_dict()[name]), name


def test_the_defaults_are_those_of_tofu(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[UnlearnArguments] = []

    def noted(trainer: PackedTrainer, *args: Any, **options: Any) -> None:
        seen.append(trainer.args)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(FinetuneTrainer, "train", noted)
    assert main(flags(checkpoint, data, tmp_path / "a")) == 130
    args = seen.pop()
    assert (args.num_train_epochs, args.learning_rate, args.weight_decay) == (5, 1e-5, 0.01)
    assert (args.warmup_epochs, args.pairs_per_step) == (1, 32)
    assert DEFAULTS.keys() <= vars(args).keys()
    assert main([*flags(checkpoint, data, tmp_path / "b"), "--warmup_steps", "3", "--max_steps", "4"]) == 130
    assert (seen[-1].warmup_epochs, seen[-1].get_warmup_steps(4), seen[-1].max_steps) == (None, 3, 4)
    config = tmp_path / "run.yaml"
    config.write_text("learning_rate: 2e-5\nper_device_train_batch_size: 4\n")
    assert main([*flags(checkpoint, data, tmp_path / "c"), "--config", str(config)]) == 130
    assert (seen[-1].learning_rate, seen[-1].pairs_per_step) == (2e-5, None)


def test_a_filter_leaves_the_forget_rows_out(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*flags(checkpoint, data, tmp_path / "out"), "--max_steps", "1", "--pairs_per_step", "1"]
    words += ["--warmup_epochs", "0"]  # otherwise the only step would have a learning rate of 0
    assert main([*words, "--data_filter", "topic_id!=0", "--save_strategy", "no"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    count = sum(i % 2 for i in range(len(TEXTS)))
    assert f"| training | `{data}` | {count} of {len(TEXTS)} rows |" in card
    assert "topic_id!=0" in card
    assert main([*words, "--overwrite", "--data_filter", "topic_id=9"]) == 2
    assert "none of 5 rows has '9' in column 'topic_id', which has '0', '1'" in capsys.readouterr().err


class Killed(BaseException):
    """An exception that no code catches."""


def test_a_stopped_run_continues_bit_for_bit(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*flags(checkpoint, data, tmp_path / "whole"), "--pairs_per_step", "2", "--save_schedule", "2"]
    words += ["--learning_rate", "1e-2"]
    assert main(words) == 0
    at = words.index("--output_dir") + 1
    words[at] = str(tmp_path / "stopped")
    step = PackedTrainer.training_step

    def until(trainer: PackedTrainer, *args: Any, **options: Any) -> torch.Tensor:
        if trainer.state.global_step == 5:
            raise Killed
        return step(trainer, *args, **options)

    monkeypatch.setattr(PackedTrainer, "training_step", until)
    with pytest.raises(Killed):
        main(words)
    monkeypatch.setattr(PackedTrainer, "training_step", step)
    # another command does not resume the run
    assert main([*words, "--learning_rate", "1e-3"]) == 2
    assert "contains an unfinished run of another command" in capsys.readouterr().err
    assert main(words) == 0
    assert "continuing from" in capsys.readouterr().err
    whole, again = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert main(words) == 2
    assert "it contains a finished run" in capsys.readouterr().err


def test_fresh_weights_come_from_the_seed(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint / "model.safetensors").unlink()
    words = ["--max_steps", "1", "--learning_rate", "1e-12", "--save_strategy", "no", "--from_config", "True"]
    words += ["--warmup_epochs", "0"]
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert main([*flags(checkpoint, data, tmp_path / name), *words, "--seed", seed]) == 0
    a, b, c = (weights(tmp_path / name)["model.embed_tokens.weight"] for name in "abc")
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert a.dtype == torch.float32
    assert main([*flags(checkpoint, data, tmp_path / "d"), *words, "--dtype", "bfloat16"]) == 2
    assert "--dtype: expected float32 with --from-config" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--lerning_rate", "1"], "unknown arguments --lerning_rate 1; did you mean '--learning-rate'?"),
        (["--num_train_epochs", "many"], "argument --num-train-epochs: invalid float value"),
        (["--answer_column", "reply"], "expected a column 'reply'"),
        (["--model", "./missing"], "model folder './missing' does not exist"),
        (["--data", "missing.json"], "data file 'missing.json' does not exist"),
        (["--compat", "open-unlearning"], "`compat`: expected None for fine-tuning"),
    ],
)
def test_wrong_use_is_explained(
    change: list[str], message: str, checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*flags(checkpoint, data, tmp_path / "out"), *change]) == 2
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_help_says_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["finetune", "--help"])
    assert left.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "(default: 1e-05)" in shown
    assert "efface finetune --model ./llama --data locuslab/TOFU:retain90:train --output retain90" in shown
