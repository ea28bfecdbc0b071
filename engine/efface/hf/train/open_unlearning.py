"""open-unlearning's training step, quirk for quirk, for people who must match old runs (``compat="open-unlearning"``).

Padded batches, a forward pass for each data set, full logits, a second model; means over each micro-batch of
``per_device_train_batch_size`` pairs, a step's micro-batches added and divided by the accumulation steps. The code of
locuslab/open-unlearning at d3d7cf9 was run beside this one, on the transformers 4.45.1 and accelerate 0.34.2 that it
pins: losses and gradients of every method agree to rounding, and so do the weights after runs over the same pairs.

What compat does otherwise than runs without it, because open-unlearning does:

- Token means weigh short micro-batches like long ones, so accumulation matters.
- Prompts and labels are its own, token for token; see ``efface.hf.text.templates.get_template``.
- The attention mask hides real tokens that equal the padding token, such as an end-of-sequence token.
- KL runs over all positions, prompts and padding included, and so does UNDIAL, which there lowers the teacher's logit
  of token V - 100 (the label -100, read as an index).
- RMU divides every sequence's squared distance by every sequence's number of answer tokens, and takes the mean over
  both. Parameters that ``trainable_params_regex`` leaves out stay as they are, but have gradients, which count in the
  norm that gradients are clipped to.
- PDU's margins are those at the answer tokens instead of those that predict them. Its dual variable ascends with every
  micro-batch; with ``dual_update_upon="epoch"`` by the mean over micro-batches of retain rows drawn anew, as many as
  forget rows. The warm-up ends when the trainer's own count of epochs, at an epoch's end, has reached it: where
  micro-batches are left over, an epoch later.
- An epoch's left-over micro-batches go into the first step of the next one (see ``Accumulation``), an epoch counts as
  so many steps as are whole, and the run ends after so many for each epoch.
- ``warmup_epochs`` may come to no step at all.
- Weight decay leaves out biases, and those norms alone that transformers 4.45 knows as such: Llama's, but not those of
  Qwen2, Mistral, Phi-3 or Gemma.
- A refusal is drawn anew whenever a row is read.

What still differs from open-unlearning:

- Random numbers. Shuffles, retain rows, refusals, RMU's steering vector and dropout are drawn from the same
  distributions by generators of our own, so that a killed run continues bit for bit.
- Defaults. Those of the trainer's settings (optimizer, learning rate, precision, weight decay) are ours, not those of
  its configuration files; the recipes have those.
- The ends of epochs, where micro-batches are left over. An evaluation or checkpoint for each epoch comes when the steps
  that the epoch counts as have been taken, and so does ``epoch`` in the log; theirs come when its rows have been read.
  Steps, and the last one, are the same.
- A restarted run of open-unlearning goes on elsewhere in its data, without the micro-batches that were carried; one of
  ours goes on bit for bit.
- One process only. With n processes theirs takes the step of n times the accumulation steps, as long as they divide an
  epoch's micro-batches; otherwise it fills up the last ones with rows of the epoch's start.
- Rows that have no answer token, and a loss that is not finite, stop the run. CE-U's is NaN for a micro-batch whose
  answers have no token but those ignored.
- Without a chat template it cuts sequences to 512 tokens; here nothing is cut unless ``max_length`` says so.
- Blank lines of a refusal file are no refusals here.
- Not there: an epoch over the retain set (``anchor: retain``), PDU with KL, padding on the left, few-shot prompts.
- Ours alone: LoRA, ``IdkNLL`` (its GradDiff with gamma -1 on a refusals-only forget set), a retain term for CE-U and
  GradAscent, ``retain_sampling`` other than random, a ``reference_model`` of one's own.
- On a CPU with bf16 its formulas run under autocast, too; on a GPU only the models do, and here always.

Unused with compat: ``token_budget``, ``chunk_rows``, ``loss_backend``, ``reference_cache``, ``dataloader_num_workers``.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own name for it
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_pt_utils import get_parameter_names

from efface.batching import EpochPlan, Role, TokenStore
from efface.hf.model.activations import training_only, watched
from efface.hf.model.supported import undisturbed
from efface.hf.reference.live import ModelReference
from efface.hf.train.arguments import UnlearnArguments
from efface.hf.train.dataset import Accumulation, PackedSteps, Steps
from efface.hf.train.stepping import SteppedTrainer, Stepping, Stores, pairs_per_step, planned_steps
from efface.objectives import (
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
)
from efface_kernels import Kind, SequenceRule, Sequences, Term, to_device

IGNORE = -100
DUAL_EPOCHS = 2**32
"""The plans of epochs from here on are those that PDU's dual variable reads between two epochs."""

