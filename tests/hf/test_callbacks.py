"""Tests of evaluation during a run: no side effects, keeping the best model, early stopping, resuming."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from efface import NPO, UnlearnTrainer
from efface.files import move_whole
from efface.hf.model.lora import add_lora
from efface.hf.train.callbacks import EvaluateCallback, KeepBest, StopUnder
from support.helpers import arguments, padded, random_store, tiny_llama
from support.padded_loop import Losses, batch_nll, exact_losses

FORGET, RETAIN = random_store(12, seed=1), random_store(20, seed=2)


class Script:
    """An evaluation that returns given metrics and records the weights that it saw."""

    def __init__(self, *figures: dict[str, float]) -> None:
        self.figures = list(figures)
        self.models: list[dict[str, torch.Tensor]] = []

    def __call__(self, model: Any) -> dict[str, float]:
        assert not model.training
        assert not torch.is_grad_enabled()
        self.models.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return self.figures[len(self.models) - 1]


def trainer_of(folder: Path, *callbacks: Any, model: Any = None, **settings: Any) -> UnlearnTrainer:
    return UnlearnTrainer(
        tiny_llama() if model is None else model,
        arguments(folder, **{"max_steps": 6, **settings}),
        forget=FORGET,
        retain=RETAIN,
        objective=NPO(),
        callbacks=list(callbacks),
    )


def quality(*values: float) -> list[dict[str, float]]:
    return [{"forget_quality": value} for value in values]


def test_an_evaluation_does_not_change_the_run(tmp_path: Path) -> None:
    """The evaluation draws from all generators and leaves the model in training mode; one layer is in eval mode."""

    def evaluate(model: Any) -> dict[str, float]:
        draws = random.random() + float(np.random.rand()) + torch.rand(()).item()  # noqa: NPY002 - the shared generator
        with torch.no_grad():
            loss = batch_nll(model, padded(RETAIN, [0, 1])).mean().item()
        model.train()  # as a careless evaluation leaves it
        return {"eval_loss": loss, "draws": draws}

    def start() -> Any:
        torch.manual_seed(3)
        model = add_lora(tiny_llama(attention_dropout=0.2), r=4, dropout=0.3)
        model.base_model.model.model.layers[0].eval()
        return model

    runs = []
    for callbacks in ([], [EvaluateCallback(evaluate, 2, on_start=True)], [EvaluateCallback(evaluate)]):
        logged = Losses()
        trainer = trainer_of(tmp_path, *callbacks, logged, model=start(), logging_steps=3)
        losses = exact_losses(trainer)
        trainer.train()
        runs.append(
            (losses, trainer.model.state_dict(), random.random(), [log for log in logged.logs if "loss" in log])
        )
        assert sum("draws" in log for log in logged.logs) == (4, 2)[len(runs) - 2] if callbacks else True
    for losses, weights, draw, logs in runs[1:]:
        assert losses == runs[0][0]
        assert all(torch.equal(weights[name], tensor) for name, tensor in runs[0][1].items())
        assert draw == runs[0][2]
        # an evaluation does not lose a logged loss
        assert [log["loss"] for log in logs] == [log["loss"] for log in runs[0][3]]


def test_the_schedule(tmp_path: Path) -> None:
    """12 rows in steps of 4 pairs: 3 steps per epoch."""
    for every, on_start, steps in (("epoch", False, [3, 6]), (2, True, [0, 2, 4, 6]), (5, False, [5])):
        script = Script(*quality(*range(9)))
        trainer = trainer_of(tmp_path, EvaluateCallback(script, every, on_start=on_start))
        trainer.train()
        logs = [log for log in trainer.state.log_history if "forget_quality" in log]
        assert [log["step"] for log in logs] == steps
    for wrong in (0, "step", 1.5):
        with pytest.raises(ValueError, match="`every`: expected 'epoch' or a number of steps"):
            EvaluateCallback(Script(), wrong)  # type: ignore[arg-type]


def test_a_figure_may_not_be_called_loss(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no metric called 'loss'"):
        trainer_of(tmp_path, EvaluateCallback(Script({"loss": 1.0}), 1)).train()


def kept(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return model.state_dict(), json.loads((folder / "best.json").read_text())


def test_the_best_model_above_the_floor_is_kept(tmp_path: Path) -> None:
    figures = [
        {"forget_quality": quality, "model_utility": utility}
        for quality, utility in [(0.1, 0.6), (0.9, 0.4), (0.5, 0.55), (0.5, 0.9), (float("nan"), 0.9), (0.3, 0.9)]
    ]
    script = Script(*figures)
    keep = KeepBest("forget_quality", ("model_utility", 0.5))
    trainer_of(tmp_path, EvaluateCallback(script, 1), keep).train()
    weights, record = kept(tmp_path / "best")
    assert record["step"] == keep.best_step == 3
    assert record["figures"]["forget_quality"] == keep.best == 0.5
    assert all(torch.equal(weights[name], tensor) for name, tensor in script.models[2].items())
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "efface-cache") == ["best"]


def test_less_may_be_better_and_the_folder_another(tmp_path: Path) -> None:
    keep = KeepBest("forget_quality", greater_is_better=False, folder=str(tmp_path / "kept" / "model"))
    trainer_of(tmp_path / "run", EvaluateCallback(Script(*quality(3, 1, 2, 1, 0.5, 9)), 1), keep).train()
    assert kept(tmp_path / "kept" / "model")[1]["step"] == 5
    assert not (tmp_path / "run" / "best").exists()


def test_a_floor_without_its_figure_is_an_error(tmp_path: Path) -> None:
    callbacks = EvaluateCallback(Script(*quality(1)), 1), KeepBest("forget_quality", ("model_utility", 0.5))
    with pytest.raises(
        ValueError, match="expected the metric 'model_utility' of `floor` together with 'forget_quality'"
    ):
        trainer_of(tmp_path, *callbacks).train()


@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_run_remembers_the_best(restore: bool, tmp_path: Path) -> None:
    first = trainer_of(
        tmp_path,
        EvaluateCallback(Script(*quality(0.2, 0.8, 0.4)), 1),
        KeepBest("forget_quality"),
        KeepBest("forget_quality", greater_is_better=False, folder=str(tmp_path / "least")),
        save_strategy="steps",
        save_steps=3,
        max_steps=3,
    )
    first.train()
    assert kept(tmp_path / "best")[1]["step"] == 2
    for figures, step in (((0.6, 0.7, 0.75), 2), ((0.6, 0.7, 0.9), 6)):
        trainer_of(
            tmp_path,
            EvaluateCallback(Script(*quality(*figures)), 1),
            KeepBest("forget_quality"),
            restore_callback_states_from_checkpoint=restore,
        ).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert kept(tmp_path / "best")[1]["step"] == step


def test_a_run_that_falls_under_the_floor_stops(tmp_path: Path) -> None:
    for values, last in (((0.9, 0.5, 0.49, 0.9, 0.9, 0.9), 3), ((0.9, float("nan")), 2)):
        script = Script(*({"model_utility": value} for value in values))
        trainer = trainer_of(tmp_path, EvaluateCallback(script, 1), StopUnder("model_utility", 0.5))
        trainer.train()
        assert trainer.state.global_step == last


def test_an_evaluation_without_a_trainer_of_ours_says_so() -> None:
    with pytest.raises(ValueError, match="EvaluateCallback: expected a trainer, got none"):
        EvaluateCallback(Script(), 1)._run(None)  # type: ignore[arg-type]


def test_a_callback_added_later_works_too(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, max_steps=1)
    script = Script(*quality(1))
    trainer.add_callback(EvaluateCallback(script, 1))
    trainer.train()
    assert len(script.models) == 1


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best, new = tmp_path / "best", tmp_path / "new"
    for folder, name in ((best, "a"), (new, "b")):
        folder.mkdir()
        (folder / name).write_text(name)
    move_whole(new, best)
    assert [path.name for path in best.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir() if path.name != "efface-cache"] == ["best"]


def test_a_save_that_fails_leaves_the_best_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(tmp_path, EvaluateCallback(Script(*quality(1, 2)), 1), KeepBest("forget_quality"), max_steps=2)
    save, calls = trainer.save_model, []

    def failing(folder: str, _internal_call: bool = False) -> None:
        calls.append(folder)
        save(folder, _internal_call=_internal_call)
        if len(calls) == 2:
            raise OSError("disk full")

    monkeypatch.setattr(trainer, "save_model", failing)
    with pytest.raises(OSError, match="disk full"):
        trainer.train()
    assert kept(tmp_path / "best")[1]["step"] == 1
    assert not list(tmp_path.glob(".best*"))
