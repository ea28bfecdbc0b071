"""The baseline for the trainer's tests: a padded loop of two forward passes with open-unlearning's formulas."""

import copy
import itertools
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainerCallback

from efface import CEU, DPO, NPO, PDU, RMU, UNDIAL, WGA, GradAscent, IdkNLL, Objective, SatImp, SimNPO
from efface.batching import TokenStore, plan_epoch
from efface.hf.train.trainer import PackedTrainer
from support.helpers import padded


class Losses(TrainerCallback):
    """A callback that collects all logs."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.logs.append({name: float(value) for name, value in (logs or {}).items()})

    @property
    def losses(self) -> list[float]:
        return [log["loss"] for log in self.logs if "loss" in log]


def exact_losses(trainer: PackedTrainer) -> list[float]:
    """Record the unrounded loss of every micro-batch; the trainer's log keeps four digits."""
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
    """compute_batch_nll: the sum of the token losses of each sequence."""
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
    """Train on the same pairs in a padded loop with two forward passes a step."""
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


# ---- every objective: formulas typed in from the papers


Batch = tuple[Tensor, Tensor, Tensor]  # input_ids, labels, attention_mask


def logits_of(model: Any, batch: Batch) -> Tensor:
    return model(input_ids=batch[0], attention_mask=batch[2], use_cache=False).logits.float()


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    shifted = labels[:, 1:]
    logp = logits[:, :-1].log_softmax(-1)
    return -logp.gather(-1, shifted.clamp(min=0)[..., None])[..., 0] * (shifted != -100)


def activations_of(model: Any, batch: Batch, regex: str) -> Tensor:
    kept = []
    (module,) = [m for name, m in model.named_modules() if re.fullmatch("(.*\\.)?" + regex, name)]
    handle = module.register_forward_hook(lambda _m, _i, out: kept.append(out[0] if isinstance(out, tuple) else out))
    logits_of(model, batch)
    handle.remove()
    return kept[0]


def steering(objective: RMU, size: int) -> Tensor:
    vector = torch.rand(size, generator=torch.Generator().manual_seed(objective.steering_seed))
    return vector / vector.norm() * objective.steering_coeff


def per_sequence_mse(activations: Tensor, target: Tensor, labels: Tensor) -> Tensor:
    mask = (labels != -100).float()
    return (((activations - target) ** 2).mean(-1) * mask).sum(-1) / mask.sum(-1)


def forget_loss(  # noqa: PLR0911, PLR0912
    objective: Objective, model: Any, frozen: Any, forget: Batch, alternate: Batch | None
) -> Tensor:
    labels = forget[1]
    mask = labels[:, 1:] != -100
    if isinstance(objective, RMU):
        activations = activations_of(model, forget, objective.module_regex)
        return per_sequence_mse(activations, steering(objective, activations.shape[-1]), labels).mean()
    if isinstance(objective, IdkNLL):
        nll = token_nll(logits_of(model, alternate), alternate[1])
        return nll.sum() / (alternate[1][:, 1:] != -100).sum()
    logits = logits_of(model, forget)
    nll = token_nll(logits, labels)
    if isinstance(objective, (NPO, DPO)):
        ratio = token_nll_frozen(frozen, forget) - nll.sum(-1)
        win = 0.0
        if isinstance(objective, DPO):
            win = token_nll_frozen(frozen, alternate) - token_nll(logits_of(model, alternate), alternate[1]).sum(-1)
        return (-2 / objective.beta * F.logsigmoid(objective.beta * (win - ratio))).mean()
    if isinstance(objective, SimNPO):
        mean = nll.sum(-1) / mask.sum(-1) - objective.delta
        return (-2 / objective.beta * F.logsigmoid(objective.beta * mean)).mean()
    if isinstance(objective, WGA):
        return -(((-nll).exp() ** objective.beta).detach() * nll)[mask].mean()
    if isinstance(objective, SatImp):
        p = (-nll).exp().detach()
        return -(p**objective.beta1 * (1 - p) ** objective.beta2 * nll)[mask].mean()
    if isinstance(objective, GradAscent):
        return -nll[mask].mean()
    if isinstance(objective, CEU):
        first = objective.ignore_first_n_answer_tokens
        total, count = torch.zeros(()), 0
        for b in range(len(labels)):
            rows = [t for t in range(mask.shape[1]) if mask[b, t]][first:]
            for t in rows:
                target = logits[b, t].detach().clone()
                target[labels[b, t + 1]] = -torch.inf
                total = total - (target.softmax(-1) * logits[b, t].log_softmax(-1)).sum()
            count += len(rows)
        return total / count
    if isinstance(objective, PDU):
        where = torch.cat([mask, torch.zeros_like(mask[:, :1])], 1)
        return ((logits.max(-1).values - logits.mean(-1)) ** 2)[where].mean()
    if isinstance(objective, UNDIAL):
        with torch.no_grad():
            teacher = logits_of(frozen, forget)[:, :-1]
        index = labels[:, 1:].clone()
        index[index == -100] = 0
        soft = (teacher - objective.beta * F.one_hot(index, logits.shape[-1])).softmax(-1)
        ce = -(soft * logits[:, :-1].log_softmax(-1)).sum(-1)
        return ce[mask].mean()
    raise AssertionError(objective)


@torch.no_grad()
def token_nll_frozen(frozen: Any, batch: Batch) -> Tensor:
    return token_nll(logits_of(frozen, batch), batch[1]).sum(-1)


def retain_loss(objective: Objective, model: Any, frozen: Any, retain: Batch) -> Tensor:
    labels = retain[1]
    mask = labels[:, 1:] != -100
    if objective.retain_loss_type == "EMBED_DIFF":
        with torch.no_grad():
            target = activations_of(frozen, retain, objective.module_regex)
        return per_sequence_mse(activations_of(model, retain, objective.module_regex), target, labels).mean()
    logits = logits_of(model, retain)
    if objective.retain_loss_type == "NLL":
        return token_nll(logits, labels).sum() / mask.sum()
    with torch.no_grad():
        q = logits_of(frozen, retain).log_softmax(-1)
    divergence = (q.exp() * (q - logits.log_softmax(-1))).sum(-1)
    return divergence[:, :-1][mask].mean()


def padded_curve(
    objective: Objective,
    model: Any,
    forget: TokenStore,
    retain: TokenStore,
    alternate: TokenStore,
    *,
    steps: int,
    lr: float,
    size: int = 4,
) -> list[float]:
    """Train ``model``; return the loss of every step of ``size`` pairs."""
    frozen = copy.deepcopy(model).eval()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    losses: list[float] = []
    weight = objective.alpha
    for epoch in itertools.count():
        plan = plan_epoch(forget.lengths, retain.lengths, pairs_per_step=size, token_budget=4096, seed=0, epoch=epoch)
        for step in range(len(plan)):
            index, kept = (own.tolist() for own in plan.pairs(step))
            batches = [padded(*part) for part in ((forget, index), (retain, kept), (alternate, index))]
            loss = objective.gamma * forget_loss(objective, model, frozen, batches[0], batches[2])
            if weight or isinstance(objective, PDU):
                retained = retain_loss(objective, model, frozen, batches[1])
                loss = loss + weight * retained
            loss.backward()
            if isinstance(objective, PDU) and epoch >= objective.dual_warmup_epochs:
                excess = retained.item() - objective.retain_loss_eps
                weight = max(0.0, weight + objective.dual_step_size * excess)
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if len(losses) == steps:
                return losses
    raise AssertionError
