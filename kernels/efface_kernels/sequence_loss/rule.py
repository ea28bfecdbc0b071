"""``SequenceRule``: loss terms declared instead of programmed, so that one kernel can do them.

Where there is no kernel, torch makes a chunk's terms and coefficients here: of a rule, or of a function of one's own.
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
    """weight · (the term of ``kind``), with those parameters that the kind has; a row of the table.

    Attributes:
        kind: the formula, see ``Kind``.
        weight: what the term is multiplied by: gamma or alpha, divided by what the mean runs over.
        beta: of NPO, SimNPO and DPO, > 0; of WGA.
        delta: SimNPO's margin.
        beta1: SatImp's exponent of p.
        beta2: SatImp's exponent of 1 − p.
        ignored: the first label tokens of a sequence, which CEU leaves out.
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
            raise ValueError(f"`Term`: expected finite numbers, of float32 too, got {self}")
        if self.kind in NEED_BETA and not self.beta > 0:
            raise ValueError(f"`beta`: expected a positive number for {self.kind.name}, got {self.beta}")
        if self.ignored < 0:
            raise ValueError(f"`ignored`: expected a number of label tokens, got {self.ignored}")

    @property
    def needs_reference(self) -> bool:
        """Whether it reads the reference model's log-probabilities."""
        return self.kind in NEED_REFERENCE


@dataclass(frozen=True)
class SequenceRule:
    """What each sequence of a batch adds to the loss; what ``linear_sequence_loss`` takes as ``terms``.

    Made by ``SequenceRule.of``. The Triton backend reads it in one launch, the others by torch's formulas, and
    ``torch.compile`` without a graph break. Nothing of it is read on the host. It is also a differentiable function of
    ``Sequences``, for whoever has log-probabilities already.

    Attributes:
        roles: (S,) int8 on the device of the batch: rows of the table.
        table: (8, 7), a ``Term`` a row. New numbers may be copied into it, for a captured CUDA graph.
        kinds: those that occur in the table.
    """

    roles: Tensor
    table: Tensor
    kinds: tuple[int, ...]

    @classmethod
    def of(cls, roles: Tensor, terms: Mapping[int, Term]) -> "SequenceRule":
        """Return the rule under which a sequence of role r adds ``terms[r]``, and one of no such role nothing.

        Copies the table to the device: call it before a CUDA graph is captured or a model compiled, not within.

        Args:
            roles: (S,) int8, 0 .. 7, on the device of the batch.
            terms: from roles to terms.

        Raises:
            TypeError: roles that are not int8.
            ValueError: roles that are not 0 .. 7; those of a GPU are not looked at, and give NaN.
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
        """Whether a term reads the reference model's log-probabilities."""
        return not NEED_REFERENCE.isdisjoint(self.kinds)

    @property
    def pairs(self) -> bool:
        """Whether a term depends on the sequence that follows, so that both must share a chunk."""
        return int(Kind.DPO) in self.kinds

    def __call__(self, sequences: Sequences) -> Tensor:
        """Weighted terms (s,), differentiable once by the log-probabilities."""
        terms: Tensor = _RuleTerms.apply(sequences.logprobs, sequences, self)  # type: ignore[no-untyped-call]
        return terms


class _RuleTerms(torch.autograd.Function):
    """The terms of a rule, and for their derivative its coefficients: those of a pair's alternate are of its first."""

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
        upstream = torch.where(alternate, upstream.roll(1), upstream)  # an alternate of no pair has coefficients of 0
        return coefficients * Sequences(coefficients, offsets).of_rows(upstream), None, None


# Sequences (s of them) -> their loss terms (s,); the loss is the sum of all terms.
TermFunction: TypeAlias = Callable[[Sequences], Tensor]


class SequenceTerms(NamedTuple):
    """What the loss is made of, and its derivative by the log-probabilities."""

    terms: Tensor  # (s,) weighted; the loss is their sum
    coefficients: Tensor  # (n,) c = ∂Σterms/∂ℓ
    sums: Tensor  # (s,) L
    reference_sums: Tensor | None  # (s,) L_ref, 0 for sequences without a reference


def sequence_loss_torch(
    sequences: Sequences, terms: SequenceRule | TermFunction, reference_logprobs: Tensor | None
) -> SequenceTerms:
    """Return the terms and coefficients of a chunk: a rule's by its formulas, a function's by autograd.

    Args:
        sequences: whole ones; their first offset is the first row of their log-probabilities.
        terms: what they add to the loss.
        reference_logprobs: (m,) a live reference's ℓ of the first m rows, m ≤ n, or None.
    """
    offsets, reference_sums = sequences.row_offsets - sequences.row_offsets[0], sequences.reference_sums
    if reference_logprobs is not None:
        # Rows beyond the reference's M belong to sequences without one: they add nothing.
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
    """Return a function's terms, and their derivative by autograd on these few numbers."""
    with torch.enable_grad():
        leaf = seen.logprobs.clone().requires_grad_()
        terms = checked_terms(terms_of(replace(seen, logprobs=leaf)), seen)
        gradient = None  # where the terms do not depend on the log-probabilities
        if terms.requires_grad:
            (gradient,) = torch.autograd.grad(terms.sum(), leaf, allow_unused=True)
    return terms.detach(), torch.zeros_like(leaf) if gradient is None else gradient


def checked_terms(terms: Any, sequences: Sequences) -> Tensor:
    """Return what a term function gave; raise TypeError or ValueError unless it is a term for each sequence, (s,)."""
    if not isinstance(terms, Tensor):
        raise TypeError(f"the term function: expected a tensor of loss terms, got {type(terms).__name__}")
    if terms.shape != (len(sequences),):
        raise ValueError(
            f"the term function: expected one loss term for each of {len(sequences)} sequences, "
            f"got shape {tuple(terms.shape)}"
        )
    return terms