_OBJECTIVES = (CEU, DPO, NPO, PDU, RMU, UNDIAL, WGA, GradAscent, GradDiff, IdkNLL, SatImp, SimNPO)


_UNDECAYED = {
    *("LlamaRMSNorm", "CohereLayerNorm", "ChameleonRMSNorm", "GraniteRMSNorm", "GraniteMoeRMSNorm"),
    *("NemotronLayerNorm1P", "OlmoLayerNorm", "OlmoeRMSNorm", "RecurrentGemmaRMSNorm"),
}
"""Classes of norms, beside ``nn.LayerNorm``, that transformers 4.45 leaves out of weight decay; it decays others."""


def decayed_parameters(model: nn.Module) -> list[str]:
    """Return the names of the parameters that transformers 4.45 decays."""
    norms = {type(module) for module in model.modules() if type(module).__name__ in _UNDECAYED}
    return [name for name in get_parameter_names(model, [nn.LayerNorm, *norms]) if "bias" not in name]


def check_objective(objective: Objective) -> None:
    """Raise ValueError for an objective that open-unlearning does not have; a subclass may be another one."""
    if type(objective) not in _OBJECTIVES:
        raise ValueError(
            f"`compat`: open-unlearning has no objective {objective.name!r} ({type(objective).__name__}); drop compat, "
            f"or choose one of {', '.join(cls.name for cls in _OBJECTIVES)}"
        )


class Padded(NamedTuple):
    """A padded batch: B sequences of up to T tokens."""

    input_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T)
    labels: Tensor  # (B, T), unshifted, −100 ignored
    spans: Tensor  # (B, 2) on the host: where the labels of each sequence begin and end

    @classmethod
    def of(cls, store: TokenStore, sequences: Sequence[int], pad_token_id: int) -> "Padded":
        """Pad sequences of a store on the right, as open-unlearning's collator does."""
        ids = [torch.from_numpy(store[index].astype(np.int64)) for index in sequences]
        labels = [row.clone() for row in ids]
        spans = torch.tensor([(store.label_starts[index], store.lengths[index]) for index in sequences])
        for row, start in zip(labels, spans[:, 0], strict=True):
            row[:start] = IGNORE
        padded = pad_sequence(ids, batch_first=True, padding_value=pad_token_id)
        # Its mask also hides real tokens that equal the padding token, such as an end-of-sequence token.
        mask = padded.ne(pad_token_id)
        return cls(padded, mask, pad_sequence(labels, batch_first=True, padding_value=IGNORE), spans)

    def to(self, device: torch.device | str) -> "Padded":
        """Return it on a device."""
        ids, mask, labels = (to_device(tensor, torch.device(device)) for tensor in self[:3])
        return Padded(ids, mask, labels, self.spans)

    def run(self, model: nn.Module) -> Tensor:
        """Return the logits (B, T, V) in float32, as the models of transformers 4.45 do."""
        logits: Tensor = model(input_ids=self.input_ids, attention_mask=self.attention_mask).logits
        return logits.float()

    def answers(self) -> Tensor:
        """Return where the answer tokens stand, (B, T)."""
        return self.labels != IGNORE

    @property
    def predicted(self) -> int:
        """The labels after the first position, which nothing predicts: what open-unlearning's token means run over."""
        return int((self.spans[:, 1] - self.spans[:, 0].clamp(min=1)).sum())


