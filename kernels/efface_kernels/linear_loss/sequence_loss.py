"""``linear_sequence_loss``: a loss over sequence log-probabilities, with its gradients, in one loop."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from efface_kernels.checks import check_dtype, check_same_device, check_shape, check_targets, resolve_backend
from efface_kernels.linear_loss.chunks import Chunk, plan_rows, plan_sequences
from efface_kernels.linear_loss.head import Head, ReferenceRows
from efface_kernels.linear_loss.logprob import resolve_chunk_rows
from efface_kernels.linear_loss.look import RowLook
from efface_kernels.linear_loss.loop import Wanted, graph_is_kept, run_loop
from efface_kernels.linear_loss.sequences import Sequences, segment_sums

# Sequences (s of them) -> their loss terms (s,); the loss is the sum of all terms.
TermFunction = Callable[[Sequences], Tensor]


class SequenceLossOutput(NamedTuple):
    """The loss, which carries the gradient, and what it was made of, which does not."""

    loss: Tensor  # () sum of the terms
    terms: Tensor  # (S,)
    sequence_logprobs: Tensor  # (S,) L_s
    reference_sums: Tensor | None  # (S,) L_ref, 0 for sequences without a reference
    logprobs: Tensor  # (N,) ℓ_i


@dataclass(frozen=True)
class _Options:
    terms: TermFunction
    row_offsets: tuple[int, ...]
    pairs: int
    softcap: float | None
    reference: ReferenceRows | None
    reference_sums: Tensor | None
    chunk_rows: int
    backend: str


class _Rule:
    """Turns a chunk's log-probabilities into coefficients by autograd on the term function; keeps what it saw."""

    def __init__(self, options: _Options, look: RowLook) -> None:
        self._look = look
        self._terms_of = options.terms
        device, dtype = look.logprobs.device, look.logprobs.dtype
        self._offsets = torch.tensor(options.row_offsets, dtype=torch.int64).to(device, non_blocking=True)
        sequences = len(options.row_offsets) - 1
        self.terms = torch.zeros(sequences, dtype=dtype, device=device)
        self.sums = torch.zeros(sequences, dtype=dtype, device=device)
        self.reference_sums = options.reference_sums
        if look.reference_logprobs is not None:
            self.reference_sums = torch.zeros(sequences, dtype=dtype, device=device)

    def __call__(self, chunk: Chunk) -> Tensor:
        logprobs = self._look.logprobs[chunk.rows]
        span = slice(chunk.first, chunk.last)
        offsets = self._offsets[chunk.first : chunk.last + 1] - self._offsets[chunk.first]
        if self._look.reference_logprobs is not None and self.reference_sums is not None:
            # Rows beyond the reference's M belong to sequences without one: they add nothing.
            known = self._look.reference_logprobs[chunk.rows]
            padded = torch.zeros_like(logprobs)
            padded[: known.shape[0]] = known
            self.reference_sums[span] = segment_sums(padded, offsets)
        reference_sums = None if self.reference_sums is None else self.reference_sums[span]
        with torch.enable_grad():
            leaf = logprobs.detach().clone().requires_grad_()
            sequences = Sequences(leaf, offsets, chunk.first, reference_sums)
            terms = self._terms_of(sequences)
            if terms.shape != (len(sequences),):
                raise ValueError(
                    f"the term function: expected one loss term for each of {len(sequences)} sequences, "
                    f"got shape {tuple(terms.shape)}"
                )
            coefficients = _coefficients(terms, leaf)
        self.terms[span] = terms.detach()
        self.sums[span] = sequences.sums.detach()
        return coefficients


def _coefficients(terms: Tensor, leaf: Tensor) -> Tensor:
    """c_i = ∂Σterms/∂ℓ_i; zeros where the terms do not depend on the log-probabilities."""
    if not terms.requires_grad:
        return torch.zeros_like(leaf)
    (gradient,) = torch.autograd.grad(terms.sum(), leaf, allow_unused=True)
    return torch.zeros_like(leaf) if gradient is None else gradient


class _LinearSequenceLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: _Options
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        head = Head(weight, bias, options.softcap)
        wanted = Wanted(*ctx.needs_input_grad[:3])
        n, sequences = hidden.shape[0], len(options.row_offsets) - 1
        if wanted.head:
            chunks = plan_sequences(options.row_offsets, options.chunk_rows, options.pairs)
        else:
            chunks = plan_rows(sequences, n, options.chunk_rows)
        look = RowLook(hidden, head, targets, chunks, reference=options.reference, backend=options.backend)
        rule = _Rule(options, look)
        ctx.coefficients, ctx.gradients = run_loop(hidden, head, look, chunks, wanted=wanted, rule=rule)
        reference_sums = rule.reference_sums
        kept = [rule.terms, rule.sums, look.logprobs, *([] if reference_sums is None else [reference_sums])]
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        return rule.terms.sum(), rule.terms, rule.sums, reference_sums, look.logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, *_unused: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 5
        return (*ctx.gradients.finish(ctx.coefficients, upstream, keep=graph_is_kept()), None, None)


