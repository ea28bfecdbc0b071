"""``linear_sequence_loss``: a loss over sequence log-probabilities, with its gradients, in one loop."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from efface_kernels.checks import check_dtype, check_same_device, check_shape, check_targets, resolve_backend
from efface_kernels.linear_loss.chunks import Chunk, plan_rows, plan_sequences
from efface_kernels.linear_loss.head import Head, ReferenceRows, wanted_of
from efface_kernels.linear_loss.look import RowLook
from efface_kernels.linear_loss.loop import Gradients, Wanted, graph_is_kept, run_loop
from efface_kernels.linear_loss.models import Layout
from efface_kernels.linear_loss.offsets import AnyOffsets, RowOffsets, checked_offsets
from efface_kernels.linear_loss.sequences import Sequences
from efface_kernels.linear_loss.workspace import run_within_memory
from efface_kernels.sequence_loss import SequenceRule
from efface_kernels.sequence_loss.op import function_terms, sequence_loss_torch, sequence_loss_triton

T = TypeVar("T")

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
class Call:
    """The arguments of a call, as they came."""

    hidden: Tensor
    head: Head
    targets: Tensor
    row_offsets: AnyOffsets
    terms: TermFunction
    pairs: int
    reference: ReferenceRows | None
    reference_sums: Tensor | None
    chunk_rows: int | None
    backend: str


@dataclass(frozen=True)
class Options:
    """What a call is asked for besides its differentiable inputs; checked."""

    terms: TermFunction
    row_offsets: tuple[int, ...]
    device_offsets: Tensor
    pairs: int
    softcap: float | None
    reference: ReferenceRows | None
    reference_sums: Tensor | None
    backend: str


class _Rule:
    """Turns a chunk's log-probabilities into coefficients; keeps what it saw."""

    def __init__(self, options: Options, look: RowLook) -> None:
        self._look = look
        self._terms_of = options.terms
        self._offsets = options.device_offsets
        self._backend = options.backend
        sequences = len(options.row_offsets) - 1
        # Every sequence is in a chunk, which writes all of its entries.
        self.terms, self.sums = look.logprobs.new_empty(sequences), look.logprobs.new_empty(sequences)
        self.reference_sums = options.reference_sums
        if options.reference is not None:
            self.reference_sums = look.logprobs.new_empty(sequences)

    def __call__(self, chunk: Chunk) -> Tensor:
        logprobs, frozen = self._look.logprobs[chunk.rows], self._look.reference_logprobs
        reference_logprobs = None if frozen is None else frozen[chunk.rows]
        span = slice(chunk.first, chunk.last)
        reference_sums = None if self.reference_sums is None else self.reference_sums[span]
        # Absolute offsets: the passes take a chunk's first row from its first offset.
        sequences = Sequences(logprobs, self._offsets[chunk.first : chunk.last + 1], chunk.first, reference_sums)
        if not isinstance(self._terms_of, SequenceRule):
            out = function_terms(sequences, self._terms_of, reference_logprobs)
        elif self._backend == "triton":
            into = self.terms[span], self.sums[span], reference_sums
            return sequence_loss_triton(sequences, self._terms_of, reference_logprobs, into).coefficients
        else:
            out = sequence_loss_torch(sequences, self._terms_of, reference_logprobs)
        self.terms[span], self.sums[span] = out.terms, out.sums
        if reference_logprobs is not None and reference_sums is not None and out.reference_sums is not None:
            reference_sums.copy_(out.reference_sums)
        return out.coefficients


class Computed(NamedTuple):
    """What a forward call computes: its output, and what the backward call needs."""

    output: SequenceLossOutput
    factors: Tensor  # (N,) −c
    gradients: Gradients