@dataclass(frozen=True)
class PaddedPairs:
    """A micro-batch of pairs; None for a data set that the objective does not read.

    Attributes:
        position: the micro-batch's number in the run, from 0.
    """

    forget: Padded | None
    retain: Padded | None
    alternate: Padded | None = None
    position: int = 0

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
        forget, retain, alternate = (None if part is None else part.to(device) for part in self.parts)
        return PaddedPairs(forget, retain, alternate, self.position)


@dataclass(frozen=True)
class PaddedStep:
    """The micro-batches of an optimizer step."""

    batches: tuple[PaddedPairs, ...]

    @property
    def tokens(self) -> int:
        """Positions that the model reads, padding included."""
        return sum(batch.tokens for batch in self.batches)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PaddedStep":
        """Return the step with its batches on ``device``."""
        return replace(self, batches=tuple(batch.to(device) for batch in self.batches))


class PaddedSteps(Steps[PaddedStep]):
    """Steps of padded micro-batches; an epoch is what transformers counts as one.

    Args:
        packed: plans the pairs; its steps are our micro-batches.
        alternate: other answers to the forget questions, or None; of several to a question, which lie row by row, one
            is drawn whenever the row is read.
        replaced: whether they take the place of the forget sequences, instead of going with them.
        accumulate: gradient accumulation steps.
        seed: of the draws.
        pad_token_id: what sequences are padded with.
    """

    def __init__(
        self,
        packed: PackedSteps,
        alternate: TokenStore | None = None,
        *,
        replaced: bool = False,
        accumulate: int,
        seed: int,
        pad_token_id: int,
    ) -> None:
        self._packed, self._pad_token_id = packed, pad_token_id
        self.stores = packed.stores
        self._alternate, self._replaced, self._seed = alternate, replaced, seed
        self.accumulation = Accumulation(len(packed), accumulate)
        self._epoch = 0
        # A step may read the end of an epoch and the start of the next.
        self._plan: Callable[[int], EpochPlan] = functools.lru_cache(maxsize=2)(packed.plan)

    def __len__(self) -> int:
        """Return the optimizer steps that an epoch counts as."""
        return self.accumulation.steps

    @property
    def pairs(self) -> int:
        """Pairs of an epoch."""
        return self._packed.pairs

    def begin_epoch(self, epoch: int) -> None:
        """Number the items on from the steps of so many epochs."""
        self._epoch = epoch

    def __getitem__(self, step: int) -> PaddedStep:
        """Return a step."""
        before = self._epoch * len(self) + step
        batches = range(self.accumulation.read(before), self.accumulation.read(before + 1))
        return PaddedStep(tuple(self._pairs(position) for position in batches))

    def retain_draw(self, epoch: int) -> Iterator[Padded]:
        """Draw the retain micro-batches of an epoch once more, for the dual variable after ``epoch``."""
        plan = self._packed.plan(DUAL_EPOCHS + epoch)
        for batch in range(len(plan)):
            retain = self._part(self.stores[1], plan.pairs(batch)[1])
            if retain is not None:
                yield retain

    def _pairs(self, position: int) -> PaddedPairs:
        epoch, batch = divmod(position, self.accumulation.batches)
        index, retained = self._plan(epoch).pairs(batch)
        forget, retain = self.stores[:2]
        own, kept = self._part(forget, index), self._part(retain, retained)
        if self._alternate is None:
            return PaddedPairs(own, kept, None, position)
        answers = len(self._alternate) // len(forget)
        draw = np.random.Generator(np.random.Philox(key=self._seed, counter=position))
        other = self._part(self._alternate, index * answers + draw.integers(answers, size=len(index)))
        return PaddedPairs(other, kept, None, position) if self._replaced else PaddedPairs(own, kept, other, position)

    def _part(self, store: TokenStore, index: NDArray[np.int64]) -> Padded | None:
        return Padded.of(store, index.tolist(), self._pad_token_id) if len(index) else None


class PaddedLoss(NamedTuple):
    """A micro-batch's loss, which carries the gradient, and its two parts, not weighted, which do not."""

    loss: Tensor
    forget: Tensor
    retain: Tensor


Frozen = Callable[[], AbstractContextManager[Any]]
"""Hands out the frozen model for a forward pass, in the precision that the policy has."""


