"""Exact reproduction of open-unlearning's training step, to match earlier runs (``compat="open-unlearning"``).

Batches are padded, each data set has its own forward pass with full logits, and the reference is a second model. Means
are over each micro-batch of ``per_device_train_batch_size`` pairs. The losses of a step's micro-batches are added and
divided by the accumulation steps. This code was compared with locuslab/open-unlearning at d3d7cf9, run with the
transformers 4.45.1 and accelerate 0.34.2 that it pins: the losses and gradients of every method agree to rounding, and
so do the weights after runs over the same pairs.

Differences between runs with and without ``compat``, all taken from open-unlearning:

- Token means weight short and long micro-batches equally, so gradient accumulation changes the result.
- Prompts and labels equal open-unlearning's token for token; see ``efface.hf.text.templates.get_template``.
- The attention mask hides real tokens that equal the padding token, such as an end-of-sequence token.
- KL is over all positions, including prompts and padding. So is UNDIAL, which at positions without a label lowers the
  reference model's logit of token V - 100 (the label -100, used as an index).
- RMU divides every sequence's squared distance by every sequence's number of answer tokens, and takes the mean over
  both. Parameters outside ``trainable_params_regex`` are not updated but have gradients, which count in the norm for
  gradient clipping.
- PDU takes margins at the answer tokens, not at the tokens that predict them. Its dual variable ascends with every
  micro-batch. With ``dual_update_upon="epoch"`` it ascends by the mean loss over newly drawn micro-batches with as many
  retain rows as there are forget rows. The warm-up ends when the trainer's epoch count, at the end of an epoch, has
  reached its length; with left-over micro-batches, that is one epoch later.
- Left-over micro-batches of an epoch are part of the first step of the next epoch (see ``Accumulation``). An epoch
  counts as its number of whole steps, and the run ends after that number of steps per epoch.
- ``warmup_epochs`` can give no step at all.
- Weight decay excludes biases, and only those norms that transformers 4.45 recognises: Llama's, but not those of Qwen2,
  Mistral, Phi-3 or Gemma.
- A refusal is drawn each time a row is read.

Remaining differences from open-unlearning:

- Random numbers: shuffles, retain rows, refusals, RMU's steering vector and dropout are drawn from the same
  distributions, but with efface's own generators, so that a killed run resumes bit for bit.
- Defaults: the trainer's settings (optimizer, learning rate, precision, weight decay) have efface's defaults, not those
  of open-unlearning's configuration files. The recipes contain the latter.
- Ends of epochs with left-over micro-batches: here the evaluation, the checkpoint and ``epoch`` in the log follow the
  steps that the epoch counts as; in open-unlearning they come when the epoch's rows have been read. The steps
  themselves and the last step are the same.
- Restarts: a restarted run of open-unlearning continues at another place in its data and loses the carried
  micro-batches; here it resumes bit for bit.
- Processes: one only. With n processes, open-unlearning takes the same step as one process with n times the
  accumulation steps if they divide the micro-batches of an epoch; otherwise it fills the last micro-batches with rows
  from the start of the epoch.
- Errors: a row without an answer token and a loss that is not finite stop the run. CE-U's loss is NaN for a micro-batch
  whose answers consist only of ignored tokens.
- Length: without a chat template, open-unlearning cuts sequences to 512 tokens; here sequences are cut only with
  ``max_length``.
- Refusal files: blank lines are not refusals here.
- Not supported: an epoch over the retain set (``anchor: retain``), PDU with KL, left padding, few-shot prompts.
- Only here: LoRA, ``IdkNLL`` (open-unlearning's GradDiff with gamma -1 on a refusals-only forget set), a retain term
  for CE-U and GradAscent, ``retain_sampling`` other than random, a separate ``reference_model``.
- Autocast: on a CPU with bf16, open-unlearning computes its loss formulas under autocast too. Here, only the models run
  under autocast, as in open-unlearning on a GPU.

Unused with compat: ``token_budget``, ``share_prefixes``, ``chunk_rows``, ``loss_backend``, ``reference_cache`` and
``dataloader_num_workers``.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name in PyTorch
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
"""Offset of the epoch numbers whose plans give the retain rows for PDU's dual variable between two epochs."""

_OBJECTIVES = (CEU, DPO, NPO, PDU, RMU, UNDIAL, WGA, GradAscent, GradDiff, IdkNLL, SatImp, SimNPO)