def compute(hidden: Tensor, head: Head, targets: Tensor, options: Options, wanted: Wanted, chunk_rows: int) -> Computed:
    """Run the loop over chunks of whole sequences, or of any rows where no gradient waits for a sequence's end."""
    if wanted.head:
        chunks = plan_sequences(options.row_offsets, chunk_rows, options.pairs)
    else:
        chunks = plan_rows(len(options.row_offsets) - 1, hidden.shape[0], chunk_rows)
    look = RowLook(hidden, head, targets, chunks, reference=options.reference, backend=options.backend)
    rule = _Rule(options, look)
    factors, gradients = run_loop(hidden, head, look, chunks, wanted=wanted, backend=options.backend, rule=rule)
    output = SequenceLossOutput(rule.terms.sum(), rule.terms, rule.sums, rule.reference_sums, look.logprobs)
    return Computed(output, factors, gradients)


def within_memory(
    run: Callable[[int], T], chunk_rows: int | None, hidden: Tensor, head: Head, options: Options, wanted: Wanted
) -> T:
    """Return ``run`` of the rows of a chunk, see ``run_within_memory``."""

    def logits_bytes(rows: int) -> int:
        return Layout.of(rows, hidden, head, options.reference).nbytes(hidden, head, options.reference)

    return run_within_memory(run, chunk_rows, hidden, head, sums_weight=logits_bytes if wanted.weight else None)