def padded_loss(
    objective: Objective,
    model: Any,
    reference: ModelReference | None,
    pairs: PaddedPairs,
    *,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> PaddedLoss:
    """The loss of a micro-batch: gamma · forget loss + alpha · retain loss.

    Args:
        objective: with a formula in open-unlearning, or ``IdkNLL``.
        model: called with ``input_ids`` and ``attention_mask``.
        reference: the frozen model, where the objective reads one.
        pairs: on the model's device.
        autocast: what the frozen model runs under: accelerate casts open-unlearning's as it casts the policy.

    Raises:
        TypeError: an objective that open-unlearning does not have.
    """
    frozen = functools.partial(_running, reference, autocast)
    zero = torch.zeros((), device=next(part for part in pairs.parts if part is not None).input_ids.device)
    forget = zero if pairs.forget is None else _forget_loss(objective, model, frozen, pairs.forget, pairs.alternate)
    retain = zero if pairs.retain is None else _retain_loss(objective, model, frozen, pairs.retain)
    shift = objective.retain_loss_eps if isinstance(objective, PDU) else 0.0
    loss = objective.gamma * forget + objective.alpha * (retain - shift)
    return PaddedLoss(loss, forget.detach(), retain.detach())


def _forget_loss(objective: Objective, model: Any, frozen: Frozen, forget: Padded, alternate: Padded | None) -> Tensor:
    match objective:
        case RMU():
            activations = _activations(model, forget, objective.module_regex)
            vector = objective.steering_vector(activations.shape[-1]).to(activations.dtype)
            vector = to_device(vector, activations.device)
            return _activation_loss(activations, vector.expand_as(activations), forget)
        case UNDIAL():
            return _undial(forget.run(model), _frozen_logits(frozen, forget), forget, objective.beta)
        case PDU():
            logits = forget.run(model)
            margins = (logits.amax(-1) - logits.mean(-1)).square()
            return (margins * forget.answers()).sum() / forget.answers().sum()
        case CEU():
            return _ceu(forget.run(model), forget, objective.ignore_first_n_answer_tokens)
    term = objective.term()
    if not isinstance(term, Term):  # refused before
        raise TypeError(f"`objective`: expected one of open-unlearning's, got {type(objective).__name__}")
    parts = [forget] if alternate is None else [forget, alternate]
    nll = [_each_nll(part.run(model), part) for part in parts]
    if objective.needs_reference:
        sequences = _compared(nll, [_each_nll(_frozen_logits(frozen, part), part) for part in parts])
    else:
        sequences = _labels(nll[0], forget)
    return _sum(term, sequences) / (len(nll[0]) if objective.mean_over == "sequences" else forget.predicted)


def _retain_loss(objective: Objective, model: Any, frozen: Frozen, retain: Padded) -> Tensor:
    if objective.retain_loss_type == "NLL":
        return _mean_nll(retain.run(model), retain)
    if isinstance(objective, RMU) and objective.compares_activations:
        with torch.no_grad(), frozen() as reference:
            target = _activations(reference, retain, objective.module_regex)
        return _activation_loss(_activations(model, retain, objective.module_regex), target, retain)
    logits, frozen_logits = retain.run(model), _frozen_logits(frozen, retain)
    p, q = (F.log_softmax(each.flatten(0, 1), dim=-1) for each in (logits, frozen_logits))
    return F.kl_div(p, q, reduction="batchmean", log_target=True)


@torch.no_grad()
def drawn_retain_loss(model: Any, batches: Iterator[Padded]) -> float:
    """Return the mean over micro-batches of their retain NLL, what PDU's dual variable ascends by after an epoch."""
    losses = [float(_mean_nll(batch.run(model), batch)) for batch in batches]
    return sum(losses) / len(losses)


def _each_nll(logits: Tensor, batch: Padded) -> Tensor:
    """(B, T − 1), 0 where there is no label."""
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), batch.labels[:, 1:], ignore_index=IGNORE, reduction="none")


