"""Tests of preflight checks and training settings: gradients, checkpointing, warm-up, optimizers, loss scaling."""

import copy
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from efface import NPO, FinetuneTrainer, Objective, SimNPO, UnlearnTrainer
from efface.hf.model.lora import add_lora
from efface.hf.train.preflight import _RANGES, check_gradients, check_optimizer
from support.helpers import LONG, arguments, kibibytes, random_store, tiny_llama
from support.padded_loop import exact_losses
from support.processes import RANKS, launch


def trained(model: Any, folder: Path, *, objective: Objective | None = None, **settings: Any) -> list[float]:
    trainer = UnlearnTrainer(
        model,
        arguments(folder, **{"max_steps": 4, **settings}),
        forget=random_store(8, seed=1),
        retain=random_store(20, seed=2),
        objective=objective or NPO(),
    )
    losses = exact_losses(trainer)
    trainer.train()
    return losses


# ---- gradient checkpointing ----


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors", "reentrant"])
def test_checkpointing_gives_the_same_bits_and_trains(lora: bool, reentrant: bool, tmp_path: Path) -> None:
    """After a frozen embedding, a reentrant checkpoint gives LoRA no gradient unless its input requires one."""
    torch.manual_seed(3)
    start = add_lora(tiny_llama(), r=4, dropout=0.1) if lora else tiny_llama()
    runs: list[tuple[list[float], dict[str, torch.Tensor]]] = []
    for checkpointing in (False, True, True):
        model = copy.deepcopy(start)
        changes = {"gradient_checkpointing": checkpointing}
        if checkpointing:
            changes["gradient_checkpointing_kwargs"] = {"use_reentrant": reentrant}  # type: ignore[assignment]
        runs.append((trained(model, tmp_path, **changes), model.state_dict()))
    plain, once, again = runs
    assert once[0] == again[0] == plain[0]
    for name, weight in once[1].items():
        assert torch.equal(weight, again[1][name]), name
        assert torch.equal(weight, plain[1][name]), name
    moved = [name for name, weight in once[1].items() if not torch.equal(weight, start.state_dict()[name])]
    assert moved
    assert not lora or all("lora" in name for name in moved)


def test_a_loss_without_trained_parameters_is_explained(tmp_path: Path) -> None:
    model = add_lora(tiny_llama(), r=4)
    model.base_model.model.model.norm.register_forward_hook(lambda module, args, out: out.detach())
    with pytest.raises(ValueError, match=r"does not depend on any trained parameter.*use_reentrant=False"):
        trained(model, tmp_path)


# ---- no gradients ----


def test_a_frozen_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM: expected trainable parameters, got a frozen model"):
        trained(tiny_llama().requires_grad_(False), tmp_path)


def test_parameters_that_get_no_gradient_stop_the_run_at_its_first_step(tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=False).requires_grad_(False)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    model.model.layers[1].register_forward_hook(lambda module, args, out: out.detach().requires_grad_(True))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"some of the 1 trained parameters .*\(no parameter has a gradient\)"):
        trained(model, tmp_path)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_gradients_that_are_all_zero_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="all gradients are zero"):
        trained(tiny_llama(), tmp_path, objective=SimNPO(gamma=0.0, alpha=0.0))


def test_a_gradient_that_is_not_finite_is_not_called_missing() -> None:
    model = torch.nn.Linear(2, 2)
    model.weight.grad = torch.full((2, 2), torch.nan)
    check_gradients(list(model.parameters()))


# ---- warm-up ----


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"warmup_epochs": 1.0, "pairs_per_step": 32}, 6),  # 200 / 32 = 6.25, as in TOFU and open-unlearning
        ({"warmup_epochs": 2.0, "pairs_per_step": 32}, 12),
        ({"warmup_epochs": 0.5, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 5}, 5),
        ({"warmup_epochs": 0.01, "pairs_per_step": 200}, 1),
        ({"warmup_epochs": 0.0}, 0),
        ({"warmup_steps": 3}, 3),
        ({}, 0),
    ],
)
def test_warm_up_in_epochs(settings: dict[str, Any], steps: int, tmp_path: Path) -> None:
    trainer = UnlearnTrainer(
        tiny_llama(),
        arguments(tmp_path, **settings),
        forget=random_store(200, seed=1),
        retain=None,
        objective=NPO(alpha=0.0),
    )
    assert trainer.args.get_warmup_steps(1000) == steps


def test_the_learning_rate_warms_up(tmp_path: Path) -> None:
    trainer = FinetuneTrainer(
        tiny_llama(),
        arguments(
            tmp_path, pairs_per_step=4, num_train_epochs=3, warmup_epochs=1, lr_scheduler_type="constant_with_warmup"
        ),
        data=random_store(16),
    )
    trainer.train()
    rates = [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]
    assert rates == pytest.approx([0.0, 2.5e-4, 5e-4, 7.5e-4, *[1e-3] * 8])


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        *((name, "1", "a number") for name in ("learning_rate", "warmup_epochs", "num_train_epochs", "logging_steps")),
        *((name, None, "a number") for name in ("weight_decay", "adam_beta1")),
        *((name, value, "a whole number") for name in ("seed", "max_steps", "token_budget") for value in ("1", 1.5)),
    ],
)
def test_settings_that_are_not_numbers_are_refused(name: str, value: Any, expected: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=f"`{name}`: expected {expected}, got {value!r}"):
        arguments(tmp_path, **{name: value})
    assert arguments(tmp_path, pairs_per_step=2.0).pairs_per_step == 2


