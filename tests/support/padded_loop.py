"""The truth that the trainer is held to: a padded loop of two forward passes with open-unlearning's formulas."""

import copy
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainerCallback

from efface import NPO, Objective, SimNPO
from efface.batching import TokenStore, plan_epoch
from efface.hf.train.trainer import PackedTrainer
from support.helpers import padded


class Losses(TrainerCallback):
    """Collects what is logged."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.logs.append({name: float(value) for name, value in (logs or {}).items()})

    @property
    def losses(self) -> list[float]:
        return [log["loss"] for log in self.logs if "loss" in log]


def exact_losses(trainer: PackedTrainer) -> list[float]:
    """Record every micro-batch's loss unrounded: the trainer's log keeps four digits."""
    values: list[float] = []
    compute = trainer.compute_loss

    def recorded(*args: Any, **kwargs: Any) -> Any:
        loss = compute(*args, **kwargs)
        values.append(loss.item())
        return loss

    trainer.compute_loss = recorded  # type: ignore[method-assign]
    return values


# ---- open-unlearning's formulas, typed in from its trainer/utils.py ----


def batch_nll(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """compute_batch_nll: summed token losses of each sequence."""
    ids, labels, mask = batch
    logits = model(input_ids=ids, attention_mask=mask).logits[..., :-1, :].contiguous()
    shifted = labels[..., 1:].contiguous()
    return F.cross_entropy(logits.transpose(-1, -2), shifted, ignore_index=-100, reduction="none").sum(dim=-1)


def eager_loss(objective: Objective, model: nn.Module, reference: nn.Module, forget: Any, retain: Any) -> Tensor:
    forget_nll = batch_nll(model, forget)
    labels = (forget[1][:, 1:] != -100).sum(-1)
    if isinstance(objective, NPO):
        with torch.no_grad():
            reference_nll = batch_nll(reference, forget)
        lose_log_ratio = -(forget_nll - reference_nll)
        forget_loss = -2 / objective.beta * F.logsigmoid(objective.beta * (0.0 - lose_log_ratio)).mean()
    elif isinstance(objective, SimNPO):
        loss = forget_nll / labels - objective.delta
        forget_loss = (-F.logsigmoid(objective.beta * loss).mean() * 2) / objective.beta
    else:
        forget_loss = -forget_nll.sum() / labels.sum()
    if not objective.alpha:
        return objective.gamma * forget_loss
    retain_tokens = (retain[1][:, 1:] != -100).sum()
    retain_loss = batch_nll(model, retain).sum() / retain_tokens
    return objective.gamma * forget_loss + objective.alpha * retain_loss


def eager_curve(
    objective: Objective, model: nn.Module, forget: TokenStore, retain: TokenStore, *, steps: int, lr: float
) -> list[float]:
    """A padded loop with two forward passes a step, over the same pairs."""
    reference = copy.deepcopy(model).eval()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    losses: list[float] = []
    for epoch in itertools.count():
        plan = plan_epoch(forget.lengths, retain.lengths, pairs_per_step=4, token_budget=4096, seed=0, epoch=epoch)
        for step in range(len(plan)):
            pairs = (index.tolist() for index in plan.pairs(step))
            batches = [padded(store, index) for store, index in zip((forget, retain), pairs, strict=True)]
            loss = eager_loss(objective, model, reference, *batches)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if len(losses) == steps:
                return losses
    raise AssertionError