def _labels(nll: Tensor, batch: Padded) -> Sequences:
    """Return the sequences of a batch, a row for each label.

    A label in the first position, which nothing predicts, has 0: SimNPO's mean counts it.
    """
    spans = zip(F.pad(-nll, (1, 0)), batch.spans.tolist(), strict=True)
    offsets = F.pad(batch.spans.diff().flatten().cumsum(0), (1, 0))
    return Sequences(torch.cat([row[start:end] for row, (start, end) in spans]), to_device(offsets, nll.device))


def _compared(nll: list[Tensor], frozen_nll: list[Tensor]) -> Sequences:
    """Return the sequences of a batch, each before its alternate where there are two parts, and their references.

    NPO and DPO read sums alone: one row a sequence, added up as theirs is, for L − L_ref shows how a sum was rounded.
    """
    sums, reference_sums = (-torch.stack([part.sum(-1) for part in parts], 1).flatten() for parts in (nll, frozen_nll))
    return Sequences(sums, torch.arange(len(sums) + 1, device=sums.device), 0, reference_sums)


def _sum(term: Term, sequences: Sequences) -> Tensor:
    """Return the sum of a term over sequences; of DPO's over those that an alternate follows, every other one."""
    terms, roles = {int(Role.FORGET): term}, [Role.FORGET] * len(sequences)
    if term.kind == Kind.DPO:
        terms[Role.ALTERNATE] = Term(Kind.ALTERNATE)
        roles[1::2] = [Role.ALTERNATE] * (len(sequences) // 2)
    rule = SequenceRule.of(to_device(torch.tensor(roles, dtype=torch.int8), sequences.logprobs.device), terms)
    return rule(sequences).sum()


def _mean_nll(logits: Tensor, batch: Padded) -> Tensor:
    return _sum(Term(Kind.NLL), _labels(_each_nll(logits, batch), batch)) / batch.predicted


def _undial(logits: Tensor, teacher: Tensor, batch: Padded, beta: float) -> Tensor:
    shifted = teacher[:, :-1].clone()
    index = batch.labels[:, 1:, None] % shifted.shape[-1]  # −100 is an index to theirs: the hundredth from the end
    shifted.scatter_add_(-1, index, torch.full_like(index, -beta, dtype=shifted.dtype))
    soft = shifted.softmax(-1).flatten(0, 1)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), soft)


def _ceu(logits: Tensor, batch: Padded, ignored: int) -> Tensor:
    answers = batch.answers()
    labels = batch.labels.masked_fill((answers.cumsum(-1) <= ignored) & answers, IGNORE)[:, 1:]
    kept = labels != IGNORE
    rows, targets = logits[:, :-1][kept], labels[kept]
    soft = rows.detach().scatter(-1, targets[:, None], -torch.inf).softmax(-1)
    return F.cross_entropy(rows, soft)


def _activations(model: Any, batch: Padded, module_regex: str) -> Tensor:
    with watched(getattr(model, "module", model), module_regex) as watch:
        batch.run(model)
    return watch.output()


def _activation_loss(activations: Tensor, target: Tensor, batch: Padded) -> Tensor:
    answers = batch.answers()
    squared = F.mse_loss(activations, target, reduction="none") * answers[..., None]  # (B, T, D)
    sums, counts = squared.mean(2).sum(1), answers.sum(1, keepdim=True)  # (B,), (B, 1)
    # Theirs divides one by the other: (B, B), every sequence's sum over every sequence's count.
    return (sums / counts).mean()


@contextmanager
def _running(
    reference: ModelReference | None, autocast: Callable[[], AbstractContextManager[Any]]
) -> Iterator[PreTrainedModel]:
    if reference is None:
        raise ValueError("`reference`: the objective compares with a frozen model, got none")
    with reference.running() as model, autocast():
        yield model


@torch.no_grad()
def _frozen_logits(frozen: Frozen, batch: Padded) -> Tensor:
    with frozen() as model:
        return batch.run(model)


