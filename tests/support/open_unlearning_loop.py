"""The losses and the training loop of open-unlearning at d3d7cf9, rewritten with its order and tensor shapes.

Each formula names its source lines, below ``src/trainer``. ``loop`` repeats the loop of transformers 4.45.1, which
open-unlearning pins, counter for counter (``trainer.py``, ``_inner_training_loop``). This file uses no code of efface.
The losses and the loop were both compared with the real code, run in a separate environment.
"""

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

Inputs = dict[str, Tensor]
Row = tuple[list[int], int]  # token ids, and where the answer starts


def collate(rows: Sequence[Row], pad: int) -> Inputs:
    """src/data/collators.py:24-46, padding on the right, with labels as preprocess_chat_instance creates them."""
    ids = pad_sequence([torch.tensor(row) for row, _ in rows], batch_first=True, padding_value=pad)
    labels = [torch.tensor([-100] * start + row[start:]) for row, start in rows]
    padded = pad_sequence(labels, batch_first=True, padding_value=-100)
    return {"input_ids": ids, "attention_mask": ids.ne(pad), "labels": padded}


# ---- losses ----


def kl_divergence(model: nn.Module, reference: nn.Module, inputs: Inputs) -> Tensor:
    """utils.py:17-31, over every position."""
    with torch.no_grad():
        theirs = F.log_softmax(reference(**inputs).logits, dim=-1)
    ours = F.log_softmax(model(**inputs).logits, dim=-1)
    size = ours.shape[-1]
    return F.kl_div(ours.view(-1, size), theirs.view(-1, size), reduction="batchmean", log_target=True)


def batch_nll(model: nn.Module, inputs: Inputs) -> Tensor:
    """utils.py:34-44, (B,)."""
    logits = model(**inputs).logits[..., :-1, :]
    labels = inputs["labels"][..., 1:]
    return nn.CrossEntropyLoss(ignore_index=-100, reduction="none")(logits.transpose(-1, -2), labels).sum(dim=-1)


def preference(model: nn.Module, reference: nn.Module, win: Inputs | None, lose: Inputs, beta: float) -> Tensor:
    """compute_dpo_loss, utils.py:47-67. Without ``win`` it is NPO (npo.py:15-21)."""
    ratios: list[Tensor | float] = []
    for inputs in (win, lose):
        if inputs is None:
            ratios.append(0.0)
            continue
        nll = batch_nll(model, inputs)
        with torch.no_grad():
            frozen = batch_nll(reference, inputs)
        ratios.append(-(nll - frozen))
    return -2 / beta * F.logsigmoid(beta * (ratios[0] - ratios[1])).mean()


def simnpo(model: nn.Module, inputs: Inputs, beta: float, delta: float) -> Tensor:
    """simnpo.py:16-20. It counts the labels before the shift."""
    mean = batch_nll(model, inputs) / (inputs["labels"] != -100).sum(-1) - delta
    return -F.logsigmoid(beta * mean).mean() * 2 / beta


def undial(model: nn.Module, reference: nn.Module, inputs: Inputs, beta: float) -> Tensor:
    """utils.py:70-99. A label of -100 indexes the vocabulary from its end."""
    logits = model(**inputs).logits[..., :-1, :]
    labels = inputs["labels"][..., 1:]
    with torch.no_grad():
        teacher = reference(**inputs).logits[..., :-1, :]
    mask = torch.zeros_like(teacher)
    for b in range(mask.shape[0]):
        for t in range(mask.shape[1]):
            mask[b, t, int(labels[b, t])] = 1.0
    soft = F.softmax(teacher - mask * beta, dim=-1)
    size = logits.shape[-1]
    return nn.CrossEntropyLoss(reduction="none")(logits.reshape(-1, size), soft.reshape(-1, size)).mean()


def weighted_ascent(model: nn.Module, inputs: Inputs, weigh: Callable[[Tensor], Tensor]) -> Tensor:
    """utils.py:102-115 and 118-134."""
    logits, labels = model(**inputs).logits[..., :-1, :], inputs["labels"][..., 1:].reshape(-1)
    loss = nn.CrossEntropyLoss(ignore_index=-100, reduction="none")(logits.reshape(-1, logits.size(-1)), labels)
    return -(weigh((-loss).exp().detach()) * loss)[labels != -100].mean()


def ceu(model: nn.Module, inputs: Inputs, ignored: int) -> Tensor:
    """ceu.py:64-81 and 30-61."""
    logits, labels = model(**inputs).logits, inputs["labels"].clone()
    valid = labels != -100
    labels[(valid.cumsum(dim=-1) <= ignored) & valid] = -100
    shifted = labels[..., 1:]
    rows, targets = logits[..., :-1, :][shifted != -100], shifted[shifted != -100]
    target = rows.detach().clone()
    target[torch.arange(len(targets)), targets] = -torch.inf
    return F.cross_entropy(rows, F.softmax(target, dim=-1))


