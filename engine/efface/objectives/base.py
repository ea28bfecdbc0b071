"""What an objective is: loss terms of forget and retain sequences, and means that run over the whole optimizer step."""

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

    Parameter names are those of open-unlearning. A subclass sets the class variables and defines ``forget_terms``, or
    declares its ``term``.

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
        reads: what the forget loss is a function of; "logits" and "activations" have no ``term``.
        retain_loss_types: those that it has.
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
        """Raise TypeError for a class whose ``forget_terms`` would not be asked."""
        super().__init_subclass__(**options)
        mro = cls.__mro__
        function, term = (
            next(place for place, base in enumerate(mro) if name in vars(base)) for name in ("forget_terms", "term")
        )
        if function < term and mro[term] is not Objective:
            raise TypeError(
                f"{cls.__name__}: defines forget_terms, but {mro[term].__name__} declares its term, which is what "
                "counts; derive from Objective, or define `term` too"
            )

    def term(self) -> Term | TermFunction:
        """Return the loss term of a forget sequence, not yet divided by what the mean runs over.

        Declared as one of ``efface_kernels.Kind`` with its parameters, or a function of ``Sequences``.

        Raises:
            TypeError: the forget loss is no function of log-probabilities.
        """
        if self.reads != "logprobs":
            raise TypeError(f"{type(self).__name__}: its forget loss is one of {self.reads}; it has no term")
        return self.forget_terms

    def forget_terms(self, sequences: Sequences) -> Tensor:
        """Return the loss terms (s,) of forget sequences: what an objective of your own defines, in torch.

        Raises:
            TypeError: there is no such function.
        """
        raise TypeError(f"{type(self).__name__}: defines no forget_terms; an objective of ours declares its `term`")

    def forget_loss(self) -> RoleLoss | None:
        """Return what takes the place of ``term`` where log-probabilities are not enough."""
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


def _check_number(name: str, value: object) -> None:
    """Raise TypeError for what is no number, or a tensor or an array of one."""
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
    """Raise ValueError for a declared term that the objective's class variables do not fit."""
    term = objective.term() if objective.reads == "logprobs" else None
    if not isinstance(term, Term):
        return
    name, pair = type(objective).__name__, term.kind == Kind.DPO
    if term.kind in (Kind.NONE, Kind.ALTERNATE):
        raise ValueError(f"{name}: expected a term for forget sequences, got {term.kind.name}, which forgets nothing")
    if term.needs_reference and not objective.needs_reference:
        raise ValueError(f"{name}: its term, {term.kind.name}, compares with a reference; set `needs_reference = True`")
    if pair != (objective.forget_data == "both"):
        expected = "'both'" if pair else "'answer' or 'alternate'"
        raise ValueError(
            f"{name}: `forget_data`: expected {expected} for its term, {term.kind.name}, got {objective.forget_data!r}"
        )


def step_terms(
    objective: Objective | None, roles: Tensor, totals: StepTotals, *, forgets: bool = True
) -> SequenceRule | TermFunction:
    """Return the loss terms of a batch that mixes forget and retain sequences, for ``linear_sequence_loss``.

    Their sum over the micro-batches of a step, on all ranks, is the step's loss.

    Args:
        objective: whose terms; None where every sequence is plain NLL (fine-tuning).
        roles: (S,) int8 on the device, a ``Role`` for each sequence of the batch.
        totals: of the optimizer step.
        forgets: whether the batch has forget sequences: without them it needs neither a reference nor pairs.
    """
    weight = 1 / max(totals.retain_tokens, 1) if objective is None else objective.retain_weight(totals)
    terms: dict[int, Term] = {Role.RETAIN: Term(Kind.NLL, weight)}
    if objective is None or not forgets or objective.reads != "logprobs":
        return SequenceRule.of(roles, terms)
    term, weight = objective.term(), objective.forget_weight(totals)
    if not isinstance(term, Term):
        return _OwnTerms(term, weight, roles, SequenceRule.of(roles, terms))
    terms[Role.FORGET] = replace(term, weight=term.weight * weight)
    if term.kind == Kind.DPO:
        terms[Role.ALTERNATE] = Term(Kind.ALTERNATE)
    return SequenceRule.of(roles, terms)


@dataclass(frozen=True)
class _OwnTerms:
    """A user's function of the forget sequences, times a weight, and a rule for the others."""

    function: TermFunction
    weight: float
    roles: Tensor  # (S,)
    others: SequenceRule

    def __call__(self, sequences: Sequences) -> Tensor:
        roles = sequences.own(self.roles)
        # Others' rows are constants to it: what it makes of them, infinite perhaps, has no gradient.
        theirs = sequences.of_rows((roles == Role.FORGET) | (roles == Role.ALTERNATE))
        logprobs = torch.where(theirs, sequences.logprobs, sequences.logprobs.detach())
        forget = checked_terms(self.function(replace(sequences, logprobs=logprobs)), sequences)
        return torch.where(roles == Role.FORGET, forget * self.weight, self.others(sequences))


_OBJECTIVES: Registry[Objective] = Registry("objective")

T = TypeVar("T", bound=type[Objective])


def register_objective(cls: T) -> T:
    """Class decorator: make an ``Objective`` subclass known under its ``name``.

    Raises:
        ValueError: the name is taken by another class.
    """
    return _OBJECTIVES.register(cls)


def known_objectives() -> dict[str, type[Objective]]:
    """Return the registered classes by name."""
    return _OBJECTIVES.known()


def get_objective(name: str, **parameters: Any) -> Objective:
    """Return the objective called ``name`` with the given parameters; case and underscores do not matter.

    Raises:
        ValueError: an unknown name, or a parameter that this objective does not have; both list what is known.
    """
    return _OBJECTIVES.make(name, **parameters)