_UNDECAYED = {
    *("LlamaRMSNorm", "CohereLayerNorm", "ChameleonRMSNorm", "GraniteRMSNorm", "GraniteMoeRMSNorm"),
    *("NemotronLayerNorm1P", "OlmoLayerNorm", "OlmoeRMSNorm", "RecurrentGemmaRMSNorm"),
}
"""Norm classes that transformers 4.45 excludes from weight decay, in addition to ``nn.LayerNorm``."""


def decayed_parameters(model: nn.Module) -> list[str]:
    """Return the names of the parameters to which transformers 4.45 applies weight decay."""
    norms = {type(module) for module in model.modules() if type(module).__name__ in _UNDECAYED}
    return [name for name in get_parameter_names(model, [nn.LayerNorm, *norms]) if "bias" not in name]


def check_objective(objective: Objective) -> None:
    """Raise ValueError if open-unlearning does not have the objective; subclasses are not accepted."""
    if type(objective) not in _OBJECTIVES:
        raise ValueError(
            f"`compat`: expected an objective of open-unlearning, got {objective.name!r} ({type(objective).__name__}); "
            f"drop compat, or choose one of {', '.join(cls.name for cls in _OBJECTIVES)}"
        )


class Padded(NamedTuple):
    """A padded batch: B sequences of up to T tokens."""

    input_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T)
    labels: Tensor  # (B, T), unshifted, −100 ignored
    spans: Tensor  # (B, 2) on the host: start and end of each sequence's labels

    @classmethod
    def of(cls, store: TokenStore, sequences: Sequence[int], pad_token_id: int) -> "Padded":
        """Pad sequences of a store on the right, as open-unlearning's collator does."""
        ids = [torch.from_numpy(store[index].astype(np.int64)) for index in sequences]
        labels = [row.clone() for row in ids]
        spans = torch.tensor([(store.label_starts[index], store.lengths[index]) for index in sequences])
        for row, start in zip(labels, spans[:, 0], strict=True):
            row[:start] = IGNORE
        padded = pad_sequence(ids, batch_first=True, padding_value=pad_token_id)
        # open-unlearning's mask also hides real tokens that equal the padding token, such as an EOS token.
        mask = padded.ne(pad_token_id)
        return cls(padded, mask, pad_sequence(labels, batch_first=True, padding_value=IGNORE), spans)

    def to(self, device: torch.device | str) -> "Padded":
        """Return the batch on ``device``; ``spans`` stay on the host."""
        ids, mask, labels = (to_device(tensor, torch.device(device)) for tensor in self[:3])
        return Padded(ids, mask, labels, self.spans)

    def run(self, model: nn.Module) -> Tensor:
        """Return the logits (B, T, V) in float32, as models of transformers 4.45 return them."""
        logits: Tensor = model(input_ids=self.input_ids, attention_mask=self.attention_mask).logits
        return logits.float()

    def answers(self) -> Tensor:
        """Return the mask of answer tokens, (B, T) bool."""
        return self.labels != IGNORE

    @property
    def predicted(self) -> int:
        """Number of labels except those at position 0, which are not predicted: the divisor of the token means."""
        return int((self.spans[:, 1] - self.spans[:, 0].clamp(min=1)).sum())


@dataclass(frozen=True)
class PaddedPairs:
    """A micro-batch of pairs; a data set that the objective does not read is None.

    Attributes:
        position: number of the micro-batch in the run, from 0.
    """

    forget: Padded | None
    retain: Padded | None
    alternate: Padded | None = None
    position: int = 0

    @property
    def parts(self) -> tuple[Padded | None, ...]:
        """The forget, retain and alternate batches, in this order."""
        return self.forget, self.retain, self.alternate

    @property
    def tokens(self) -> int:
        """Number of tokens that the model reads, including padding."""
        return sum(part.input_ids.numel() for part in self.parts if part is not None)

    def to(self, device: torch.device | str) -> "PaddedPairs":
        """Return the micro-batch on ``device``."""
        forget, retain, alternate = (None if part is None else part.to(device) for part in self.parts)
        return PaddedPairs(forget, retain, alternate, self.position)


@dataclass(frozen=True)
class PaddedStep:
    """The micro-batches of an optimizer step."""

    batches: tuple[PaddedPairs, ...]

    @property
    def tokens(self) -> int:
        """Number of tokens that the model reads, including padding."""
        return sum(batch.tokens for batch in self.batches)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PaddedStep":
        """Return the step with its batches on ``device``."""
        return replace(self, batches=tuple(batch.to(device) for batch in self.batches))