def margins(model: nn.Module, inputs: Inputs) -> Tensor:
    """pdu.py:113-121. The labels and logits of the same position are paired, without a shift."""
    logits = model(**inputs).logits
    logits = logits.reshape(-1, logits.size(-1))
    loss = (logits.max(dim=-1)[0] - logits.mean(dim=-1)) ** 2
    mask = (inputs["labels"] != -100).reshape(-1)
    return (loss * mask).sum() / mask.sum()


def activations(model: nn.Module, inputs: Inputs, regex: str) -> Tensor:
    """rmu.py:83-98."""
    cache: list[Tensor] = []
    (module,) = [module for name, module in model.named_modules() if re.fullmatch(regex, name)]
    handle = module.register_forward_hook(
        lambda _module, _inputs, output: cache.append(output[0] if isinstance(output, tuple) else output)
    )
    model(**inputs)
    handle.remove()
    return cache[0]


def activation_loss(ours: Tensor, theirs: Tensor, mask: Tensor) -> Tensor:
    """rmu.py:108-117. (B,) divided by (B, 1) is (B, B), despite the comments there."""
    squared = F.mse_loss(ours, theirs, reduction="none")
    sums = (squared * mask.unsqueeze(-1).expand_as(squared)).mean(dim=2).sum(dim=1)
    counts = mask.sum(dim=-1, keepdim=True)
    total = torch.zeros(())
    for numerator in sums:
        for denominator in counts[:, 0]:
            total = total + numerator / denominator
    return total / (len(sums) * len(counts))


def steering(size: int, coefficient: float) -> Tensor:
    """rmu.py:100-106, with a seeded random vector."""
    vector = torch.rand(1, 1, size, generator=torch.Generator().manual_seed(0))
    return vector / torch.norm(vector) * coefficient


@dataclass
class Method:
    """An open-unlearning trainer class with its ``method_args`` and its state."""

    name: str
    settings: dict[str, Any]
    preferences: list[float] = field(default_factory=list)  # of PDU; they change during training

    def __post_init__(self) -> None:
        self.preferences = [self.settings.get("gamma", 1.0), self.settings.get("alpha", 1.0)]

    def loss(self, model: nn.Module, reference: nn.Module, inputs: dict[str, Inputs], *, dual: bool = False) -> Tensor:
        """compute_loss of the class. ``dual`` corresponds to PDU's can_update."""
        forget = self.forget(model, reference, inputs["forget"], inputs.get("alternate"))
        if self.name in ("GradAscent", "CEU"):  # grad_ascent.py:12, ceu.py:91: no retain term, no gamma
            return forget
        retain = self.retain(model, reference, inputs["retain"])
        if self.name != "PDU":
            gamma, alpha = self.preferences
            return gamma * forget + alpha * retain
        retain = retain - self.settings.get("retain_loss_eps", 0.0)  # pdu.py:48-63
        loss = (torch.tensor(self.preferences) * torch.hstack([forget, retain])).sum()
        if dual and self.settings.get("dual_update_upon", "step") == "step":
            self.ascend(retain.item())
        return loss

    def ascend(self, retain: float) -> None:
        """pdu.py:60-63 and 97-99."""
        if self.settings["primal_dual"]:
            step = self.settings.get("dual_step_size", 1.0)
            self.preferences[1] = max(0, self.preferences[1] + step * retain)

    def forget(  # noqa: PLR0911 - one for each method
        self, model: nn.Module, reference: nn.Module, forget: Inputs, alternate: Inputs | None
    ) -> Tensor:
        """Return the forget loss."""
        own = self.settings
        match self.name:
            case "NPO":
                return preference(model, reference, None, forget, own["beta"])
            case "DPO":
                return preference(model, reference, alternate, forget, own["beta"])
            case "SimNPO":
                return simnpo(model, forget, own["beta"], own["delta"])
            case "GradAscent" | "GradDiff":  # grad_ascent.py:11, grad_diff.py:48
                return -model(**forget).loss
            case "IdkNLL":  # GradDiff with gamma -1 over QAwithIdkDataset(return_original=False)
                return model(**(alternate or forget)).loss
            case "UNDIAL":
                return undial(model, reference, forget, own["beta"])
            case "CEU":
                return ceu(model, forget, own["ignore_first_n_answer_tokens"])
            case "WGA":
                return weighted_ascent(model, forget, lambda p: p ** own["beta"])
            case "SatImp":
                return weighted_ascent(model, forget, lambda p: p ** own["beta1"] * (1 - p) ** own["beta2"])
            case "PDU":
                return margins(model, forget)
            case "RMU":
                ours = activations(model, forget, own["module_regex"])
                vector = steering(ours.shape[-1], own["steering_coeff"]).expand_as(ours)
                return activation_loss(ours, vector, forget["labels"] != -100)
        raise AssertionError(self.name)

    def retain(self, model: nn.Module, reference: nn.Module, retain: Inputs) -> Tensor:
        """compute_retain_loss, grad_diff.py:25-39 and rmu.py:119-137."""
        match self.settings.get("retain_loss_type", "NLL"):
            case "KL":
                return kl_divergence(model, reference, retain)
            case "EMBED_DIFF":
                regex = self.settings["module_regex"]
                with torch.no_grad():
                    theirs = activations(reference, retain, regex)
                return activation_loss(activations(model, retain, regex), theirs, retain["labels"] != -100)
        loss: Tensor = model(**retain).loss
        return loss


