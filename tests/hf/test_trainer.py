"""Tests of the trainer: against a padded two-forward loop with open-unlearning's formulas, and as a Trainer."""

import copy
import functools
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, TrainerCallback

from efface import NPO, FinetuneTrainer, GradAscent, GradDiff, Objective, SimNPO, UnlearnTrainer
from support.helpers import TEXTS, arguments, padded, random_store, tiny_llama, tiny_tokenizer
from support.padded_loop import Losses, batch_nll, eager_curve, exact_losses

OBJECTIVES = (NPO(beta=0.1, alpha=1.0), SimNPO(beta=0.3), GradDiff(gamma=0.2))


@functools.cache
def padded_losses(name: str) -> list[float]:
    """The losses of fifty steps of the padded loop, whose frozen model is either kind of reference."""
    (objective,) = [each for each in OBJECTIVES if each.name == name]
    sets = random_store(20, seed=1), random_store(50, seed=2)
    return eager_curve(objective, tiny_llama(), *sets, steps=50, lr=1e-3)


@pytest.mark.parametrize("reference", ["live", "cached"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.name)
def test_fifty_steps_follow_the_padded_two_forward_loop(objective: Objective, reference: str, tmp_path: Path) -> None:
    forget, retain = random_store(20, seed=1), random_store(50, seed=2)
    model = tiny_llama()
    settings = {"max_steps": 50, "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_grad_norm": 1.0, "seed": 0}
    trainer = UnlearnTrainer(
        model,
        arguments(tmp_path, optim="adamw_torch", **settings),
        forget=forget,
        retain=retain,
        objective=objective,
        reference=reference,
    )
    ours = exact_losses(trainer)
    trainer.train()
    expected = padded_losses(objective.name)
    assert len(ours) == 50
    scale = max(abs(value) for value in expected)
    assert max(expected) - min(expected) > 0.05 * scale  # the curve must move for the comparison to mean anything
    for got, want in zip(ours, expected, strict=True):
        assert got == pytest.approx(want, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("objective", [*OBJECTIVES, GradAscent()], ids=lambda o: o.name)
def test_the_same_seed_gives_the_same_bits(objective: Objective, tmp_path: Path) -> None:
    curves, weights = [], []
    for _ in range(2):
        model = tiny_llama()
        trainer = UnlearnTrainer(
            model,
            arguments(tmp_path, num_train_epochs=2, learning_rate=1e-4),
            forget=random_store(10, seed=1),
            retain=random_store(30, seed=2),
            objective=objective,
        )
        curves.append(exact_losses(trainer))
        trainer.train()
        weights.append(model.state_dict())
    assert curves[0] == curves[1]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("reference", ["live", "cached"])
def test_the_token_budget_does_not_change_a_step(reference: str, tmp_path: Path) -> None:
    """8 pairs in one forward pass, or in many with only forget or only retain sequences, give the same weights."""
    forget, retain = random_store(20, seed=1), random_store(50, seed=2)
    results = []
    for budget in (4096, 40, 20):
        model = tiny_llama()
        logged = Losses()
        UnlearnTrainer(
            model,
            arguments(
                tmp_path, pairs_per_step=8, token_budget=budget, optim="sgd", lr_scheduler_type="constant", seed=5
            ),
            forget=forget,
            retain=retain,
            objective=NPO(),
            reference=reference,
            callbacks=[logged],
        ).train()
        assert len(logged.losses) == 3
        results.append((model.state_dict(), logged.losses))
    for weights, losses in results[1:]:
        for name, tensor in results[0][0].items():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-5, atol=1e-7)
        assert losses == pytest.approx(results[0][1], rel=1e-3)


def test_pairs_per_step_defaults_to_the_trainers_own_arguments(tmp_path: Path) -> None:
    for settings, steps in (
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, 3),
        ({"per_device_train_batch_size": 2, "pairs_per_step": 5}, 4),
        ({"pairs_per_step": 8, "dataloader_drop_last": True}, 2),
    ):
        args = arguments(tmp_path, **settings)
        trainer = UnlearnTrainer(
            tiny_llama(), args, forget=random_store(20, seed=1), retain=random_store(9, seed=2), objective=SimNPO()
        )
        trainer.train()
        assert trainer.state.global_step == steps
        # the caller's arguments are unchanged
        assert args.gradient_accumulation_steps == settings.get("gradient_accumulation_steps", 1)


