"""``SequenceRule``, a declarative description of loss terms that a single kernel can evaluate.

This module also contains the torch implementation for backends without a kernel. It computes the terms and coefficients
of a chunk from a rule or from a user-defined function.
"""

from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from efface_kernels.checks import check_dtype, check_shape
from efface_kernels.memory import to_device
from efface_kernels.sequence_loss.kinds import NEED_BETA, NEED_REFERENCE, Kind
from efface_kernels.sequence_loss.reference import sequence_terms
from efface_kernels.sequences import Sequences, segment_sums

ROLES = 8  # rows of the table
_NO_FP64 = ("mps", "xpu")
_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Term:
    """A weighted loss term, weight · (term of ``kind``): one row of a rule's table.

    A kind uses only its own parameters.

    Attributes:
        kind: the formula, see ``Kind``.
        weight: factor of the term: gamma or alpha, divided by the number of tokens or sequences in the mean.
        beta: inverse temperature of NPO, SimNPO and DPO, > 0; exponent of p in WGA.
        delta: margin of SimNPO.
        beta1: exponent of p in SatImp.
        beta2: exponent of 1 − p in SatImp.
        ignored: number of label tokens at the start of a sequence that CEU leaves out.
    """

    kind: Kind
    weight: float = 1.0
    beta: float = 1.0
    delta: float = 0.0
    beta1: float = 1.0
    beta2: float = 1.0
    ignored: int = 0

    def __post_init__(self) -> None:
        if self.kind not in frozenset(Kind):
            raise ValueError(f"`kind`: expected a Kind, got {self.kind!r}")
        if not all(abs(number) <= _LARGEST for number in astuple(self)):
            raise ValueError(f"`Term`: expected numbers that are finite in float32, got {self}")
        if self.kind in NEED_BETA and not self.beta > 0:
            raise ValueError(f"`beta`: expected a positive number for {self.kind.name}, got {self.beta}")
        if self.ignored < 0:
            raise ValueError(f"`ignored`: expected 0 or a positive number, got {self.ignored}")

    @property
    def needs_reference(self) -> bool:
        """Whether the term depends on the reference model's log-probabilities."""
        return self.kind in NEED_REFERENCE


@dataclass(frozen=True)
class SequenceRule:
    """Assignment of a loss term to each sequence of a batch; the argument ``terms`` of ``linear_sequence_loss``.

    Create a rule with ``SequenceRule.of``. The Triton backend evaluates it in one launch, the other backends with torch
    formulas, and ``torch.compile`` without a graph break. Its tensors are never read on the host. A rule is also a
    differentiable function of ``Sequences``, for callers that already have log-probabilities.

    Attributes:
        roles: (S,) int8 on the device of the batch: the table row of each sequence.
        table: (8, 7), one ``Term`` per row. With a captured CUDA graph, new numbers can be copied into it.
        kinds: kinds that occur in the table.
    """

    roles: Tensor
    table: Tensor
    kinds: tuple[int, ...]

    @classmethod
    def of(cls, roles: Tensor, terms: Mapping[int, Term]) -> "SequenceRule":
        """Return the rule that assigns ``terms[r]`` to sequences of role r, and no term to roles not in ``terms``.

        The table is copied to the device. Create the rule before a CUDA graph is captured or a model is compiled, not
        while that happens.

        Args:
            roles: (S,) int8, 0 .. 7, on the device of the batch.
            terms: maps roles to terms.

        Raises:
            TypeError: if ``roles`` are not int8.
            ValueError: if a role is not in 0 .. 7. ``roles`` on a GPU are not checked; with the Triton backend an
                invalid role makes the term and the coefficients of its sequence NaN.
        """
        check_dtype("roles", roles, (torch.int8,))
        check_shape("roles", roles, ("S",))
        wrong = [role for role in terms if not 0 <= role < ROLES]
        if roles.device.type == "cpu" and roles.numel():
            wrong += [int(role) for role in torch.aminmax(roles) if not 0 <= role < ROLES]
        if wrong:
            raise ValueError(f"`roles`: expected 0 .. {ROLES - 1}, got {wrong[0]}")
        rows = [astuple(terms.get(role, Term(Kind.NONE, 0.0))) for role in range(ROLES)]
        dtype = torch.float32 if roles.device.type in _NO_FP64 else torch.float64
        table = to_device(torch.tensor(rows, dtype=dtype), roles.device)
        return cls(roles, table, tuple(sorted({int(term.kind) for term in terms.values()})))

    @property
    def needs_reference(self) -> bool:
        """Whether a term depends on the reference model's log-probabilities."""
        return not NEED_REFERENCE.isdisjoint(self.kinds)

    @property
    def pairs(self) -> bool:
        """Whether a term depends on the next sequence, so that both must be in the same chunk."""
        return int(Kind.DPO) in self.kinds

    def __call__(self, sequences: Sequences) -> Tensor:
        """Return the weighted terms (s,), differentiable once with respect to the log-probabilities."""
        terms: Tensor = _RuleTerms.apply(sequences.logprobs, sequences, self)  # type: ignore[no-untyped-call]
        return terms


