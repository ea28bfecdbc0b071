"""``linear_sequence_loss``: a loss over sequence log-probabilities, computed together with its gradients."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from efface_kernels.backends import resolve_backend
from efface_kernels.checks import check_dtype, check_same_device, check_shape, check_targets
from efface_kernels.linear_loss.chunks import Chunk, plan_rows, plan_sequences, run_within_memory
from efface_kernels.linear_loss.head import Head, ReferenceRows
from efface_kernels.linear_loss.look import Layout, RowLook
from efface_kernels.linear_loss.loop import Gradients, Wanted, graph_is_kept, run_loop
from efface_kernels.sequence_loss.launch import sequence_loss_triton
from efface_kernels.sequence_loss.rule import SequenceRule, TermFunction, sequence_loss_torch
from efface_kernels.sequences import AnyOffsets, RowOffsets, Sequences, checked_offsets

T = TypeVar("T")


class SequenceLossOutput(NamedTuple):
    """Result of ``linear_sequence_loss``. Only ``loss`` is differentiable."""

    loss: Tensor  # () sum of the terms
    terms: Tensor  # (S,)
    sequence_logprobs: Tensor  # (S,) L_s
    reference_sums: Tensor | None  # (S,) L_ref, 0 for sequences without a live reference; None without any reference
    logprobs: Tensor  # (N,) ℓ_i


class Computed(NamedTuple):
    """Result of the forward call: its output, and the row factors and gradients that the backward call needs."""

    output: SequenceLossOutput
    factors: Tensor  # (N,) −c
    gradients: Gradients


@dataclass(frozen=True)
class Call:
    """Arguments of one call of ``linear_sequence_loss``, shared by the eager and the compiled path.

    Attributes:
        hidden: (N, D) in the dtype of the GEMM, like the head.
        wanted: the gradients to compute.
    """

    hidden: Tensor
    head: Head
    targets: Tensor
    row_offsets: AnyOffsets
    terms: SequenceRule | TermFunction
    wanted: Wanted
    pairs: int
    reference: ReferenceRows | None
    reference_sums: Tensor | None
    chunk_rows: int | None
    backend: str

    def checked(self) -> "Call":
        """Return the checked call: offsets on host and device, the reference cast for the GEMM, the backend resolved.

        Raises:
            TypeError: see ``linear_sequence_loss``.
            ValueError: see ``linear_sequence_loss``.
        """
        hidden, terms, reference, sums = self.hidden, self.terms, self.reference, self.reference_sums
        self.head.check(hidden)
        check_targets(self.targets, hidden.shape[0], self.head.vocabulary)
        check_same_device(hidden=hidden, targets=self.targets, reference_sums=sums)
        offsets = checked_offsets(self.row_offsets, hidden)
        sequences = len(offsets.host) - 1
        if not 0 <= 2 * self.pairs <= sequences:
            raise ValueError(
                f"`pairs`: expected at most half of the {sequences} sequences, got {self.pairs}; order the sequences "
                "so that pairs come first, as (0, 1), (2, 3), …"
            )
        if isinstance(terms, SequenceRule):
            check_shape("terms.roles", terms.roles, (sequences,), "one role for each sequence")
            check_same_device(hidden=hidden, roles=terms.roles)
            if terms.needs_reference and reference is None and sums is None:
                raise ValueError(
                    "`terms`: NPO and DPO need a reference, got none; pass `reference` or `reference_sums`"
                )
            if terms.pairs and self.pairs == 0 and sequences:
                raise ValueError("`pairs`: expected the number of DPO's pairs, got 0; pass it, or chunks split pairs")
        if reference is not None:
            reference = _checked_reference(reference, self.targets, offsets)
            if sums is not None:
                raise ValueError("`reference_sums`: expected None with `reference`, got both; pass one of them")
        if sums is not None:
            check_shape("reference_sums", sums, (sequences,), "one value for each sequence")
            check_dtype("reference_sums", sums, (torch.float32, torch.float64))
            # The caller's tensor is returned as an output. Without detach, autograd would mark the tensor itself as
            # non-differentiable and so remove it from the caller's graph.
            sums = sums.detach()
        return dataclasses.replace(
            self,
            row_offsets=offsets,
            reference=reference,
            reference_sums=sums,
            backend=resolve_backend(self.backend, hidden.device),
        )

    def run(self, compute: Callable[["Call", int], T]) -> T:
        """Return ``compute(self, rows)`` with as many rows per chunk as the device has memory for.

        Autocast is disabled, because hidden states and heads already have the dtype of the GEMM.
        """

        def run(rows: int) -> T:
            with torch.autocast(self.hidden.device.type, enabled=False):
                return compute(self, rows)

        def logits_bytes(rows: int) -> int:
            layout = Layout.of(rows, self.hidden, self.head, self.reference)
            return layout.nbytes(self.hidden, self.head, self.reference)

        sums_weight = logits_bytes if self.wanted.weight else None
        return run_within_memory(run, self.chunk_rows, self.hidden, self.head, sums_weight=sums_weight)


class _Coefficients:
    """Coefficient rule: computes a chunk's coefficients from its log-probabilities, and stores its terms and sums."""

    def __init__(self, call: Call, offsets: Tensor, look: RowLook) -> None:
        self._call, self._offsets, self._look = call, offsets, look
        # No initialisation is needed: every sequence is in some chunk, and each chunk writes all of its entries.
        self.terms, self.sums = (look.logprobs.new_empty(len(offsets) - 1) for _ in range(2))
        self.reference_sums = call.reference_sums if call.reference is None else torch.empty_like(self.sums)

    def __call__(self, chunk: Chunk) -> Tensor:
        terms, frozen = self._call.terms, self._look.reference_logprobs
        reference_logprobs = None if frozen is None else frozen[chunk.rows]
        span = slice(chunk.first, chunk.last)
        reference_sums = None if self.reference_sums is None else self.reference_sums[span]
        # Offsets into the batch: the passes subtract the chunk's first offset from the others.
        offsets = self._offsets[chunk.first : chunk.last + 1]
        sequences = Sequences(self._look.logprobs[chunk.rows], offsets, chunk.first, reference_sums)
        if isinstance(terms, SequenceRule) and self._call.backend == "triton":
            into = self.terms[span], self.sums[span], reference_sums
            return sequence_loss_triton(sequences, terms, reference_logprobs, into).coefficients
        out = sequence_loss_torch(sequences, terms, reference_logprobs)
        self.terms[span], self.sums[span] = out.terms, out.sums
        if reference_logprobs is not None and reference_sums is not None and out.reference_sums is not None:
            reference_sums.copy_(out.reference_sums)
        return out.coefficients