def test_what_is_logged(tmp_path: Path) -> None:
    logged = Losses()
    objective = NPO(alpha=2.0, gamma=0.5)
    UnlearnTrainer(
        tiny_llama(),
        arguments(tmp_path, logging_steps=2),
        forget=random_store(16, seed=1),
        retain=random_store(20, seed=2),
        objective=objective,
        callbacks=[logged],
    ).train()
    steps = [log for log in logged.logs if "loss" in log]
    assert len(steps) == 2
    for log in steps:
        assert log["tokens_per_second"] > 0
        total = objective.gamma * log["forget_loss"] + objective.alpha * log["retain_loss"]
        assert log["loss"] == pytest.approx(total, rel=1e-3)


def test_at_the_start_npo_is_two_over_beta_log_two(tmp_path: Path) -> None:
    """policy = reference, so σ(0) = 1/2."""
    trainer = UnlearnTrainer(
        tiny_llama(),
        arguments(tmp_path, max_steps=1),
        forget=random_store(8, seed=1),
        retain=None,
        objective=NPO(beta=0.1, alpha=0.0),
    )
    losses = exact_losses(trainer)
    trainer.train()
    assert losses[0] == pytest.approx(20 * torch.log(torch.tensor(2.0)).item(), rel=1e-5)


def test_the_saved_model_loads_and_is_an_ordinary_one(tmp_path: Path) -> None:
    model = tiny_llama(vocab_size=300)
    tokenizer = tiny_tokenizer()
    trainer = UnlearnTrainer(
        model,
        arguments(tmp_path, max_steps=2),
        forget=TEXTS[:2],
        retain=TEXTS[2:],
        objective=SimNPO(),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(loaded).__mro__[0].__name__ == "LlamaForCausalLM"
    assert type(loaded.lm_head) is torch.nn.Linear
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_resuming_from_a_checkpoint_continues_the_curve(tmp_path: Path) -> None:
    def trainer(folder: str, **changes: Any) -> tuple[UnlearnTrainer, list[float]]:
        made = UnlearnTrainer(
            tiny_llama(),
            arguments(tmp_path / folder, max_steps=8, **changes),
            forget=random_store(10, seed=1),
            retain=random_store(20, seed=2),
            objective=SimNPO(),
        )
        return made, exact_losses(made)

    whole, expected = trainer("whole", save_strategy="steps", save_steps=4)
    whole.train()
    resumed, losses = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert losses == expected[4:]


@pytest.mark.parametrize("reference", ["live", "cached"])
def test_under_bf16_autocast_the_log_ratio_starts_at_zero(reference: str, tmp_path: Path) -> None:
    """The reference is scored in the precision of the policy. In fp32 it would differ by bf16's rounding."""
    logged = Losses()
    UnlearnTrainer(
        tiny_llama(),
        arguments(tmp_path, bf16=True, num_train_epochs=3),
        forget=random_store(8, seed=1),
        retain=random_store(8, seed=2),
        objective=NPO(beta=0.1),
        reference=reference,
        callbacks=[logged],
    ).train()
    assert logged.logs[0]["forget_loss"] == pytest.approx(20 * 0.693147, rel=2e-4)


def test_gradient_checkpointing_gives_the_same_losses(tmp_path: Path) -> None:
    curves = []
    for checkpointing in (False, True):
        trainer = UnlearnTrainer(
            tiny_llama(),
            arguments(tmp_path, gradient_checkpointing=checkpointing, num_train_epochs=2),
            forget=random_store(8, seed=1),
            retain=random_store(8, seed=2),
            objective=NPO(),
        )
        curves.append(exact_losses(trainer))
        trainer.train()
    assert curves[0] == pytest.approx(curves[1], rel=1e-6)


def test_finetuning_is_the_mean_token_loss(tmp_path: Path) -> None:
    store = random_store(12, seed=3)
    model = tiny_llama()
    expected = batch_nll(model, padded(store, list(range(12)))).sum() / int(store.label_counts.sum())
    trainer = FinetuneTrainer(model, arguments(tmp_path, per_device_train_batch_size=12, max_steps=30), data=store)
    losses = exact_losses(trainer)
    trainer.train()
    assert losses[0] == pytest.approx(expected.item(), rel=1e-5)
    assert losses[-1] < 0.9 * losses[0]


def test_a_separate_reference_model_is_used_and_left_alone(tmp_path: Path) -> None:
    other = tiny_llama(seed=7)
    before = copy.deepcopy(other.state_dict())
    forget = random_store(8, seed=1)
    curves = []
    for reference in ("cached", "live"):
        trainer = UnlearnTrainer(
            tiny_llama(),
            arguments(tmp_path),
            forget=forget,
            retain=random_store(8, seed=2),
            objective=NPO(),
            reference=reference,
            reference_model=other,
        )
        curves.append(exact_losses(trainer))
        trainer.train()
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())


