"""What an objective is: per-sequence loss terms, and means that run over the whole optimizer step."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from efface.batching.roles import Role, StepTotals
from efface.objectives.role_loss import DistributionLoss, RoleLoss
from efface_kernels import Kind, SequenceRule, Sequences, Term

RETAIN_LOSS_TYPES = ("NLL", "KL")


@dataclass(frozen=True, kw_only=True)
class Objective:
    """loss = gamma · mean(forget terms) + alpha · retain loss.

    Parameter names are those of open-unlearning. A subclass sets the class variables and ``forget_terms``.

    Attributes:
        gamma: weight of the forget term.
        alpha: weight of the retain term; 0 needs no retain data.
        retain_loss_type: "NLL", the cross entropy of the retain labels, or "KL", the divergence from the frozen model's
            distributions at the retain labels.
        name: what the command line calls it.
        mean_over: what the mean of the forget terms runs over, sequences or label tokens of the step.
        forget_data: the answers that a forget question comes with: its own, an alternate (refusals, or a column), or
            both, as a pair.
        needs_reference: whether ``Sequences.reference_sums`` is read.
        reads: what the forget loss is a function of; "logits" and "activations" define no ``forget_terms``.
    """

    gamma: float = 1.0
    alpha: float = 1.0
    retain_loss_type: str = "NLL"

    name: ClassVar[str]
    mean_over: ClassVar[Literal["sequences", "tokens"]] = "sequences"
    forget_data: ClassVar[Literal["answer", "alternate", "both"]] = "answer"
    needs_reference: ClassVar[bool] = False
    reads: ClassVar[Literal["logprobs", "logits", "activations"]] = "logprobs"

    def __post_init__(self) -> None:
        check_choice("retain_loss_type", self.retain_loss_type, RETAIN_LOSS_TYPES)

    def forget_terms(self, sequences: Sequences) -> Tensor:
        """Return the loss terms (s,) of forget sequences, not yet divided by what the mean runs over.

        Raises:
            TypeError: the forget loss is no function of log-probabilities.
        """
        raise TypeError(f"{type(self).__name__}: its forget loss is one of {self.reads}; it defines no forget_terms")

    def forget_term(self) -> Term | None:
        """Return what ``forget_terms`` computes, declared for the Triton backend's one launch; None: a function only.

        Whoever overrides ``forget_terms`` overrides this as well, or is computed by the function.
        """
        return None

    def forget_loss(self) -> RoleLoss | None:
        """Return what takes the place of ``forget_terms`` where log-probabilities are not enough."""
        return None

    def retain_loss(self) -> RoleLoss | None:
        """Return what takes the place of the retain NLL."""
        return DistributionLoss() if self.retain_loss_type == "KL" and self.alpha else None

    def reads_retain(self) -> bool:
        """Whether there is a retain term."""
        return self.alpha != 0

    def reads_forget_reference(self) -> bool:
        """Whether the forget terms compare with a frozen model."""
        return self.needs_reference or isinstance(self.forget_loss(), DistributionLoss)

    def needs_reference_model(self) -> bool:
        """Whether more of a reference is read than log-probabilities, so that a model must run."""
        return any(isinstance(loss, DistributionLoss) for loss in (self.forget_loss(), self.retain_loss()))

    def forget_weight(self, totals: StepTotals) -> float:
        """Gamma divided by what the forget mean of this step runs over."""
        count = totals.forget_sequences if self.mean_over == "sequences" else totals.forget_tokens
        return self.gamma / max(count, 1)

    def retain_weight(self, totals: StepTotals) -> float:
        """Alpha divided by the retain label tokens of this step."""
        return self.alpha / max(totals.retain_tokens, 1)


def nll_terms(sequences: Sequences) -> Tensor:
    """−L_s. Divided by the label tokens it is the cross entropy of a Hugging Face causal language model."""
    return -sequences.sums


def check_positive(name: str, value: float) -> None:
    """Raise ValueError unless ``value`` is positive."""
    if not value > 0:
        raise ValueError(f"`{name}`: expected a positive number, got {value}")


def check_not_negative(name: str, value: float) -> None:
    """Raise ValueError unless ``value`` is 0 or positive."""
    if not value >= 0:
        raise ValueError(f"`{name}`: expected 0 or a positive number, got {value}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"`{name}`: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def reference_sums(sequences: Sequences, name: str) -> Tensor:
    """Return L_ref (s,), which ``name`` cannot do without.

    Raises:
        ValueError: none were given.
    """
    if sequences.reference_sums is None:
        raise ValueError(
            f"{name} needs the reference model's sequence log-probabilities, got none; give a live or cached reference"
        )
    return sequences.reference_sums


@dataclass(frozen=True)
class StepTerms:
    """The loss terms of a batch that mixes forget and retain sequences; what ``linear_sequence_loss`` calls.

    Attributes:
        objective: whose terms; None where every sequence is plain NLL (fine-tuning).
        roles: (S,) int8 on the device, a ``Role`` for each sequence of the batch.
        totals: of the optimizer step.
    """

    objective: Objective | None
    roles: Tensor
    totals: StepTotals

    def __call__(self, sequences: Sequences) -> Tensor:
        """Weighted terms (s,); their sum over the micro-batches of a step, on all ranks, is the step's loss."""
        roles = sequences.own(self.roles)
        terms = torch.where(roles == Role.RETAIN, nll_terms(sequences) * self._retain_weight, 0)
        if self.objective is not None and self.objective.reads == "logprobs":
            # Others' rows are constants to it: what it makes of them, infinite perhaps, has no gradient.
            theirs = sequences.of_rows((roles == Role.FORGET) | (roles == Role.ALTERNATE))
            logprobs = torch.where(theirs, sequences.logprobs, sequences.logprobs.detach())
            seen = replace(sequences, logprobs=logprobs)
            forget = self.objective.forget_terms(seen) * self.objective.forget_weight(self.totals)
            terms = torch.where(roles == Role.FORGET, forget, terms)
        return terms

    def rule(self, *, forgets: bool) -> SequenceRule | None:
        """Return the same terms as a rule; None where the objective declares none.

        Args:
            forgets: whether the batch has forget sequences: without them it needs neither a reference nor pairs.
        """
        terms: dict[int, Term] = {Role.RETAIN: Term(Kind.NLL, self._retain_weight)}
        objective = self.objective
        if forgets and objective is not None and objective.reads == "logprobs":
            term = _declared(objective)
            if term is None:
                return None
            terms[Role.FORGET] = replace(term, weight=objective.forget_weight(self.totals))
            if term.kind == Kind.DPO:
                terms[Role.ALTERNATE] = Term(Kind.ALTERNATE)
        return SequenceRule.of(self.roles, terms)

    @property
    def _retain_weight(self) -> float:
        if self.objective is None:
            return 1 / max(self.totals.retain_tokens, 1)
        return self.objective.retain_weight(self.totals)


def _declared(objective: Objective) -> Term | None:
    """Return the declared term, unless it is of a class whose ``forget_terms`` a subclass has replaced."""
    author = next(cls for cls in type(objective).__mro__ if "forget_terms" in vars(cls))
    return objective.forget_term() if "forget_term" in vars(author) else None