class _LinearSequenceLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        options: Options,
        wanted: Wanted,
        chunk_rows: int,
    ) -> tuple[Tensor | None, ...]:
        head = Head(weight, bias, options.softcap)
        output, ctx.factors, ctx.gradients = compute(hidden, head, targets, options, wanted, chunk_rows)
        ctx.mark_non_differentiable(*(each for each in output[1:] if each is not None))
        ctx.set_materialize_grads(False)
        return tuple(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, *_unused: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 7
        return (*ctx.gradients.finish(ctx.factors, upstream, keep=graph_is_kept()), *(None,) * 4)


def linear_sequence_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_offsets: AnyOffsets,
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
            (or as a list): a device tensor is read back once, which synchronises. ``RowOffsets`` holds both.
        terms: a ``SequenceRule``, which the Triton backend computes in one launch; or any function that maps
            ``Sequences`` of s sequences to their s loss terms, plain torch, differentiated by autograd.
        pairs: the first 2 · ``pairs`` sequences come in pairs, (2i, 2i + 1), that share a chunk
            (``Sequences.following``).
        bias: (V,), same dtype, or None.
        softcap: Gemma-2's cap on the logits, or None.
        reference: a live reference for the first M rows; its logits are read in the same pass.
        reference_sums: (S,) known L_ref instead, from a cache. Not both.
        chunk_rows: rows of logits alive at a time; None chooses from the device, V and the dtype, and takes all where
            that needs no more memory than several chunks. A sequence or pair that is longer is looked at twice.
        backend: "auto", "native" (C++, CPU tensors), "triton" (GPU tensors) or "torch".

    Returns:
        SequenceLossOutput; ``loss`` may be scaled and added to other losses before ``backward``. float32 (float64
        for float64 inputs). Gradients have the dtypes of their inputs; sums over chunks run in float32.

    Raises:
        TypeError: dtypes that differ, or targets that are not int64.
        ValueError: shapes that do not fit, offsets that do not ascend, a sequence without rows, more pairs than
            sequences, a target out of the vocabulary, tensors on different devices.
            On a GPU targets are not looked at: one out of the vocabulary makes the loss NaN, or ends in a device-side
            assertion.
    """
    hidden, head = Head(weight, bias, softcap).cast_for(hidden)
    call = Call(hidden, head, targets, row_offsets, terms, pairs, reference, reference_sums, chunk_rows, backend)
    if not torch.compiler.is_compiling():
        return _eager(call)
    if isinstance(terms, SequenceRule):
        return _in_graph(call, terms)
    outside: Callable[[Call], SequenceLossOutput] = torch.compiler.disable(_eager)
    return outside(call)


def _eager(call: Call) -> SequenceLossOutput:
    hidden, head, options = call.hidden, call.head, checked(call)
    wanted = Wanted(*wanted_of(hidden, head))

    def run(rows: int) -> SequenceLossOutput:
        with torch.autocast(hidden.device.type, enabled=False):
            output = _LinearSequenceLoss.apply(  # type: ignore[no-untyped-call]
                hidden, head.weight, head.bias, call.targets, options, wanted, rows
            )
        return SequenceLossOutput(*output)

    return within_memory(run, call.chunk_rows, hidden, head, options, wanted)


def _in_graph(call: Call, rule: SequenceRule) -> SequenceLossOutput:
    """``_eager`` while a model is compiled: one op, of ``compiled.py``, which checks its arguments when it runs."""
    head, row_offsets, device_offsets = call.head, call.row_offsets, None
    if isinstance(row_offsets, RowOffsets):
        row_offsets, device_offsets = row_offsets.host, row_offsets.device
    if not isinstance(row_offsets, Tensor):
        row_offsets = torch.tensor(row_offsets, dtype=torch.int64)
    loss, *seen = torch.ops.efface.linear_sequence_loss(
        call.hidden,
        head.weight,
        head.bias,
        call.targets,
        row_offsets,
        device_offsets,
        rule.roles,
        rule.table,
        rule.kinds,
        call.pairs,
        head.softcap,
        *((None, None, None, None) if call.reference is None else call.reference.tensors()),
        call.reference_sums,
        wanted_of(call.hidden, head),
        call.chunk_rows,
        call.backend,
    )
    terms, sums, live_sums, logprobs = (each.detach() for each in seen[:4])
    reference_sums = call.reference_sums if call.reference is None else live_sums
    return SequenceLossOutput(loss, terms, sums, reference_sums, logprobs)


def checked(call: Call) -> Options:
    """Return the options of a call, or raise what ``linear_sequence_loss`` says."""
    hidden, terms, reference = call.hidden, call.terms, call.reference
    call.head.check(hidden)
    check_targets(call.targets, hidden.shape[0], call.head.vocabulary)
    check_same_device(hidden=hidden, targets=call.targets, reference_sums=call.reference_sums)
    offsets, device_offsets = checked_offsets(call.row_offsets, hidden)
    sequences = len(offsets) - 1
    if not 0 <= 2 * call.pairs <= sequences:
        raise ValueError(
            f"`pairs`: expected at most half of the {sequences} sequences, got {call.pairs}; pairs are the sequences "
            "(0, 1), (2, 3), …, before all others"
        )
    if isinstance(terms, SequenceRule):
        check_shape("terms.roles", terms.roles, (sequences,), "one role for each sequence")
        check_same_device(hidden=hidden, roles=terms.roles)
        if terms.needs_reference and reference is None and call.reference_sums is None:
            raise ValueError("`terms`: NPO and DPO need a reference, got none; give `reference` or `reference_sums`")
        if terms.pairs and call.pairs == 0:
            raise ValueError("`pairs`: expected the number of DPO's pairs, got 0; chunks would come between them")
    if reference is not None:
        reference = _checked_reference(reference, call.targets, offsets)
        if call.reference_sums is not None:
            raise ValueError("expected `reference` (live) or `reference_sums` (cached), got both; drop one")
    if call.reference_sums is not None:
        check_shape("reference_sums", call.reference_sums, (sequences,), "one value for each sequence")
        check_dtype("reference_sums", call.reference_sums, (torch.float32, torch.float64))
    backend = resolve_backend(call.backend, hidden.device)
    # Detached: autograd would take the caller's own tensor, which is returned, out of its graph.
    sums = None if call.reference_sums is None else call.reference_sums.detach()
    return Options(terms, offsets, device_offsets, call.pairs, call.head.softcap, reference, sums, backend)


def _checked_reference(reference: ReferenceRows, targets: Tensor, offsets: tuple[int, ...]) -> ReferenceRows:
    reference = reference.cast()
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