def test_a_loss_that_is_not_finite_stops_the_run_with_its_step(tmp_path: Path) -> None:
    model = tiny_llama()
    trainer = UnlearnTrainer(
        model,
        arguments(tmp_path, num_train_epochs=4, save_strategy="steps", save_steps=1),
        forget=random_store(8, seed=1),
        retain=random_store(8, seed=2),
        objective=GradDiff(),
    )

    class Poison(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                model.model.norm.weight.data.fill_(float("nan"))

    trainer.add_callback(Poison())
    with pytest.raises(FloatingPointError, match=r"not finite at step 3.*lower --learning-rate"):
        trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"forget": []}, "the forget set is empty"),
        ({"retain": None}, "`retain`: expected a retain set"),
        ({"retain": []}, "the retain set is empty"),
        ({"reference": "remembered"}, "`reference`: expected one of 'auto', 'cached', 'live'"),
        ({"forget": random_store(3, vocabulary=500)}, r"`forget`: expected token ids in 0 .. 299 .*tokenizer"),
        ({"forget": random_store(3, low=70, high=80)}, "at most 64 tokens"),
        ({"forget": TEXTS, "processing_class": None}, "expected a tokenizer for text"),
        ({"forget": [{"question": "Who?"}]}, "forget data: expected a column 'answer', got 'question'"),
        ({"forget": [{"question": "Who?", "answer": "  "}]}, "row 0: expected an answer"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "forget": TEXTS[:2],
        "retain": TEXTS[2:],
        "objective": NPO(),
        "processing_class": tiny_tokenizer(),
    }
    with pytest.raises(ValueError, match=message):
        UnlearnTrainer(tiny_llama(vocab_size=300), arguments(tmp_path), **{**options, **change})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.json' does not exist"):
        UnlearnTrainer(
            tiny_llama(vocab_size=300),
            arguments(tmp_path),
            forget=str(tmp_path / "missing.json"),
            retain=TEXTS,
            objective=NPO(),
            processing_class=tiny_tokenizer(),
        )


def test_an_evaluation_set_is_evaluated_as_transformers_does(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in ([3, 4, 5, 6], [7, 8, 9, 10])])
    model = tiny_llama()
    options = arguments(tmp_path, per_device_eval_batch_size=2)
    expected = transformers.Trainer(copy.deepcopy(model), options, eval_dataset=rows).evaluate()["eval_loss"]
    sets = {"forget": random_store(8, seed=1), "retain": random_store(8, seed=2)}
    trainer = UnlearnTrainer(model, options, **sets, objective=GradDiff(), eval_dataset=rows)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
