"""``linear_logprob``: log-probabilities of the targets, differentiable for any upstream gradient."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from efface_kernels.backends import resolve_backend
from efface_kernels.checks import check_same_device, check_targets
from efface_kernels.linear_loss.chunks import default_chunk_rows, device_memory, plan_pieces, run_within_memory
from efface_kernels.linear_loss.head import Head
from efface_kernels.linear_loss.look import RowLook
from efface_kernels.linear_loss.loop import Gradients, Wanted, run_loop
from efface_kernels.memory import aligned
from efface_kernels.passes import row_pass


@dataclass(frozen=True)
class Options:
    """Checked options of a call that are not tensors."""

    softcap: float | None
    chunk_rows: int
    backend: str


def forward(
    hidden: Tensor, head: Head, targets: Tensor, options: Options, *, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Return ℓ (N,) and, if ``keep``, P = softmax − onehot (N, V) for the backward call.

    With ``keep``, all rows form a single chunk.
    """
    if keep:
        p = head.logits(hidden, aligned(hidden.shape[0], head.vocabulary, hidden.dtype, hidden.device))
        out = row_pass(p, targets, softcap=options.softcap, gradient=True, backend=options.backend)
        return out.logprobs, p
    chunks = plan_pieces(hidden.shape[0], options.chunk_rows)
    look = RowLook(hidden, head, targets, chunks, backend=options.backend)
    run_loop(hidden, head, look, chunks, wanted=Wanted(), backend=options.backend)
    return look.logprobs, None


@torch.no_grad()
def backward(
    upstream: Tensor, hidden: Tensor, head: Head, targets: Tensor, p: Tensor | None, options: Options, wanted: Wanted
) -> tuple[Tensor | None, ...]:
    """Return (dh, dW, db) for an upstream gradient (N,), from the saved P or, if it is None, from recomputed logits."""
    if p is not None:
        gradients, factors = Gradients(wanted, hidden, head, chunks=1, backend=options.backend), -upstream
        gradients.add_hidden(slice(None), p)
        if wanted.head:
            gradients.add_head(slice(None), p, factors)
    else:
        chunks = plan_pieces(hidden.shape[0], options.chunk_rows)
        look = RowLook(hidden, head, targets, chunks, backend=options.backend)
        factors, gradients = run_loop(
            hidden, head, look, chunks, wanted=wanted, backend=options.backend, rule=lambda chunk: upstream[chunk.rows]
        )
    return gradients.finish(factors, keep=False)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: Options, wanted: Wanted
    ) -> Tensor:
        ctx.options, ctx.wanted = options, wanted
        # A single chunk: save softmax − onehot, which is no larger than the workspace, for the backward call.
        keep = wanted.any and 0 < hidden.shape[0] <= options.chunk_rows
        logprobs, p = forward(hidden, Head(weight, bias, options.softcap), targets, options, keep=keep)
        ctx.save_for_backward(hidden, weight, bias, targets, p)
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, p = ctx.saved_tensors
        head = Head(weight, bias, ctx.options.softcap)
        return (*backward(upstream, hidden, head, targets, p, ctx.options, ctx.wanted), None, None, None)


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
    """Return the log-probability of each row's target without materialising the logits of all rows.

    Equal to::

        logits = torch.nn.functional.linear(hidden, weight, bias).float()
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return torch.log_softmax(logits, -1).gather(-1, targets[:, None])[:, 0]

    Any function of the result can be differentiated. For up to ``chunk_rows`` rows, the softmax is saved for the
    backward call; for more rows, the backward call recomputes the logits chunk by chunk. If the loss is a sum over
    sequences, ``linear_sequence_loss`` avoids the recomputation and so needs one GEMM less.

    Args:
        hidden: (N, D), float16, bfloat16, float32 or float64.
        weight: (V, D), same dtype.
        targets: (N,) int64, in 0 .. V − 1.
        bias: (V,), same dtype, or None.
        softcap: Gemma-2's cap on the logits, z ← softcap · tanh(z / softcap), or None.
        chunk_rows: upper bound on the rows of logits in memory at a time; None chooses it from the device, V and the
            dtype.
        backend: "auto", "native" (C++, CPU tensors), "triton" (GPU tensors) or "torch".

    Returns:
        (N,), in nats, float32 (float64 for float64 inputs). Gradients have the dtypes of their inputs; those of
        ``weight`` and ``bias`` are summed over chunks in float32 (float64 for float64 inputs). Inside
        ``torch.autocast`` the inputs are cast as by ``torch.nn.functional.linear``.

    Raises:
        TypeError: if dtypes differ, or ``targets`` are not int64.
        ValueError: if shapes do not match, a target is outside the vocabulary, or tensors are on different devices. The
            range of targets is not checked on a GPU: a target outside the vocabulary makes the loss NaN or triggers a
            device-side assertion.

    Example:
        >>> import torch
        >>> from efface_kernels import linear_logprob
        >>> hidden, weight = torch.zeros(2, 8), torch.zeros(16, 8)  # uniform over 16 tokens
        >>> linear_logprob(hidden, weight, torch.tensor([3, 1]))  # -log 16
        tensor([-2.7726, -2.7726])
    """
    hidden, head = Head(weight, bias, softcap).cast_for(hidden)
    if torch.compiler.is_compiling():
        return _in_graph(hidden, head, targets, chunk_rows, backend)
    check(hidden, head, targets)
    resolved = resolve_backend(backend, hidden.device)
    wanted = Wanted.of(hidden, head)

    def run(rows: int) -> Tensor:
        options = Options(softcap, rows, resolved)
        with torch.autocast(hidden.device.type, enabled=False):
            logprobs: Tensor = _LinearLogprob.apply(hidden, head.weight, head.bias, targets, options, wanted)  # type: ignore[no-untyped-call]
        return logprobs

    # Unlike linear_sequence_loss, never enlarge the chunk to hold all rows: the saved softmax of every call stays in
    # memory until its backward call.
    return run_within_memory(run, chunk_rows, hidden, head)


def check(hidden: Tensor, head: Head, targets: Tensor) -> None:
    """Raise the errors documented in ``linear_logprob``."""
    head.check(hidden)
    check_targets(targets, hidden.shape[0], head.vocabulary)
    check_same_device(hidden=hidden, targets=targets)


def _in_graph(hidden: Tensor, head: Head, targets: Tensor, chunk_rows: int | None, backend: str) -> Tensor:
    """Call the custom op of ``compiled.py`` while a model is compiled; the op checks its arguments."""
    wanted, rows = Wanted.of(hidden, head), chunk_rows
    if rows is None:  # a compiled graph cannot depend on the free memory, only on the total memory
        total = _device_memory(hidden.device)
        rows = default_chunk_rows(hidden.device.type, head.vocabulary, hidden.element_size(), total_bytes=total)
    keep = wanted.any and hidden.shape[0] <= rows
    logprobs: Tensor = torch.ops.efface.linear_logprob(
        hidden, head.weight, head.bias, targets, head.softcap, wanted.flags, keep, rows, backend
    )[0]
    return logprobs


def _device_memory(device: torch.device) -> int | None:
    """Return the device's total memory, which a compiled graph treats as a constant."""
    return device_memory(device)


# torch.compiler.assume_constant_result sets this attribute. Calling it would import the compiler, and with it Triton.
_device_memory._dynamo_marked_constant = True  # type: ignore[attr-defined]  # noqa: SLF001
