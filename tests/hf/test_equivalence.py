"""Every objective, twenty steps: the trainer follows a padded eager loop. ``test_compat`` has open-unlearning's."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from efface import (
    CEU,
    DPO,
    NPO,
    PDU,
    RMU,
    UNDIAL,
    WGA,
    GradAscent,
    GradDiff,
    IdkNLL,
    Objective,
    SatImp,
    SimNPO,
    UnlearnTrainer,
)
from efface.hf.model.lora import add_lora
from support.formulas import padded_curve
from support.helpers import arguments, random_store, tiny_llama

STEPS, LR = 20, 1e-3
OBJECTIVES: dict[str, Objective] = {
    "NPO": NPO(beta=0.1),
    "NPO, KL": NPO(beta=0.5, retain_loss_type="KL", alpha=2.0),
    "SimNPO": SimNPO(beta=0.3, delta=0.5),
    "SimNPO, KL": SimNPO(beta=0.3, retain_loss_type="KL"),
    "GradAscent": GradAscent(),
    "GradDiff": GradDiff(gamma=0.2),
    "GradDiff, KL": GradDiff(gamma=0.2, retain_loss_type="KL"),
    "DPO": DPO(beta=0.2),
    "IdkNLL": IdkNLL(),
    "WGA": WGA(beta=0.5),
    "SatImp": SatImp(beta1=0.5, beta2=1.0, gamma=1.0),
    "CEU": CEU(gamma=1.0, alpha=0.5),
    "UNDIAL": UNDIAL(beta=3.0),
    "UNDIAL, KL": UNDIAL(beta=3.0, alpha=0.1, retain_loss_type="KL"),
    "PDU": PDU(retain_loss_eps=4.0, dual_step_size=0.2, dual_warmup_epochs=1),
    "RMU": RMU(module_regex=r"model\.layers\.1"),
    "RMU, NLL": RMU(module_regex=r"model\.layers\.0", retain_loss_type="NLL"),
}


def data() -> dict[str, Any]:
    return {
        "forget": random_store(20, seed=1),
        "retain": random_store(50, seed=2),
        "alternate": random_store(20, seed=3),
    }


def kinds(objective: Objective, *, lora: bool) -> list[str]:
    """The references that an objective can have."""
    if not objective.needs_reference and not objective.needs_reference_model():
        return ["auto"]
    return ["live", *(["adapter"] if lora else []), *([] if objective.needs_reference_model() else ["cached"])]


def made(*, lora: bool, **changes: Any) -> Any:
    """A tiny Llama; with LoRA, fresh adapters on large weights, or the frozen rest would hardly let it move."""
    if not lora:
        return tiny_llama(**changes)
    pytest.importorskip("peft", reason="needs peft: pip install 'efface[lora]'")
    torch.manual_seed(3)
    return add_lora(tiny_llama(initializer_range=0.2, **changes), r=4)


def check_weights(ours: Any, theirs: Any) -> None:
    """Adam moved them by up to 0.02 (LoRA: 0.1)."""
    for (name, weight), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (weight - other).abs().max() < 2e-4, name


def follow(got: list[float], want: list[float], *, rel: float = 1e-4) -> None:
    assert len(got) == len(want)
    size = max(map(abs, want))
    assert max(want) - min(want) > 5 * rel * size  # the curve moves, so following it means something
    assert got == pytest.approx(want, rel=rel, abs=rel * size)


def step_losses(trainer: UnlearnTrainer) -> list[float]:
    losses: list[float] = []
    step = trainer.training_step

    def recorded(*args: Any, **kwargs: Any) -> Any:
        loss = step(*args, **kwargs)
        losses.append(loss.item())
        return loss

    trainer.training_step = recorded  # type: ignore[method-assign]
    return losses


def settings(**changes: Any) -> dict[str, Any]:
    return {
        "max_steps": STEPS,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch",
        "seed": 0,
        **changes,
    }


@pytest.mark.parametrize(
    ("name", "lora", "reference"),
    [
        pytest.param(name, lora, kind, id=f"{name}-{'LoRA' if lora else 'full'}-{kind}")
        for name, objective in OBJECTIVES.items()
        for lora in (False, True)
        for kind in kinds(objective, lora=lora)
    ],
)
def test_twenty_steps_follow_the_padded_loop(name: str, lora: bool, reference: str, tmp_path: Path) -> None:
    objective, stores, model = OBJECTIVES[name], data(), made(lora=lora)
    lr = 5e-3 if lora else LR
    twin = copy.deepcopy(model)
    trainer = UnlearnTrainer(
        model,
        arguments(tmp_path, token_budget=100, **settings(learning_rate=lr)),  # several micro-batches a step
        objective=objective,
        reference=reference,
        **stores,
    )
    ours = step_losses(trainer)
    trainer.train()
    expected = padded_curve(objective, twin, **stores, steps=STEPS, lr=lr)
    if isinstance(objective, CEU):  # ours leaves out the entropy of the target, which has no gradient: weights decide
        expected = ours
    follow(ours, expected)
    check_weights(model, twin)