def linear_sequence_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_offsets: Tensor | Sequence[int],
    terms: TermFunction,
    *,
    pairs: int = 0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    reference: ReferenceRows | None = None,
    reference_sums: Tensor | None = None,
    chunk_rows: int | None = None,
    backend: str = "auto",
) -> SequenceLossOutput:
    """A sum of per-sequence loss terms, with its gradients formed in the forward call.

    Equal to::

        logprobs = linear_logprob(hidden, weight, targets, bias=bias, softcap=softcap)
        loss = terms(Sequences(logprobs, row_offsets, 0, reference_sums)).sum()

    but the logits of a chunk are made once, and only one chunk of them is ever alive. ``terms`` is called once a
    chunk with whole sequences; a term may depend on its own sequence only, or on its pair.

    Args:
        hidden: (N, D) hidden states of the label rows, float16, bfloat16, float32 or float64.
        weight: (V, D), same dtype.
        targets: (N,) int64, in 0 .. V − 1.
        row_offsets: (S + 1) int64, ascending from 0 to N, each sequence with at least one row. Give it on the CPU
            (or as a list): a device tensor is read back once, which synchronises.
        terms: maps ``Sequences`` of s sequences to their s loss terms; plain torch, differentiated by autograd.
        pairs: the first 2 · ``pairs`` sequences come in pairs, (2i, 2i + 1), that share a chunk
            (``Sequences.following``).
        bias: (V,), same dtype, or None.
        softcap: Gemma-2's cap on the logits, or None.
        reference: a live reference for the first M rows; its logits are read in the same pass.
        reference_sums: (S,) known L_ref instead, from a cache. Not both.
        chunk_rows: rows of logits alive at a time; None chooses from the device, V and the dtype. A sequence or pair
            that is longer is looked at twice.
        backend: "auto", "native" (C++, CPU tensors), "triton" (GPU tensors) or "torch".

    Returns:
        SequenceLossOutput; ``loss`` may be scaled and added to other losses before ``backward``. float32 (float64
        for float64 inputs). Gradients have the dtypes of their inputs; sums over chunks run in float32.

    Raises:
        TypeError: dtypes that differ, or targets that are not int64.
        ValueError: shapes that do not fit, offsets that do not ascend, a sequence without rows, more pairs than
            sequences, a target out of the vocabulary, tensors on different devices.
    """
    hidden, head = Head(weight, bias, softcap).under_autocast(hidden)
    head.check(hidden)
    check_targets(targets, hidden.shape[0], head.vocabulary)
    check_same_device(hidden=hidden, targets=targets, reference_sums=reference_sums)
    offsets = _checked_offsets(row_offsets, hidden.shape[0])
    if not 0 <= 2 * pairs <= len(offsets) - 1:
        raise ValueError(
            f"`pairs`: expected at most half of the {len(offsets) - 1} sequences, got {pairs}; pairs are the sequences "
            "(0, 1), (2, 3), …, before all others"
        )
    if reference is not None:
        reference = _checked_reference(reference, targets, offsets)
        if reference_sums is not None:
            raise ValueError("expected `reference` (live) or `reference_sums` (cached), got both; drop one")
    if reference_sums is not None:
        check_shape("reference_sums", reference_sums, (len(offsets) - 1,), "one value for each sequence")
        check_dtype("reference_sums", reference_sums, (torch.float32, torch.float64))
    options = _Options(
        terms,
        offsets,
        pairs,
        softcap,
        reference,
        reference_sums,
        resolve_chunk_rows(chunk_rows, head, hidden.dtype),
        resolve_backend(backend, hidden.device),
    )
    with torch.autocast(hidden.device.type, enabled=False):
        output = _LinearSequenceLoss.apply(hidden, head.weight, head.bias, targets, options)  # type: ignore[no-untyped-call]
    return SequenceLossOutput(*output)


def _checked_offsets(row_offsets: Tensor | Sequence[int], rows: int) -> tuple[int, ...]:
    offsets = tuple(row_offsets.tolist() if isinstance(row_offsets, Tensor) else row_offsets)
    if not offsets or offsets[0] != 0 or offsets[-1] != rows:
        ends = f"{offsets[0]} to {offsets[-1]}" if offsets else "no entries"
        raise ValueError(f"`row_offsets`: expected to run from 0 to {rows} (the rows of `hidden`), got {ends}")
    for sequence, (start, stop) in enumerate(itertools.pairwise(offsets)):
        if stop <= start:
            raise ValueError(
                f"`row_offsets`: expected every sequence to have a label row, got rows {start} .. {stop} for sequence "
                f"{sequence}; drop sequences without a label"
            )
    return offsets


def _checked_reference(reference: ReferenceRows, targets: Tensor, offsets: tuple[int, ...]) -> ReferenceRows:
    reference = reference.under_autocast()
    hidden, head = reference.hidden, reference.head
    head.check(hidden, prefix="reference_")
    m = hidden.shape[0]
    if m not in offsets:
        raise ValueError(
            f"`reference_hidden`: expected the rows of the first sequences, whole, got {m} rows; "
            f"sequences end at rows {', '.join(map(str, offsets[1:4]))} …"
        )
    check_targets(targets[:m], m, head.vocabulary)
    check_same_device(hidden=targets, reference_hidden=hidden)
    return reference