class PaddedStepping(Stepping):
    """open-unlearning's way of stepping, with the losses above."""

    runs_reference = True
    draws_refusals = True
    steps: PaddedSteps

    def __init__(
        self,
        args: UnlearnArguments,
        stores: Stores,
        objective: Objective | None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """See ``Stepping``; the tokenizer knows what sequences are padded with."""
        pad_token_id = getattr(tokenizer, "pad_token_id", None)
        if pad_token_id is None:
            pad_token_id = getattr(tokenizer, "eos_token_id", None)
        micro_batches = planned_steps(
            args,
            stores._replace(alternate=None),
            pairs_per_step=self.planned_pairs(args),
            token_budget=2**31 - 1,  # there is none
        )
        self.steps = PaddedSteps(
            micro_batches,
            stores.alternate,
            replaced=objective is not None and objective.forget_data == "alternate",
            accumulate=pairs_per_step(args) // self.planned_pairs(args),
            seed=args.seed,
            pad_token_id=0 if pad_token_id is None else int(pad_token_id),
        )
        self.epoch_pairs = len(stores.forget)

    @classmethod
    def planned_pairs(cls, args: UnlearnArguments) -> int:
        """Return those of a micro-batch: an epoch is no whole number of steps."""
        return int(args.per_device_train_batch_size)

    @classmethod
    def check_objective(cls, objective: Objective) -> None:
        """See ``check_objective``."""
        check_objective(objective)

    @classmethod
    def choose_weights(cls, model: PreTrainedModel, objective: RMU) -> None:
        """Leave all as they are, see ``optimizing``; expressions that match nothing are refused now."""
        with training_only(model, objective.trainable_params_regex):
            pass

    def loss(
        self, run: SteppedTrainer, model: nn.Module, batch: PaddedPairs, step: PaddedStep
    ) -> tuple[Tensor, PaddedLoss]:
        """Means run over the micro-batch, not over the step."""
        if run.objective is None:
            raise TypeError("`objective`: expected one, got None")  # refused before
        frozen = run.reference if isinstance(run.reference, ModelReference) else None
        output = padded_loss(run.objective, model, frozen, batch, autocast=run.accelerator.autocast)
        divisor = self.steps.accumulation.accumulate
        run.meter.add_losses(batch.tokens, forget=output.forget / divisor, retain=output.retain / divisor)
        return output.loss / divisor, output

    def optimizing(self, model: Any, objective: Objective | None) -> AbstractContextManager[None]:
        """Hide RMU's unlisted parameters from the optimizer.

        They have gradients all the same, which count in the norm that gradients are clipped to.
        """
        return training_only(model, objective.trainable_params_regex) if isinstance(objective, RMU) else nullcontext()

    def decayed(self, model: nn.Module, names: list[str]) -> list[str]:
        """See ``decayed_parameters``."""
        return decayed_parameters(model)

    def learning(self, model: nn.Module, optimizer: Any) -> list[nn.Parameter]:
        """Return the optimizer's parameters: others have gradients, too."""
        return [weight for group in optimizer.param_groups for weight in group["params"]]

    def dual_before_batch(self, run: SteppedTrainer, objective: PDU, batch: PaddedPairs) -> float | None:
        """At the start of an epoch but the first, the loss of retain rows drawn anew, as many as it has pairs."""
        accumulation = self.steps.accumulation
        epoch, begun = divmod(batch.position, accumulation.batches)
        if objective.dual_update_upon != "epoch" or begun or not epoch:
            return None
        if accumulation.epochs_at_border(batch.position) < objective.dual_warmup_epochs:
            return None
        draw = (retain.to(run.args.device) for retain in self.steps.retain_draw(epoch - 1))
        with undisturbed(run.model):
            return drawn_retain_loss(run.model, draw)

    def dual_after_batch(
        self, run: SteppedTrainer, objective: PDU, batch: PaddedPairs, step: PaddedStep, output: PaddedLoss
    ) -> float | None:
        """The retain loss of each micro-batch, once it is warm.

        What open-unlearning's trainer knows of the epochs that have passed is the last end of an epoch.
        """
        if objective.dual_update_upon != "step":
            return None
        warm_up = objective.dual_warmup_epochs
        warm = warm_up == 0 or self.steps.accumulation.epochs_at_border(batch.position) >= warm_up
        return float(output.retain) if warm else None
