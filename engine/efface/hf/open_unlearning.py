"""open-unlearning's training step, quirk for quirk, for people who must match old runs (``compat="open-unlearning"``).

Padded batches, a forward pass for each data set, full logits, a second model; means over each micro-batch of
``per_device_train_batch_size`` pairs, then over the micro-batches. Where that changes results:

- token means weigh short micro-batches like long ones, so accumulation and the number of processes matter;
- KL runs over all positions, prompts and padding included, and so does UNDIAL, which there lowers the teacher's logit
  of token V − 100 (the label −100, read as an index);
- PDU's margins are those at the answer tokens instead of those that predict them, and its dual variable ascends with
  every micro-batch.

Formulas of locuslab/open-unlearning at d3d7cf9, ``src/trainer/utils.py`` and ``src/trainer/unlearn``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own name for it
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from efface.batching import StepTotals, TokenStore
from efface.hf.activations import watched
from efface.hf.dataset import PackedSteps
from efface.hf.live_reference import ModelReference
from efface.objectives import CEU, DPO, NPO, PDU, RMU, UNDIAL, WGA, GradAscent, IdkNLL, Objective, SatImp, SimNPO

IGNORE = -100


class Padded(NamedTuple):
    """A padded batch: B sequences of up to T tokens."""

    input_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T)
    labels: Tensor  # (B, T), unshifted, −100 ignored

    @classmethod
    def of(cls, store: TokenStore, sequences: Sequence[int], pad_token_id: int) -> "Padded":
        """Pad sequences of a store on the right, as open-unlearning's collator does."""
        ids = [torch.from_numpy(store[index].astype(np.int64)) for index in sequences]
        labels = [row.clone() for row in ids]
        for row, index in zip(labels, sequences, strict=True):
            row[: store.label_starts[index]] = IGNORE
        padded = pad_sequence(ids, batch_first=True, padding_value=pad_token_id)
        # Its mask also hides real tokens that equal the padding token, such as an end-of-sequence token.
        mask = padded.ne(pad_token_id)
        return cls(padded, mask, pad_sequence(labels, batch_first=True, padding_value=IGNORE))

    def run(self, model: nn.Module) -> Tensor:
        """Return the logits (B, T, V)."""
        logits: Tensor = model(input_ids=self.input_ids, attention_mask=self.attention_mask).logits
        return logits

    def answers(self) -> Tensor:
        """Return where the answer tokens stand, (B, T)."""
        return self.labels != IGNORE


@dataclass(frozen=True)
class PaddedPairs:
    """A micro-batch of pairs; None for a data set that the objective does not read."""

    forget: Padded | None
    retain: Padded | None
    alternate: Padded | None = None

    @property
    def parts(self) -> tuple[Padded | None, ...]:
        """Forget, retain, alternate."""
        return self.forget, self.retain, self.alternate

    @property
    def tokens(self) -> int:
        """Positions that the model reads, padding included."""
        return sum(part.input_ids.numel() for part in self.parts if part is not None)

    def to(self, device: torch.device | str) -> "PaddedPairs":
        """Return it on a device."""
        return PaddedPairs(*(None if part is None else Padded(*(x.to(device) for x in part)) for part in self.parts))


@dataclass(frozen=True)
class PaddedStep:
    """The micro-batches of an optimizer step."""

    batches: tuple[PaddedPairs, ...]
    totals: StepTotals

    @classmethod
    def of(cls, packed: PackedSteps, step: int, *, size: int, pad_token_id: int) -> "PaddedStep":
        """Return the pairs of a step of the current epoch's plan, ``size`` of them to a micro-batch."""
        stores, (forget, retain) = packed.stores, packed.assembler.plan.pairs(step)

        def part(store: TokenStore, index: NDArray[np.int64], first: int) -> Padded | None:
            own = index[first : first + size].tolist()
            return Padded.of(store, own, pad_token_id) if own else None

        batches = (
            PaddedPairs(
                part(stores[0], forget, first),
                part(stores[1], retain, first),
                part(stores[2], forget, first) if len(stores) > 2 else None,
            )
            for first in range(0, max(len(forget), len(retain)), size)
        )
        return cls(tuple(batches), packed.assembler.totals(step))

    @property
    def tokens(self) -> int:
        """Positions that the model reads, padding included."""
        return sum(batch.tokens for batch in self.batches)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PaddedStep":
        """Return the step with its batches on ``device``."""
        return replace(self, batches=tuple(batch.to(device) for batch in self.batches))