class PaddedSteps(Steps[PaddedStep]):
    """Steps of padded micro-batches; an epoch has as many optimizer steps as transformers counts for it.

    Args:
        packed: plans the pairs; each of its steps is one micro-batch here.
        alternate: alternate answers to the forget questions, or None. If there are several per question, stored row by
            row, one of them is drawn each time the row is read.
        replaced: whether the alternate sequences replace the forget sequences instead of accompanying them.
        accumulate: gradient accumulation steps.
        seed: seed of the draws.
        pad_token_id: id of the padding token.
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
        # Two plans, because a step can contain the end of one epoch and the start of the next.
        self._plan: Callable[[int], EpochPlan] = functools.lru_cache(maxsize=2)(packed.planner.plan)

    def __len__(self) -> int:
        """Return the number of optimizer steps per epoch, as transformers counts them."""
        return self.accumulation.steps

    @property
    def pairs(self) -> int:
        """Number of pairs in an epoch."""
        return self._packed.pairs

    def begin_epoch(self, epoch: int) -> None:
        """Switch the items to the steps of ``epoch``."""
        self._epoch = epoch

    def __getitem__(self, step: int) -> PaddedStep:
        """Return step ``step`` of the current epoch."""
        before = self._epoch * len(self) + step
        batches = range(self.accumulation.read(before), self.accumulation.read(before + 1))
        return PaddedStep(tuple(self._pairs(position) for position in batches))

    def retain_draw(self, epoch: int) -> Iterator[Padded]:
        """Yield newly drawn retain micro-batches, as many as in an epoch, for the dual variable after ``epoch``."""
        plan = self._packed.planner.plan(DUAL_EPOCHS + epoch)
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
    """Loss of a micro-batch, with gradient, and its unweighted forget and retain terms, detached."""

    loss: Tensor
    forget: Tensor
    retain: Tensor


Frozen = Callable[[], AbstractContextManager[Any]]
"""Returns a context manager that gives the frozen model for a forward pass, in the precision of the policy."""


def padded_loss(
    objective: Objective,
    model: Any,
    reference: ModelReference | None,
    pairs: PaddedPairs,
    *,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> PaddedLoss:
    """Return the loss of a micro-batch: gamma · forget loss + alpha · retain loss.

    For PDU, ``retain_loss_eps`` is subtracted from the retain loss.

    Args:
        objective: an objective of open-unlearning, or ``IdkNLL``.
        model: the model; called with ``input_ids`` and ``attention_mask``.
        reference: the frozen model; None if the objective needs none.
        pairs: the micro-batch, on the model's device.
        autocast: autocast context of the frozen model; in open-unlearning, accelerate casts it like the policy.

    Raises:
        TypeError: open-unlearning does not have the objective.
        ValueError: the objective needs a reference and there is none.
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
    if not isinstance(term, Term):  # check_objective has rejected it
        raise TypeError(f"`objective`: expected an objective of open-unlearning, got {type(objective).__name__}")
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
    """Return the mean retain NLL over micro-batches, which updates PDU's dual variable after an epoch."""
    losses = [float(_mean_nll(batch.run(model), batch)) for batch in batches]
    return sum(losses) / len(losses)


def _each_nll(logits: Tensor, batch: Padded) -> Tensor:
    """Return the NLL of each token but the first, (B, T − 1); 0 at positions without a label."""
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), batch.labels[:, 1:], ignore_index=IGNORE, reduction="none")


def _labels(nll: Tensor, batch: Padded) -> Sequences:
    """Return the log-probabilities of a batch as ``Sequences``, one row per label.

    A label at position 0, which is not predicted, has log-probability 0 and counts in SimNPO's mean.
    """
    spans = zip(F.pad(-nll, (1, 0)), batch.spans.tolist(), strict=True)
    offsets = F.pad(batch.spans.diff().flatten().cumsum(0), (1, 0))
    return Sequences(torch.cat([row[start:end] for row, (start, end) in spans]), to_device(offsets, nll.device))


def _compared(nll: list[Tensor], frozen_nll: list[Tensor]) -> Sequences:
    """Return the sums of log-probabilities of a batch and of its reference as ``Sequences``, one row per sequence.

    With two parts, each forget sequence is followed by its alternate. NPO and DPO read only these sums. They are added
    in the order of open-unlearning, because L − L_ref is sensitive to the rounding of a sum.
    """
    sums, reference_sums = (-torch.stack([part.sum(-1) for part in parts], 1).flatten() for parts in (nll, frozen_nll))
    return Sequences(sums, torch.arange(len(sums) + 1, device=sums.device), 0, reference_sums)


