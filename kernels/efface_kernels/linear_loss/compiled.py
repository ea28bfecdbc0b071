"""Custom ops with fake kernels, which make the losses opaque to ``torch.compile``.

``linear_logprob`` and ``linear_sequence_loss`` call these ops only while a model is compiled; the eager path avoids the
overhead of the dispatcher. The ops read the sizes of a batch when they run, so batches of different sizes share a
graph. An output that was not requested is an empty tensor, because the schema of an op has no optional output tensors.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from efface_kernels.backends import resolve_backend
from efface_kernels.checks import check_chunk_rows
from efface_kernels.linear_loss import logprob
from efface_kernels.linear_loss.fused_loss import Call, compute
from efface_kernels.linear_loss.head import Head, ReferenceRows
from efface_kernels.linear_loss.loop import Wanted
from efface_kernels.logits import accumulation_dtype
from efface_kernels.memory import aligned
from efface_kernels.sequence_loss.rule import SequenceRule
from efface_kernels.sequences import RowOffsets

Loss = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _present(tensor: Tensor | None, wanted: bool, like: Tensor) -> Tensor:
    """Return an empty tensor unless ``wanted``; otherwise ``tensor``, or zeros if it is None because N = 0."""
    if not wanted:
        return like.new_empty(0)
    return torch.zeros_like(like) if tensor is None else tensor


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which the forward op returns dW and db.

    It is float32 for fp16: the loss scale is applied later, in the backward call, and unscaled fp16 values can
    underflow.
    """
    return torch.float32 if dtype == torch.float16 else dtype


@torch.library.custom_op("efface::linear_sequence_loss", mutates_args=())
def _linear_sequence_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_offsets: Tensor,
    device_offsets: Tensor | None,
    roles: Tensor,
    table: Tensor,
    kinds: Sequence[int],
    pairs: int,
    softcap: float | None,
    reference_hidden: Tensor | None,
    reference_weight: Tensor | None,
    reference_bias: Tensor | None,
    reference_softcap: float | None,
    reference_sums: Tensor | None,
    wanted: Sequence[bool],
    chunk_rows: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return loss, terms, sums, live reference sums, logprobs, coefficients, P W, dW, db.

    Inductor caches compiled backward graphs on disk under the names of their ops, so the meaning of an output must not
    change.
    """
    offsets = row_offsets if device_offsets is None else RowOffsets(row_offsets, device_offsets)
    live = None
    if reference_hidden is not None and reference_weight is not None:
        live = ReferenceRows(reference_hidden, Head(reference_weight, reference_bias, reference_softcap))
    head, rule, wants = Head(weight, bias, softcap), SequenceRule(roles, table, tuple(kinds)), Wanted(*wanted)
    call = Call(hidden, head, targets, offsets, rule, wants, pairs, live, reference_sums, chunk_rows, backend)
    output, factors, made = call.checked().run(compute)
    return (
        output.loss,
        output.terms,
        output.sequence_logprobs,
        _present(output.reference_sums, live is not None, output.terms),
        output.logprobs,
        -factors,
        _present(made.pw, wants.hidden, hidden),
        _present(made.weight, wants.weight, weight).to(_sum_dtype(weight.dtype)),
        _present(made.bias, wants.bias, weight if bias is None else bias).to(_sum_dtype(weight.dtype)),
    )


@_linear_sequence_loss.register_fake
def _(*arguments: Any) -> Loss:
    hidden, weight, _bias, _targets, row_offsets = arguments[:5]
    reference_hidden, wanted = arguments[11], arguments[16]
    dtype, sum_dtype = accumulation_dtype(hidden.dtype), _sum_dtype(weight.dtype)
    n, sequences = hidden.shape[0], row_offsets.shape[0] - 1
    each = hidden.new_empty(sequences, dtype=dtype)
    rows = hidden.new_empty(n, dtype=dtype)
    return (
        hidden.new_empty((), dtype=dtype),
        each,
        torch.empty_like(each),
        each.new_empty(0 if reference_hidden is None else sequences),
        rows,
        torch.empty_like(rows),
        hidden.new_empty(hidden.shape if wanted[0] else 0),
        weight.new_empty(weight.shape if wanted[1] else 0, dtype=sum_dtype),
        weight.new_empty(weight.shape[:1] if wanted[2] else 0, dtype=sum_dtype),
    )


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: Loss) -> None:
    ctx.save_for_backward(*output[-4:])
    ctx.wanted, ctx.count, ctx.dtypes = inputs[16], len(inputs), (inputs[0].dtype, inputs[1].dtype)
    ctx.set_materialize_grads(False)


def _scale_gradients(ctx: Any, upstream: Tensor | None, *_unused: Tensor | None) -> tuple[Tensor | None, ...]:
    coefficients, pw, dw, db = ctx.saved_tensors
    gradients: list[Tensor | None] = [None] * ctx.count
    if upstream is not None:
        if torch.is_grad_enabled() and upstream.requires_grad:
            raise RuntimeError("linear_sequence_loss: expected to be differentiated once; it has no second derivative")
        hidden_dtype, weight_dtype = ctx.dtypes
        made = (
            # Out of place, as a graph requires; the compiler fuses each line into one kernel.
            (pw * (-coefficients * upstream)[:, None]).to(hidden_dtype),
            # reshaped, because a 0-dimensional factor would first be rounded to the dtype of dW
            (dw * upstream.reshape(1, 1)).to(weight_dtype),
            (db * upstream.reshape(1)).to(weight_dtype),
        )
        gradients[:3] = [each if wanted else None for each, wanted in zip(made, ctx.wanted, strict=True)]
    return tuple(gradients)


_linear_sequence_loss.register_autograd(_scale_gradients, setup_context=_keep_gradients)


@torch.library.custom_op("efface::linear_logprob", mutates_args=())
def _linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    softcap: float | None,
    wanted: Sequence[bool],  # noqa: ARG001 - read by the backward call
    keep: bool,
    chunk_rows: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return ℓ, and P = softmax − onehot if ``keep``, else an empty tensor."""
    head = Head(weight, bias, softcap)
    check_chunk_rows(chunk_rows)
    logprob.check(hidden, head, targets)
    options = logprob.Options(softcap, chunk_rows, resolve_backend(backend, hidden.device))
    with torch.autocast(hidden.device.type, enabled=False):
        logprobs, p = logprob.forward(hidden, head, targets, options, keep=keep)
    return logprobs, hidden.new_empty(0) if p is None else p