def test_a_schedule_without_such_settings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`lr_scheduler_kwargs` \{'num_cycles': 2\}: expected the settings of linear"):
        trained(tiny_llama(), tmp_path, lr_scheduler_type="linear", lr_scheduler_kwargs={"num_cycles": 2})


@pytest.mark.parametrize("callbacks", ["x", [3], [int]])
def test_callbacks_are_callbacks(callbacks: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="`callbacks`: expected a list of TrainerCallback, got"):
        FinetuneTrainer(tiny_llama(), arguments(tmp_path), data=random_store(8), callbacks=callbacks)


@pytest.mark.parametrize("other", [{"warmup_steps": 5}, {"warmup_ratio": 0.1}], ids=str)
def test_a_warm_up_given_twice_is_refused(other: dict[str, Any], tmp_path: Path) -> None:
    (name,) = other
    if not hasattr(arguments(tmp_path), name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    with pytest.raises(ValueError, match=f"`warmup_epochs`: expected no other warm-up, got `{name}`"):
        arguments(tmp_path, warmup_epochs=1, **other)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        *((name, least - 1, f"at least {least}") for name, (least, _) in _RANGES.items()),
        *((name, end, f"less than {end}") for name, (_, end) in _RANGES.items()),
        ("num_train_epochs", math.inf, "a finite number"),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_runs(
    name: str, value: float, expected: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"`{name}`: expected {expected}, got {value}"):
        arguments(tmp_path, **{name: value})


def test_other_warm_ups_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`warmup_epochs`: expected at least 0, got -1"):
        arguments(tmp_path, warmup_epochs=-1)
    with pytest.raises(ValueError, match="expected arguments of a trainer, which knows the steps of an epoch"):
        arguments(tmp_path, warmup_epochs=1).get_warmup_steps(10)


# ---- optimizers and precision ----


@pytest.mark.parametrize("name", ["paged_adamw_32bit", "paged_adamw_8bit", "adamw_bnb_8bit", "lion_8bit"])
def test_a_missing_bitsandbytes_is_named_before_any_data_is_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=rf"--optim {name} needs the package bitsandbytes.*pip install 'efface\[bits"):
        arguments(tmp_path, optim=name)


@pytest.mark.parametrize(
    "name", ["adamw_torch", "adamw_torch_fused", "adamw_torch_8bit", "sgd", "adafactor", "adagrad"]
)
def test_optimizers_of_others_need_no_bitsandbytes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    check_optimizer(name)


@pytest.mark.parametrize("name", ["sgd", "adafactor", "adagrad", "rmsprop", "adamw_torch"])
def test_any_optimizer_of_transformers_trains(name: str, tmp_path: Path) -> None:
    losses = trained(tiny_llama(), tmp_path, optim=name, learning_rate=1e-2)
    assert losses[-1] < losses[0]


def test_a_scaled_loss_has_scaled_gradients(tmp_path: Path) -> None:
    """As a GradScaler does for fp16: 2^k times the loss gives exactly 2^k times every gradient."""
    trainers = [
        UnlearnTrainer(
            tiny_llama(), arguments(tmp_path), forget=random_store(4), retain=random_store(4, seed=2), objective=NPO()
        )
        for _ in range(2)
    ]
    for trainer, scale in zip(trainers, (1.0, 2.0**12), strict=True):
        step = trainer.get_train_dataloader().dataset[0]
        loss = trainer.compute_loss(trainer.model, {"batch": step.batches[0], "step": step})
        (loss * scale).backward()
    plain, scaled = (dict(trainer.model.named_parameters()) for trainer in trainers)
    for name, weight in plain.items():
        assert torch.equal(weight.grad * 2.0**12, scaled[name].grad), name


# ---- memory of a step beyond the model, against the padded eager step with its second model


def peak(kind: str, width: int, vocabulary: int) -> float:
    """Return the peak in MiB beyond the model, measured in a subprocess."""
    done = launch(0, [str(RANKS / "step_memory.py"), kind, str(width), str(vocabulary)])
    assert done.returncode == 0, done.stderr
    return float(done.stdout.splitlines()[-1])


def available() -> int:
    """Return the available memory of this machine in GiB."""
    return kibibytes("/proc/meminfo", "MemAvailable") >> 20


@pytest.mark.skipif(not Path("/proc/meminfo").is_file(), reason="reads Linux's /proc")
@pytest.mark.parametrize(("width", "vocabulary"), [(128, 64_000), pytest.param(512, 128_256, marks=LONG)])
def test_a_step_needs_at_most_45_percent_of_the_eager_ones_memory(width: int, vocabulary: int) -> None:
    """Llama, 8 layers, d = width, 16 pairs, fp32, NPO: forward, backward and SGD; the eager step without SGD.

    Both hold a second model. A cached reference would need less.
    """
    if available() < 8:
        pytest.skip("less than 8 GiB of memory is free, so the machine might kill other tests")
    assert peak("live", width, vocabulary) <= 0.45 * peak("eager", width, vocabulary)