class _RuleTerms(torch.autograd.Function):
    """Terms of a rule, whose derivative is given by its coefficients.

    The coefficients of an alternate are derivatives of the term of the pair's first sequence.
    """

    @staticmethod
    def forward(ctx: Any, logprobs: Tensor, sequences: Sequences, rule: SequenceRule) -> Tensor:
        seen, roles = replace(sequences, logprobs=logprobs), sequences.own(rule.roles)
        terms, coefficients = sequence_terms(seen, roles, rule.table, rule.kinds)
        kinds = rule.table[roles.long(), 0]
        ctx.save_for_backward(coefficients, sequences.row_offsets, kinds == Kind.ALTERNATE)
        return terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        coefficients, offsets, alternate = ctx.saved_tensors
        upstream = torch.where(alternate, upstream.roll(1), upstream)  # an alternate outside a pair has coefficients 0
        return coefficients * Sequences(coefficients, offsets).of_rows(upstream), None, None


# Sequences (s of them) -> their loss terms (s,); the loss is the sum of all terms.
TermFunction: TypeAlias = Callable[[Sequences], Tensor]


class SequenceTerms(NamedTuple):
    """Loss terms, their derivatives with respect to the log-probabilities, and the sums that they depend on."""

    terms: Tensor  # (s,) weighted; the loss is their sum
    coefficients: Tensor  # (n,) c = ∂Σterms/∂ℓ
    sums: Tensor  # (s,) L
    reference_sums: Tensor | None  # (s,) L_ref, 0 for sequences without a reference


def sequence_loss_torch(
    sequences: Sequences, terms: SequenceRule | TermFunction, reference_logprobs: Tensor | None
) -> SequenceTerms:
    """Return the terms and coefficients of a chunk: from the formulas of a rule, or from a function by autograd.

    Args:
        sequences: whole sequences; their first offset corresponds to row 0 of their log-probabilities.
        terms: rule or function that defines the loss terms.
        reference_logprobs: (m,) ℓ of a live reference for the first m rows, m ≤ n, or None.
    """
    offsets, reference_sums = sequences.row_offsets - sequences.row_offsets[0], sequences.reference_sums
    if reference_logprobs is not None:
        # Rows from M on belong to sequences without a reference and add nothing.
        padded = torch.zeros_like(sequences.logprobs)
        padded[: reference_logprobs.shape[0]] = reference_logprobs
        reference_sums = segment_sums(padded, offsets)
    seen = Sequences(sequences.logprobs.detach(), offsets, sequences.first, reference_sums)
    if isinstance(terms, SequenceRule):
        made = sequence_terms(seen, seen.own(terms.roles), terms.table, terms.kinds)
    else:
        made = _differentiated(terms, seen)
    return SequenceTerms(*made, seen.sums, reference_sums)


def _differentiated(terms_of: TermFunction, seen: Sequences) -> tuple[Tensor, Tensor]:
    """Return the terms of a function, and their derivatives by autograd, which runs on only n numbers."""
    with torch.enable_grad():
        leaf = seen.logprobs.clone().requires_grad_()
        terms = checked_terms(terms_of(replace(seen, logprobs=leaf)), seen)
        gradient = None  # if the terms do not depend on the log-probabilities
        if terms.requires_grad:
            (gradient,) = torch.autograd.grad(terms.sum(), leaf, allow_unused=True)
    return terms.detach(), torch.zeros_like(leaf) if gradient is None else gradient


def checked_terms(terms: Any, sequences: Sequences) -> Tensor:
    """Return the result of a term function; raise TypeError or ValueError unless it is a tensor of shape (s,)."""
    if not isinstance(terms, Tensor):
        raise TypeError(f"the term function: expected a tensor of loss terms, got {type(terms).__name__}")
    if terms.shape != (len(sequences),):
        raise ValueError(
            f"the term function: expected one loss term for each of {len(sequences)} sequences, "
            f"got shape {tuple(terms.shape)}"
        )
    return terms