def compute(call: Call, chunk_rows: int) -> Computed:
    """Run the loop over chunks of whole sequences, or over arbitrary rows if neither dW nor db is wanted."""
    offsets = cast("RowOffsets", call.row_offsets)  # checked() has converted it
    if call.wanted.head:
        chunks = plan_sequences(offsets.host.tolist(), chunk_rows, call.pairs)
    else:
        chunks = plan_rows(len(offsets.host) - 1, call.hidden.shape[0], chunk_rows)
    look = RowLook(call.hidden, call.head, call.targets, chunks, reference=call.reference, backend=call.backend)
    rule = _Coefficients(call, offsets.device, look)
    factors, gradients = run_loop(
        call.hidden, call.head, look, chunks, wanted=call.wanted, backend=call.backend, rule=rule
    )
    output = SequenceLossOutput(rule.terms.sum(), rule.terms, rule.sums, rule.reference_sums, look.logprobs)
    return Computed(output, factors, gradients)


class _LinearSequenceLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # noqa: ARG004 - read through `call`; passed so that autograd tracks it, like the next two
        weight: Tensor,  # noqa: ARG004
        bias: Tensor | None,  # noqa: ARG004
        call: Call,
        chunk_rows: int,
    ) -> tuple[Tensor | None, ...]:
        output, ctx.factors, ctx.gradients = compute(call, chunk_rows)
        ctx.mark_non_differentiable(*(each for each in output[1:] if each is not None))
        ctx.set_materialize_grads(False)
        return tuple(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, *_unused: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 5
        return (*ctx.gradients.finish(ctx.factors, upstream, keep=graph_is_kept()), None, None)


def linear_sequence_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_offsets: AnyOffsets,
    terms: SequenceRule | TermFunction,
    *,
    pairs: int = 0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    reference: ReferenceRows | None = None,
    reference_sums: Tensor | None = None,
    chunk_rows: int | None = None,
    backend: str = "auto",
) -> SequenceLossOutput:
    """Return a sum of per-sequence loss terms; its gradients are computed in the forward call.

    Equal to::

        logprobs = linear_logprob(hidden, weight, targets, bias=bias, softcap=softcap)
        loss = terms(Sequences(logprobs, row_offsets, 0, reference_sums)).sum()

    but the logits of a chunk are computed once, and only one chunk of logits is in memory at a time. ``terms`` is
    called once per chunk, with whole sequences. A term can depend only on its own sequence and, in a pair, on the other
    one.

    Args:
        hidden: (N, D) hidden states of the label rows, float16, bfloat16, float32 or float64.
        weight: (V, D), same dtype.
        targets: (N,) int64, in 0 .. V − 1.
        row_offsets: (S + 1) int64, ascending from 0 to N; each sequence has at least one row. Pass a list or a CPU
            tensor: a device tensor is copied to the host, which synchronises the device. ``RowOffsets`` combines a host
            and a device copy.
        terms: a ``SequenceRule``, which the Triton backend computes in one launch; or a function of plain torch that
            maps ``Sequences`` (s of them) to their loss terms (s,), which autograd differentiates.
        pairs: the first 2 · ``pairs`` sequences are pairs, (2i, 2i + 1). Both sequences of a pair are in the same
            chunk, see ``Sequences.following``.
        bias: (V,), same dtype, or None.
        softcap: Gemma-2's cap on the logits, z ← softcap · tanh(z / softcap), or None.
        reference: live reference for the first M rows; its logits are read in the same pass.
        reference_sums: (S,) cached L_ref, instead of ``reference``.
        chunk_rows: upper bound on the rows of logits in memory at a time. None chooses it from the device, V and the
            dtype, and uses a single chunk if that needs no more memory than several chunks. The logits of a longer
            sequence or pair are computed twice if dW or db is wanted.
        backend: "auto", "native" (C++, CPU tensors), "triton" (GPU tensors) or "torch".

    Returns:
        SequenceLossOutput, float32 (float64 for float64 inputs). ``loss`` can be scaled and added to other losses
        before ``backward``. Gradients have the dtypes of their inputs; sums over chunks are accumulated in float32
        (float64 for float64 inputs).

    Raises:
        TypeError: if dtypes differ, or ``targets`` are not int64.
        ValueError: if shapes do not match, offsets do not ascend, a sequence has no row, there are fewer than
            2 · ``pairs`` sequences, a target is outside the vocabulary, or tensors are on different devices. The range
            of targets is not checked on a GPU: a target outside the vocabulary makes the loss NaN or triggers a
            device-side assertion.

    Example:
        >>> import torch
        >>> from efface_kernels import linear_sequence_loss
        >>> hidden, weight = torch.zeros(5, 8), torch.zeros(16, 8)  # uniform over 16 tokens
        >>> targets, row_offsets = torch.arange(5), [0, 3, 5]  # two sequences of 3 and 2 labels
        >>> linear_sequence_loss(hidden, weight, targets, row_offsets, lambda s: -s.sums).terms
        tensor([8.3178, 5.5452])
    """
    hidden, head = Head(weight, bias, softcap).cast_for(hidden)
    wanted = Wanted.of(hidden, head)
    call = Call(
        hidden, head, targets, row_offsets, terms, wanted, pairs, reference, reference_sums, chunk_rows, backend
    )
    if not torch.compiler.is_compiling():
        return _eager(call)
    if isinstance(terms, SequenceRule):
        return _in_graph(call, terms)
    outside: Callable[[Call], SequenceLossOutput] = torch.compiler.disable(_eager)
    return outside(call)