@_linear_logprob.register_fake
def _(hidden: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    n, keep = hidden.shape[0], arguments[4]
    return (
        hidden.new_empty(n, dtype=accumulation_dtype(hidden.dtype)),
        aligned(n, weight.shape[0], hidden.dtype, hidden.device) if keep else hidden.new_empty(0),
    )


@torch.library.custom_op("efface::linear_logprob_backward", mutates_args=())
def _linear_logprob_backward(
    upstream: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    p: Tensor,
    softcap: float | None,
    wanted: Sequence[bool],
    keep: bool,
    chunk_rows: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dh, dW, db); a gradient that is not wanted is an empty tensor."""
    options = logprob.Options(softcap, chunk_rows, resolve_backend(backend, hidden.device))
    head, wants, kept = Head(weight, bias, softcap), Wanted(*wanted), p if keep else None
    with torch.autocast(hidden.device.type, enabled=False):
        dh, dw, db = logprob.backward(upstream, hidden, head, targets, kept, options, wants)
    return (
        _present(dh, wants.hidden, hidden),
        _present(dw, wants.weight, weight),
        _present(db, wants.bias, weight if bias is None else bias),
    )


@_linear_logprob_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    _upstream, hidden, weight = arguments[:3]
    wanted = arguments[7]
    return (
        hidden.new_empty(hidden.shape if wanted[0] else 0),
        weight.new_empty(weight.shape if wanted[1] else 0),
        weight.new_empty(weight.shape[:1] if wanted[2] else 0),
    )


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, weight, bias, targets, *ctx.options = inputs
    ctx.save_for_backward(hidden, weight, bias, targets, output[1])


def _logprob_gradients(ctx: Any, upstream: Tensor, _p: Tensor | None) -> tuple[Tensor | None, ...]:
    softcap, wanted, keep, chunk_rows, backend = ctx.options
    made = torch.ops.efface.linear_logprob_backward(
        upstream, *ctx.saved_tensors, softcap, wanted, keep, chunk_rows, backend
    )
    return (*(each if want else None for each, want in zip(made, wanted, strict=True)), *[None] * 6)


_linear_logprob.register_autograd(_logprob_gradients, setup_context=_keep_inputs)