# ---- the loop ----


@dataclass
class Progress:
    """What a run of the loop did: steps and epochs."""

    steps: list[list[int]]  # the micro-batches summed into each step's gradient
    epochs_at_end: list[float]  # state.epoch at the end of every epoch
    max_steps: int


def loop(
    batches: int,
    accumulate: int,
    *,
    epochs: float = 1.0,
    max_steps: int = -1,
    micro_batch: Callable[[int, int], None] = lambda epoch, step: None,
    optimize: Callable[[], None] = lambda: None,
    epoch_end: Callable[[int, float], None] = lambda epoch, state: None,
) -> Progress:
    """transformers 4.45.1, trainer.py:2095-2112 and 2317-2470. ``batches`` is the length of the data loader."""
    updates = max(batches // accumulate, 1)
    if max_steps > 0:
        rounds = max_steps // updates + int(max_steps % updates > 0)
    else:
        max_steps, rounds = -int(-epochs * updates // 1), -int(-epochs // 1)  # ceilings
    steps: list[list[int]] = []
    ends: list[float] = []
    held: list[int] = []
    total, state = 0, 0.0
    for epoch in range(rounds):
        for step in range(batches):
            total += 1
            micro_batch(epoch, step)
            held.append(total - 1)
            last_of_a_short_epoch = batches <= accumulate and step + 1 == batches
            if total % accumulate == 0 or last_of_a_short_epoch:
                optimize()
                steps.append(held)
                held = []
                state = epoch + (step + 1) / batches
                if len(steps) >= max_steps:
                    break
        ends.append(state)
        epoch_end(epoch, state)
        if len(steps) >= max_steps:
            break
    return Progress(steps, ends, max_steps)


@dataclass(frozen=True)
class Schedule:
    """Settings of a run."""

    size: int
    accumulate: int
    epochs: float = 3.0
    max_steps: int = -1
    lr: float = 5e-3
    decay: float = 0.1
    clip: float = 1.0
    warmup_epochs: float = 0.0
    trainable: Sequence[str] = (".*",)


@dataclass
class Trained:
    """Losses, gradient norms and learning rates of the optimizer steps."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)


def train(
    method: Method,
    model: nn.Module,
    schedule: Schedule,
    rows: int,
    inputs: Callable[[int, int], dict[str, Inputs]],
    batches: int,
    redrawn: Callable[[int], list[Inputs]],
) -> Trained:
    """Train ``model`` on the micro-batches ``inputs(epoch, step)``. PDU uses ``redrawn(epoch)`` after each epoch."""
    reference = copy.deepcopy(model).eval()
    chosen = {n for n, _ in model.named_parameters() if any(re.fullmatch(regex, n) for regex in schedule.trainable)}
    named = {name: weight for name, weight in model.named_parameters() if name in chosen}  # rmu.py:43-48
    norm = re.compile("norm|bias")  # parameter names of a Llama without weight decay
    groups = [
        {"params": [w for n, w in named.items() if not norm.search(n)], "weight_decay": schedule.decay},
        {"params": [w for n, w in named.items() if norm.search(n)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=schedule.lr)
    updates = loop(batches, schedule.accumulate, epochs=schedule.epochs, max_steps=schedule.max_steps).max_steps
    warm_up = int(schedule.warmup_epochs * rows // (schedule.size * schedule.accumulate))  # trainer/__init__.py:34-43

    def rate(step: int) -> float:
        if step < warm_up:
            return step / max(1, warm_up)
        return max(0.0, (updates - step) / max(1, updates - warm_up))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    trained = Trained()
    can_update = method.settings.get("dual_warmup_epochs", 0) == 0
    pending = 0.0

    def micro_batch(epoch: int, step: int) -> None:
        nonlocal pending
        model.train()
        loss = method.loss(model, reference, inputs(epoch, step), dual=can_update) / schedule.accumulate
        loss.backward()
        pending += loss.item()

    def optimize() -> None:
        nonlocal pending
        trained.norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), schedule.clip)))
        trained.losses.append(pending)
        trained.rates.append(optimizer.param_groups[0]["lr"])
        pending = 0.0
        optimizer.step()
        scheduler.step()
        model.zero_grad()

    def epoch_end(epoch: int, state: float) -> None:
        """pdu.py:75-103 and 143-147."""
        nonlocal can_update
        if method.name != "PDU" or not method.settings["primal_dual"]:
            return
        if state >= method.settings.get("dual_warmup_epochs", 0):
            can_update = True
            if method.settings.get("dual_update_upon") == "epoch":
                model.eval()
                with torch.no_grad():
                    losses = [method.retain(model, reference, retain) for retain in redrawn(epoch)]
                mean = torch.stack(losses).sum() / len(losses)
                method.ascend((mean - method.settings.get("retain_loss_eps", 0.0)).item())

    loop(
        batches,
        schedule.accumulate,
        epochs=schedule.epochs,
        max_steps=schedule.max_steps,
        micro_batch=micro_batch,
        optimize=optimize,
        epoch_end=epoch_end,
    )
    return trained
