"""The sequence loss: segment sums, loss terms and coefficients of a batch that mixes kinds of terms."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from efface_kernels.checks import check_dtype, check_same_device, check_shape, resolve_backend
from efface_kernels.linear_loss.sequences import Sequences, segment_sums
from efface_kernels.sequence_loss.config import LAUNCH
from efface_kernels.sequence_loss.reference import sequence_terms
from efface_kernels.sequence_loss.rule import SequenceRule
from efface_kernels.triton_launch import on_device


class SequenceTerms(NamedTuple):
    """What the loss is made of, and its derivative by the log-probabilities."""

    terms: Tensor  # (s,) weighted; the loss is their sum
    coefficients: Tensor  # (n,) c = ∂Σterms/∂ℓ
    sums: Tensor  # (s,) L
    reference_sums: Tensor | None  # (s,) L_ref, 0 for sequences without a reference


def chunk_sequences(sequences: Sequences, reference_logprobs: Tensor | None) -> Sequences:
    """Return the sequences with offsets from 0, and the sums of a live reference's rows."""
    offsets = sequences.row_offsets - sequences.row_offsets[0]
    reference_sums = sequences.reference_sums
    if reference_logprobs is not None:
        # Rows beyond the reference's M belong to sequences without one: they add nothing.
        padded = torch.zeros_like(sequences.logprobs)
        padded[: reference_logprobs.shape[0]] = reference_logprobs
        reference_sums = segment_sums(padded, offsets)
    return Sequences(sequences.logprobs.detach(), offsets, sequences.first, reference_sums)


def function_terms(
    sequences: Sequences, terms_of: Callable[[Sequences], Tensor], reference_logprobs: Tensor | None
) -> SequenceTerms:
    """Any differentiable function's terms; coefficients by autograd on these few numbers."""
    seen = chunk_sequences(sequences, reference_logprobs)
    with torch.enable_grad():
        leaf = seen.logprobs.clone().requires_grad_()
        terms = terms_of(dataclasses.replace(seen, logprobs=leaf))
        if terms.shape != (len(seen),):
            raise ValueError(
                f"the term function: expected one loss term for each of {len(seen)} sequences, "
                f"got shape {tuple(terms.shape)}"
            )
        gradient = None  # where the terms do not depend on the log-probabilities
        if terms.requires_grad:
            (gradient,) = torch.autograd.grad(terms.sum(), leaf, allow_unused=True)
    coefficients = torch.zeros_like(leaf) if gradient is None else gradient
    return SequenceTerms(terms.detach(), coefficients, seen.sums, seen.reference_sums)


def sequence_loss_torch(sequences: Sequences, rule: SequenceRule, reference_logprobs: Tensor | None) -> SequenceTerms:
    """Return a rule's terms and coefficients, by its formulas in torch."""
    seen = chunk_sequences(sequences, reference_logprobs)
    terms, coefficients = sequence_terms(seen, seen.own(rule.roles), rule.table, rule.kinds)
    return SequenceTerms(terms, coefficients, seen.sums, seen.reference_sums)


def sequence_loss_triton(
    sequences: Sequences,
    rule: SequenceRule,
    reference_logprobs: Tensor | None,
    into: tuple[Tensor, Tensor, Tensor | None] | None = None,
) -> SequenceTerms:
    """``sequence_loss_torch`` in one launch; terms, sums and reference sums go ``into`` these if given."""
    from efface_kernels.sequence_loss.kernel import sequence_loss_kernel  # Triton is imported when a kernel first runs

    logprobs, count = sequences.logprobs.contiguous(), len(sequences)
    if into is None:
        new = [torch.empty(count, dtype=logprobs.dtype, device=logprobs.device) for _ in range(3)]
        into = new[0], new[1], sequences.reference_sums if reference_logprobs is None else new[2]
    terms, sums, reference_sums = into
    coefficients = torch.empty_like(logprobs)
    if count:  # an empty grid is a launch error
        with on_device(logprobs):
            sequence_loss_kernel[(count,)](
                logprobs,
                sequences.row_offsets.contiguous(),
                sequences.own(rule.roles).contiguous(),
                rule.table,
                reference_logprobs,
                0 if reference_logprobs is None else reference_logprobs.shape[0],
                reference_sums,
                terms,
                sums,
                coefficients,
                EPS=torch.finfo(logprobs.dtype).eps,
                BLOCK=LAUNCH.block,
                num_warps=LAUNCH.num_warps,
            )
    return SequenceTerms(terms, coefficients, sums, reference_sums)


def sequence_loss(
    logprobs: Tensor,
    row_offsets: Tensor,
    rule: SequenceRule,
    *,
    reference_logprobs: Tensor | None = None,
    reference_sums: Tensor | None = None,
    backend: str = "auto",
) -> SequenceTerms:
    """Loss terms of whole sequences and their derivative by the log-probabilities.

    Equal to::

        terms = rule(Sequences(logprobs.requires_grad_(), row_offsets, 0, reference_sums))
        (coefficients,) = torch.autograd.grad(terms.sum(), logprobs)

    Args:
        logprobs: (n,) ℓ of the label rows, float32 or float64.
        row_offsets: (S + 1) int64 on the device of ``logprobs``, ascending from 0 to n.
        rule: which term each of the S sequences has.
        reference_logprobs: (m,) a live reference's ℓ of the first m rows.
        reference_sums: (S,) known L_ref instead.
        backend: "auto", "triton" (GPU tensors), "native" or "torch": plain torch on the CPU in either case.

    Raises:
        TypeError: dtypes other than those above.
        ValueError: shapes that do not fit, tensors on different devices, no reference where a term needs one.
    """
    check_dtype("logprobs", logprobs, (torch.float32, torch.float64))
    check_shape("logprobs", logprobs, ("n",))
    check_dtype("row_offsets", row_offsets, (torch.int64,))
    check_shape("row_offsets", row_offsets, (rule.roles.shape[0] + 1,), "one sequence for each role of the rule")
    check_same_device(
        logprobs=logprobs,
        row_offsets=row_offsets,
        roles=rule.roles,
        reference_logprobs=reference_logprobs,
        reference_sums=reference_sums,
    )
    if reference_logprobs is not None and reference_sums is not None:
        raise ValueError("expected `reference_logprobs` (live) or `reference_sums` (cached), got both; drop one")
    if rule.needs_reference and reference_logprobs is None and reference_sums is None:
        raise ValueError(
            "NPO and DPO need the reference model's log-probabilities, got none; give a live or cached reference"
        )
    run = sequence_loss_triton if resolve_backend(backend, logprobs.device) == "triton" else sequence_loss_torch
    return run(Sequences(logprobs, row_offsets, 0, reference_sums), rule, reference_logprobs)
