"""``linear_logprob``: log-probabilities of the targets, differentiable for any upstream gradient."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from efface_kernels.checks import check_same_device, check_targets, resolve_backend
from efface_kernels.linear_loss.chunks import default_chunk_rows, plan_pieces
from efface_kernels.linear_loss.head import Head
from efface_kernels.linear_loss.look import RowLook
from efface_kernels.linear_loss.loop import Gradients, Wanted, run_loop
from efface_kernels.row_pass import row_pass


@dataclass(frozen=True)
class _Options:
    softcap: float | None
    chunk_rows: int
    backend: str


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: _Options
    ) -> Tensor:
        head = Head(weight, bias, options.softcap)
        wanted = Wanted(*ctx.needs_input_grad[:3])
        ctx.options = options
        if wanted.any and 0 < hidden.shape[0] <= options.chunk_rows:
            # One chunk: its softmax − onehot stays for the backward call, within the workspace.
            p = head.logits(hidden, hidden.new_empty(hidden.shape[0], head.vocabulary))
            out = row_pass(p, targets, softcap=options.softcap, gradient=True, backend=options.backend)
            ctx.save_for_backward(hidden, weight, bias, targets, p)
            return out.logprobs
        ctx.save_for_backward(hidden, weight, bias, targets, None)
        chunks = plan_pieces(hidden.shape[0], options.chunk_rows)
        look = RowLook(hidden, head, targets, chunks, backend=options.backend)
        run_loop(hidden, head, look, chunks, wanted=Wanted())
        return look.logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, p = ctx.saved_tensors
        options: _Options = ctx.options
        head = Head(weight, bias, options.softcap)
        wanted = Wanted(*ctx.needs_input_grad[:3])
        with torch.no_grad():
            if p is not None:
                gradients = Gradients(wanted, hidden, head, chunks=1)
                gradients.add_hidden(slice(None), p)
                if wanted.head:
                    gradients.add_head(slice(None), p, upstream)
            else:
                chunks = plan_pieces(hidden.shape[0], options.chunk_rows)
                look = RowLook(hidden, head, targets, chunks, backend=options.backend)
                _, gradients = run_loop(
                    hidden, head, look, chunks, wanted=wanted, rule=lambda chunk: upstream[chunk.rows]
                )
            return (*gradients.finish(upstream, keep=False), None, None)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    chunk_rows: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Log-probability of each row's target under the head, without keeping the logits of all rows.

    Equal to::

        logits = torch.nn.functional.linear(hidden, weight, bias).float()
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return torch.log_softmax(logits, -1).gather(-1, targets[:, None])[:, 0]

    Any function of the result may be differentiated. Up to ``chunk_rows`` rows the softmax is kept for the backward
    call; beyond, logits are made again chunk by chunk. Where the loss is a sum over sequences,
    ``linear_sequence_loss`` needs one GEMM less.

    Args:
        hidden: (N, D), float16, bfloat16, float32 or float64.
        weight: (V, D), same dtype.
        targets: (N,) int64, in 0 .. V − 1.
        bias: (V,), same dtype, or None.
        softcap: Gemma-2's cap on the logits, or None.
        chunk_rows: rows of logits alive at a time; None chooses from the device, V and the dtype.
        backend: "auto", "native" (C++, CPU tensors), "triton" (GPU tensors) or "torch".

    Returns:
        (N,), in nats, float32 (float64 for float64 inputs). Gradients have the dtypes of their inputs; those of
        ``weight`` and ``bias`` are summed in float32. Inside ``torch.autocast`` inputs are cast as by ``linear``.

    Raises:
        TypeError: dtypes that differ, or targets that are not int64.
        ValueError: shapes that do not fit, a target out of the vocabulary, tensors on different devices.
    """
    hidden, head = Head(weight, bias, softcap).under_autocast(hidden)
    head.check(hidden)
    check_targets(targets, hidden.shape[0], head.vocabulary)
    check_same_device(hidden=hidden, targets=targets)
    options = _Options(
        softcap, resolve_chunk_rows(chunk_rows, head, hidden.dtype), resolve_backend(backend, hidden.device)
    )
    with torch.autocast(hidden.device.type, enabled=False):
        logprobs: Tensor = _LinearLogprob.apply(hidden, head.weight, head.bias, targets, options)  # type: ignore[no-untyped-call]
    return logprobs


def resolve_chunk_rows(chunk_rows: int | None, head: Head, logits: torch.dtype) -> int:
    """Return ``chunk_rows``, or the default for this device and vocabulary, and the dtype of the logits."""
    if chunk_rows is None:
        return default_chunk_rows(head.weight.device.type, head.vocabulary, logits.itemsize)
    if chunk_rows < 1:
        raise ValueError(f"`chunk_rows`: expected at least 1, got {chunk_rows}")
    return chunk_rows