class PaddedSteps(Dataset[PaddedStep]):
    """Item k is optimizer step k of the current epoch: the pairs that ``packed`` plans, padded."""

    def __init__(self, packed: PackedSteps, *, size: int, pad_token_id: int) -> None:
        self._packed, self._size, self._pad_token_id = packed, size, pad_token_id

    def __len__(self) -> int:
        """Return the optimizer steps of an epoch."""
        return len(self._packed)

    def __getitem__(self, step: int) -> PaddedStep:
        """Return a step."""
        return PaddedStep.of(self._packed, step, size=self._size, pad_token_id=self._pad_token_id)


class PaddedLoss(NamedTuple):
    """A micro-batch's loss, which carries the gradient, and its two parts, not weighted, which do not."""

    loss: Tensor
    forget: Tensor
    retain: Tensor


def padded_loss(objective: Objective, model: Any, reference: ModelReference | None, pairs: PaddedPairs) -> PaddedLoss:
    """The loss of a micro-batch: gamma · forget loss + alpha · retain loss.

    Args:
        objective: with a formula in open-unlearning, or ``IdkNLL``.
        model: called with ``input_ids`` and ``attention_mask``.
        reference: the frozen model, where the objective reads one.
        pairs: on the model's device.

    Raises:
        ValueError: an objective that open-unlearning does not have.
    """
    zero = torch.zeros((), device=next(part for part in pairs.parts if part is not None).input_ids.device)
    forget = zero if pairs.forget is None else _forget_loss(objective, model, reference, pairs.forget, pairs.alternate)
    retain = zero if pairs.retain is None else _retain_loss(objective, model, reference, pairs.retain)
    shift = objective.retain_loss_eps if isinstance(objective, PDU) else 0.0
    loss = objective.gamma * forget + objective.alpha * (retain - shift)
    return PaddedLoss(loss, forget.detach(), retain.detach())


def _forget_loss(  # noqa: PLR0911 - one for each objective
    objective: Objective, model: Any, reference: ModelReference | None, forget: Padded, alternate: Padded | None
) -> Tensor:
    match objective:
        case NPO() | DPO():
            lose = _sequence_nll(forget.run(model), forget) - _frozen_nll(reference, forget)
            win: Tensor | float = 0.0
            if alternate is not None:
                win = _sequence_nll(alternate.run(model), alternate) - _frozen_nll(reference, alternate)
            return -2 / objective.beta * F.logsigmoid(objective.beta * (lose - win)).mean()
        case SimNPO():
            mean = _sequence_nll(forget.run(model), forget) / forget.answers().sum(-1) - objective.delta
            return -F.logsigmoid(objective.beta * mean).mean() * 2 / objective.beta
        case RMU():
            activations = _activations(model, forget, objective.module_regex)
            vector = objective.steering_vector(activations.shape[-1]).to(activations)
            return _activation_loss(activations, vector.expand_as(activations), forget)
        case UNDIAL():
            return _undial(forget.run(model), _frozen_logits(reference, forget), forget, objective.beta)
        case PDU():
            logits = forget.run(model)
            margins = (logits.amax(-1) - logits.mean(-1)).square()
            return (margins * forget.answers()).sum() / forget.answers().sum()
        case CEU():
            return _ceu(forget.run(model), forget, objective.ignore_first_n_answer_tokens)
        case IdkNLL():
            return _token_nll(forget.run(model), forget)
        case GradAscent():
            return -_token_nll(forget.run(model), forget)
        case WGA() | SatImp():
            nll = _each_nll(forget.run(model), forget)
            p = (-nll).exp().detach()
            weight = (
                p**objective.beta if isinstance(objective, WGA) else p**objective.beta1 * (1 - p) ** objective.beta2
            )
            return -(weight * nll)[forget.labels[:, 1:] != IGNORE].mean()
    raise ValueError(
        f"`compat`: open-unlearning has no objective {objective.name!r}; drop compat, or choose one of its own"
    )