def _eager(call: Call) -> SequenceLossOutput:
    def differentiable(call: Call, rows: int) -> tuple[Tensor, ...]:
        head = call.head
        output: tuple[Tensor, ...] = _LinearSequenceLoss.apply(call.hidden, head.weight, head.bias, call, rows)  # type: ignore[no-untyped-call]
        return output

    return SequenceLossOutput(*call.checked().run(differentiable))


def _in_graph(call: Call, rule: SequenceRule) -> SequenceLossOutput:
    """Call the custom op of ``compiled.py`` while a model is compiled; the op checks its arguments when it runs."""
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
        call.wanted.flags,
        call.chunk_rows,
        call.backend,
    )
    terms, sums, live_sums, logprobs = (each.detach() for each in seen[:4])
    reference_sums = call.reference_sums if call.reference is None else live_sums
    return SequenceLossOutput(loss, terms, sums, reference_sums, logprobs)


def _checked_reference(reference: ReferenceRows, targets: Tensor, offsets: RowOffsets) -> ReferenceRows:
    reference = reference.cast()
    hidden, head = reference.hidden, reference.head
    head.check(hidden, prefix="reference_")
    m, ends = hidden.shape[0], offsets.host.tolist()
    if m not in ends:
        raise ValueError(
            f"`reference_hidden`: expected all rows of the first sequences, got {m} rows; end at a sequence boundary, "
            f"that is after {', '.join(map(str, ends[1:4]))} … rows"
        )
    check_targets(targets[:m], m, head.vocabulary)
    check_same_device(hidden=targets, reference_hidden=hidden)
    return reference
