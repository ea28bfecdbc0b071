"""The independent truth of training: a padded loop, a forward pass for each data set, full logits, a second model.

Formulas typed in from the papers, with means over label tokens; nothing of efface but the plan's choice of pairs. For
open-unlearning's own see ``open_unlearning_loop``.
"""

import copy
import itertools
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from efface import CEU, DPO, NPO, PDU, RMU, UNDIAL, WGA, GradAscent, IdkNLL, Objective, SatImp, SimNPO
from efface.batching import TokenStore, plan_epoch
from support.helpers import padded

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
