"""The ``Objective`` base class: loss terms of forget and retain sequences, averaged over a whole optimizer step."""

import math
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from efface.batching.plan import Role, StepTotals
from efface.objectives.role_loss import DistributionLoss, RoleLoss
from efface.registry import Registry
from efface_kernels import Kind, SequenceRule, Sequences, Term, TermFunction, checked_terms

RETAIN_LOSS_TYPES = ("NLL", "KL")


@dataclass(frozen=True, kw_only=True)
class Objective:
    """loss = gamma · mean(forget terms) + alpha · retain loss.

    The parameters have the same names as in open-unlearning. A subclass sets the class variables, and either defines
    ``forget_terms`` or overrides ``term`` to return a built-in ``efface_kernels.Term``.

    Attributes:
        gamma: weight of the forget term.
        alpha: weight of the retain term; with 0, no retain data is needed.
        retain_loss_type: "NLL", the cross entropy of the retain labels, or "KL", the divergence from the frozen model's
            distributions at the retain labels.
        name: name of the objective on the command line.
        mean_over: whether the forget terms are averaged over the sequences or over the label tokens of the step.
        forget_data: which answer a forget question is paired with: "answer" (its own), "alternate" (a refusal, or the
            answer in another column), or "both" (the two answers as a pair).
        needs_reference: whether the objective reads ``Sequences.reference_sums``.
        reads: input of the forget loss. Objectives that read "logits" or "activations" have no ``term``.
        retain_loss_types: supported values of ``retain_loss_type``.
    """

    gamma: float = 1.0
    alpha: float = 1.0
    retain_loss_type: str = "NLL"

    name: ClassVar[str]
    mean_over: ClassVar[Literal["sequences", "tokens"]] = "sequences"
    forget_data: ClassVar[Literal["answer", "alternate", "both"]] = "answer"
    needs_reference: ClassVar[bool] = False
    reads: ClassVar[Literal["logprobs", "logits", "activations"]] = "logprobs"
    retain_loss_types: ClassVar[tuple[str, ...]] = RETAIN_LOSS_TYPES

    def __post_init__(self) -> None:
        check_choice("retain_loss_type", self.retain_loss_type, self.retain_loss_types)
        for field in fields(self):
            if field.type in (float, "float"):
                _check_number(field.name, getattr(self, field.name))
        check_finite("gamma", self.gamma)
        check_finite("alpha", self.alpha)

    def __init_subclass__(cls, **options: Any) -> None:
        """Raise TypeError if a subclass defines ``forget_terms`` but inherits a ``term`` that would be used instead."""
        super().__init_subclass__(**options)
        mro = cls.__mro__
        function, term = (
            next(place for place, base in enumerate(mro) if name in vars(base)) for name in ("forget_terms", "term")
        )
        if function < term and mro[term] is not Objective:
            raise TypeError(
                f"{cls.__name__}: defines forget_terms, but inherits `term` from {mro[term].__name__}, which would be "
                "used instead; derive from Objective, or define `term` too"
            )

    def term(self) -> Term | TermFunction:
        """Return the loss term of a forget sequence, before the division by the number of sequences or tokens.

        It is a ``Term``, made from one of ``efface_kernels.Kind`` and its parameters, or a function of ``Sequences``.

        Raises:
            TypeError: if the forget loss is not a function of log-probabilities.
        """
        if self.reads != "logprobs":
            raise TypeError(f"{type(self).__name__}: its forget loss is computed from {self.reads}, so it has no term")
        return self.forget_terms

    def forget_terms(self, sequences: Sequences) -> Tensor:
        """Return the loss terms (s,) of forget sequences; a user-defined objective overrides this, in torch.

        Raises:
            TypeError: if the objective does not define it, as is the case for the built-in objectives.
        """
        raise TypeError(f"{type(self).__name__}: defines no forget_terms; built-in objectives define `term` instead")

    def forget_loss(self) -> RoleLoss | None:
        """Return the forget loss if it needs more than log-probabilities, or None if ``term`` is the forget loss."""
        return None

    def retain_loss(self) -> RoleLoss | None:
        """Return the retain loss if it is not the NLL (that is, for "KL" with alpha ≠ 0), or None."""
        return DistributionLoss() if self.retain_loss_type == "KL" and self.alpha else None

    def reads_retain(self) -> bool:
        """Return whether the loss has a retain term."""
        return self.alpha != 0

    def reads_forget_reference(self) -> bool:
        """Return whether the forget terms read values of the frozen model."""
        return self.needs_reference or isinstance(self.forget_loss(), DistributionLoss)

    def needs_reference_model(self) -> bool:
        """Return whether the frozen model must run, because more than its log-probabilities is read."""
        return any(isinstance(loss, DistributionLoss) for loss in (self.forget_loss(), self.retain_loss()))

    def forget_weight(self, totals: StepTotals) -> float:
        """Return gamma divided by the number of forget sequences or forget label tokens (``mean_over``) of the step."""
        count = totals.forget_sequences if self.mean_over == "sequences" else totals.forget_tokens
        return self.gamma / max(count, 1)

    def retain_weight(self, totals: StepTotals) -> float:
        """Return alpha divided by the number of retain label tokens of the step."""
        return self.alpha / max(totals.retain_tokens, 1)