def _retain_loss(objective: Objective, model: Any, reference: ModelReference | None, retain: Padded) -> Tensor:
    if objective.retain_loss_type == "NLL":
        return _token_nll(retain.run(model), retain)
    if isinstance(objective, RMU) and objective.compares_activations:
        with torch.no_grad(), _running(reference) as frozen:
            target = _activations(frozen, retain, objective.module_regex)
        return _activation_loss(_activations(model, retain, objective.module_regex), target, retain)
    logits, frozen_logits = retain.run(model), _frozen_logits(reference, retain)
    p, q = (F.log_softmax(each.flatten(0, 1), dim=-1) for each in (logits, frozen_logits))
    return F.kl_div(p, q, reduction="batchmean", log_target=True)


def _each_nll(logits: Tensor, batch: Padded) -> Tensor:
    """(B, T − 1), 0 where there is no label."""
    return F.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), batch.labels[:, 1:], ignore_index=IGNORE, reduction="none"
    )


def _sequence_nll(logits: Tensor, batch: Padded) -> Tensor:
    return _each_nll(logits, batch).sum(-1)


def _token_nll(logits: Tensor, batch: Padded) -> Tensor:
    return _each_nll(logits, batch).sum() / (batch.labels[:, 1:] != IGNORE).sum()


def _undial(logits: Tensor, teacher: Tensor, batch: Padded, beta: float) -> Tensor:
    shifted = teacher[:, :-1].float().clone()
    index = batch.labels[:, 1:, None] % shifted.shape[-1]  # −100 is an index to theirs: the hundredth from the end
    shifted.scatter_add_(-1, index, torch.full_like(index, -beta, dtype=shifted.dtype))
    soft = shifted.softmax(-1).flatten(0, 1)
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), soft)


def _ceu(logits: Tensor, batch: Padded, ignored: int) -> Tensor:
    answers = batch.answers()
    labels = batch.labels.masked_fill((answers.cumsum(-1) <= ignored) & answers, IGNORE)[:, 1:]
    kept = labels != IGNORE
    rows, targets = logits[:, :-1][kept].float(), labels[kept]
    soft = rows.detach().scatter(-1, targets[:, None], -torch.inf).softmax(-1)
    return F.cross_entropy(rows, soft)


def _activations(model: Any, batch: Padded, module_regex: str) -> Tensor:
    with watched(getattr(model, "module", model), module_regex) as watch:
        batch.run(model)
    return watch.output()


def _activation_loss(activations: Tensor, target: Tensor, batch: Padded) -> Tensor:
    answers = batch.answers()
    squared = (activations - target).square().mean(2)
    return ((squared * answers).sum(1) / answers.sum(1)).mean()


def _running(reference: ModelReference | None) -> Any:
    if reference is None:
        raise ValueError("`reference`: the objective compares with a frozen model, got none")
    return reference.running()


@torch.no_grad()
def _frozen_logits(reference: ModelReference | None, batch: Padded) -> Tensor:
    frozen: PreTrainedModel
    with _running(reference) as frozen:
        return batch.run(frozen)


def _frozen_nll(reference: ModelReference | None, batch: Padded) -> Tensor:
    return _sequence_nll(_frozen_logits(reference, batch), batch)