def _sum(term: Term, sequences: Sequences) -> Tensor:
    """Return the sum of a term over the sequences; for DPO, over forget sequences, each followed by its alternate."""
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
    index = batch.labels[:, 1:, None] % shifted.shape[-1]  # open-unlearning uses −100 as an index: V − 100
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
    # As in open-unlearning, the division broadcasts to (B, B): every sequence's sum by every sequence's count.
    return (sums / counts).mean()


@contextmanager
def _running(
    reference: ModelReference | None, autocast: Callable[[], AbstractContextManager[Any]]
) -> Iterator[PreTrainedModel]:
    if reference is None:
        raise ValueError("`reference`: expected a frozen model, which the objective needs, got none; pass a reference")
    with reference.running() as model, autocast():
        yield model


@torch.no_grad()
def _frozen_logits(frozen: Frozen, batch: Padded) -> Tensor:
    with frozen() as model:
        return batch.run(model)


class PaddedStepping(Stepping):
    """Optimizer steps of open-unlearning, with the losses of ``padded_loss``."""

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
        """Plan the steps of a run; ``tokenizer`` provides the padding token, else its EOS token, else id 0."""
        pad_token_id = getattr(tokenizer, "pad_token_id", None)
        if pad_token_id is None:
            pad_token_id = getattr(tokenizer, "eos_token_id", None)
        micro_batches = planned_steps(
            args,
            stores._replace(alternate=None),
            pairs_per_step=self.planned_pairs(args),
            token_budget=2**31 - 1,  # no limit
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
        """Return the pairs of a micro-batch, because an epoch need not be a whole number of steps."""
        return int(args.per_device_train_batch_size)

    @classmethod
    def check_objective(cls, objective: Objective) -> None:
        """Raise ValueError if open-unlearning does not have the objective."""
        check_objective(objective)

    @classmethod
    def choose_weights(cls, model: PreTrainedModel, objective: RMU) -> None:
        """Raise ValueError if an expression matches no parameter; ``optimizing`` selects the parameters later."""
        with training_only(model, objective.trainable_params_regex):
            pass

    def loss(
        self, run: SteppedTrainer, model: nn.Module, batch: PaddedPairs, step: PaddedStep
    ) -> tuple[Tensor, PaddedLoss]:
        """Run a micro-batch; return its mean loss divided by the accumulation steps, and the ``PaddedLoss``."""
        if run.objective is None:
            raise TypeError("`objective`: expected an objective, got None; pass one")  # FinetuneTrainer rejects compat
        frozen = run.reference if isinstance(run.reference, ModelReference) else None
        output = padded_loss(run.objective, model, frozen, batch, autocast=run.accelerator.autocast)
        divisor = self.steps.accumulation.accumulate
        run.meter.add_losses(batch.tokens, forget=output.forget / divisor, retain=output.retain / divisor)
        return output.loss / divisor, output

    def optimizing(self, model: Any, objective: Objective | None) -> AbstractContextManager[None]:
        """Hide parameters that RMU does not train from the optimizer.

        They still have gradients, which count in the norm for gradient clipping.
        """
        return training_only(model, objective.trainable_params_regex) if isinstance(objective, RMU) else nullcontext()

    def decayed(self, model: nn.Module, names: list[str]) -> list[str]:
        """Return the names of the parameters to which transformers 4.45 applies weight decay."""
        return decayed_parameters(model)

    def learning(self, model: nn.Module, optimizer: Any) -> list[nn.Parameter]:
        """Return the optimizer's parameters; parameters that RMU does not train also have gradients."""
        return [weight for group in optimizer.param_groups for weight in group["params"]]

    def dual_before_batch(self, run: SteppedTrainer, objective: PDU, batch: PaddedPairs) -> float | None:
        """Return the loss of newly drawn retain rows, as many as an epoch's pairs, at the start of each later epoch.

        None within an epoch, in the first epoch, during the warm-up, and with ``dual_update_upon="step"``.
        """
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
        """Return the retain loss of the micro-batch; None during the warm-up and with ``dual_update_upon="epoch"``.

        As in open-unlearning's trainer, the number of epochs passed is updated only at the end of an epoch.
        """
        if objective.dual_update_upon != "step":
            return None
        warm_up = objective.dual_warmup_epochs
        warm = warm_up == 0 or self.steps.accumulation.epochs_at_border(batch.position) >= warm_up
        return float(output.retain) if warm else None