def _check_number(name: str, value: object) -> None:
    """Raise TypeError unless ``value`` converts to float; tensors and arrays pass, str and bytes do not."""
    if isinstance(value, (str, bytes)) or not hasattr(value, "__float__"):
        raise TypeError(f"`{name}`: expected a number, got {value!r}")


def check_finite(name: str, value: float) -> None:
    """Raise ValueError unless ``value`` is finite."""
    _check_number(name, value)
    if not math.isfinite(value):
        raise ValueError(f"`{name}`: expected a finite number, got {value}")


def check_positive(name: str, value: float) -> None:
    """Raise ValueError unless ``value`` is positive and finite."""
    _check_number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"`{name}`: expected a positive number, got {value}")


def check_not_negative(name: str, value: float) -> None:
    """Raise ValueError unless ``value`` is 0, or positive and finite."""
    _check_number(name, value)
    if not 0 <= value < math.inf:
        raise ValueError(f"`{name}`: expected 0 or a positive number, got {value}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"`{name}`: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_term(objective: Objective) -> None:
    """Raise ValueError if the objective's class variables contradict the ``Term`` that it declares."""
    term = objective.term() if objective.reads == "logprobs" else None
    if not isinstance(term, Term):
        return
    name, pair = type(objective).__name__, term.kind == Kind.DPO
    if term.kind in (Kind.NONE, Kind.ALTERNATE):
        raise ValueError(
            f"{name}: expected a term for forget sequences, got {term.kind.name}, which has no loss; use another Kind"
        )
    if term.needs_reference and not objective.needs_reference:
        raise ValueError(
            f"{name}: its term, {term.kind.name}, reads reference log-probabilities; set `needs_reference = True`"
        )
    if pair != (objective.forget_data == "both"):
        expected = "'both'" if pair else "'answer' or 'alternate'"
        raise ValueError(
            f"{name}: `forget_data`: expected {expected} for its term, {term.kind.name}, got {objective.forget_data!r}"
        )


def step_terms(
    objective: Objective | None, roles: Tensor, totals: StepTotals, *, forgets: bool = True
) -> SequenceRule | TermFunction:
    """Return the rule for the loss terms of a batch of forget and retain sequences, for ``linear_sequence_loss``.

    The terms, summed over all micro-batches of a step on all ranks, give the step's loss.

    Args:
        objective: the objective; None uses the plain NLL for every sequence (fine-tuning).
        roles: (S,) int8 on the device, a ``Role`` for each sequence of the batch.
        totals: totals of the optimizer step.
        forgets: whether the batch contains forget sequences; if not, it needs neither a reference nor pairs.
    """
    weight = 1 / max(totals.retain_tokens, 1) if objective is None else objective.retain_weight(totals)
    terms: dict[int, Term] = {Role.RETAIN: Term(Kind.NLL, weight)}
    if objective is None or not forgets or objective.reads != "logprobs":
        return SequenceRule.of(roles, terms)
    term, weight = objective.term(), objective.forget_weight(totals)
    if not isinstance(term, Term):
        return _UserTerms(term, weight, roles, SequenceRule.of(roles, terms))
    terms[Role.FORGET] = replace(term, weight=term.weight * weight)
    if term.kind == Kind.DPO:
        terms[Role.ALTERNATE] = Term(Kind.ALTERNATE)
    return SequenceRule.of(roles, terms)


@dataclass(frozen=True)
class _UserTerms:
    """A user-defined function for the forget sequences, times a weight, and a built-in rule for the others."""

    function: TermFunction
    weight: float
    roles: Tensor  # (S,)
    others: SequenceRule

    def __call__(self, sequences: Sequences) -> Tensor:
        roles = sequences.own(self.roles)
        # The user's function gets the other roles' log-probabilities as constants. Its terms for them are dropped
        # below, but if they are infinite, their gradient would be NaN.
        read_rows = sequences.of_rows((roles == Role.FORGET) | (roles == Role.ALTERNATE))
        logprobs = torch.where(read_rows, sequences.logprobs, sequences.logprobs.detach())
        forget = checked_terms(self.function(replace(sequences, logprobs=logprobs)), sequences)
        return torch.where(roles == Role.FORGET, forget * self.weight, self.others(sequences))


_OBJECTIVES: Registry[Objective] = Registry("objective")

T = TypeVar("T", bound=type[Objective])


def register_objective(cls: T) -> T:
    """Register an ``Objective`` subclass under its ``name``; a class decorator.

    Raises:
        ValueError: if another class is registered under the name.
    """
    return _OBJECTIVES.register(cls)


def known_objectives() -> dict[str, type[Objective]]:
    """Return the registered objective classes by name, in the order of the names."""
    return _OBJECTIVES.known()


def get_objective(name: str, **parameters: Any) -> Objective:
    """Return the objective registered as ``name`` with the given parameters; case and underscores are ignored.

    Raises:
        ValueError: if the name is unknown, or if the objective has no such parameter. The message lists the known
            names or the parameters of the objective.
    """
    return _OBJECTIVES.make(name, **parameters)
