"""``linear_distribution_loss``: KL divergence or cross entropy to a frozen model, computed with its gradients."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from efface_kernels.backends import resolve_backend
from efface_kernels.checks import FLOATS, check_dtype, check_same_device, check_shape, check_targets
from efface_kernels.linear_loss.chunks import Chunk, plan_pieces, run_within_memory
from efface_kernels.linear_loss.head import Head, ReferenceRows
from efface_kernels.linear_loss.look import DistributionLook
from efface_kernels.linear_loss.loop import Wanted, graph_is_kept, run_loop
from efface_kernels.logits import accumulation_dtype


class DistributionLossOutput(NamedTuple):
    """Result of ``linear_distribution_loss``. Only ``loss`` is differentiable."""

    loss: Tensor  # ()
    divergence: Tensor  # (N,) KL(q‖p)
    entropy: Tensor  # (N,) of q


@dataclass(frozen=True)
class _Call:
    """Arguments of one call of ``linear_distribution_loss``. ``checked`` converts ``row_weights`` to a tensor (N,)."""

    hidden: Tensor
    head: Head
    targets: Tensor
    row_weights: Tensor | float
    reference: ReferenceRows
    shift: float
    cross_entropy: bool
    chunk_rows: int | None
    backend: str

    def checked(self) -> "_Call":
        hidden, head = self.head.cast_for(self.hidden)
        head.check(hidden)
        check_targets(self.targets, hidden.shape[0], head.vocabulary)
        reference = _checked_reference(self.reference, hidden, head)
        weights, dtype = self.row_weights, accumulation_dtype(hidden.dtype)
        if isinstance(weights, Tensor):
            check_shape("row_weights", weights, hidden.shape[:1], "one weight for each row of `hidden`")
            check_dtype("row_weights", weights, (torch.float32, torch.float64))
            check_same_device(hidden=hidden, row_weights=weights)
            weights = weights.detach().to(dtype)
        else:
            weights = torch.full(hidden.shape[:1], weights, dtype=dtype, device=hidden.device)
        check_same_device(hidden=hidden, targets=self.targets)
        backend = resolve_backend(self.backend, hidden.device)
        return dataclasses.replace(
            self, hidden=hidden, head=head, row_weights=weights, reference=reference, backend=backend
        )


class _LinearDistributionLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,  # noqa: ARG004 - read through `call`; passed so that autograd tracks it, like the next one
        bias: Tensor | None,  # noqa: ARG004
        call: _Call,
        wanted: Wanted,
        chunk_rows: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        weights = cast("Tensor", call.row_weights)  # checked() has made it a tensor
        chunks = plan_pieces(hidden.shape[0], chunk_rows)
        look = DistributionLook(
            hidden,
            call.head,
            call.targets,
            chunks,
            reference=call.reference,
            shift=call.shift,
            backend=call.backend,
        )

        def rule(chunk: Chunk) -> Tensor:
            coefficients = -weights[chunk.rows]
            return coefficients if look.peaks is None else coefficients.mul_(look.peaks[chunk.rows])

        ctx.factors, ctx.gradients = run_loop(
            hidden, call.head, look, chunks, wanted=wanted, backend=call.backend, rule=rule
        )
        ctx.mark_non_differentiable(look.divergence, look.entropy)
        ctx.set_materialize_grads(False)
        values = look.divergence + look.entropy if call.cross_entropy else look.divergence
        return (weights * values).sum(), look.divergence, look.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, *_unused: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 6
        return (*ctx.gradients.finish(ctx.factors, upstream, keep=graph_is_kept()), *(None,) * 3)


def linear_distribution_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weights: Tensor | float,
    reference: ReferenceRows,
    *,
    shift: float = 0.0,
    cross_entropy: bool = False,
    bias: Tensor | None = None,
    softcap: float | None = None,
    chunk_rows: int | None = None,
    backend: str = "auto",
) -> DistributionLossOutput:
    """Return a weighted sum over rows of KL(q‖p), or of the cross entropy to q; gradients come from the forward call.

    Equal to::

        logits = torch.nn.functional.linear(hidden.float(), weight.float(), bias.float())
        frozen = torch.nn.functional.linear(reference.hidden.float(), reference.head.weight.float(), …)
        log_p = torch.log_softmax(logits, -1)
        q = torch.softmax(frozen - shift * one_hot(targets, V), -1)
        divergence, entropy = (q * (q.log() - log_p)).sum(-1), -(q * q.log()).sum(-1)
        loss = (row_weights * (divergence + entropy if cross_entropy else divergence)).sum()

    but only one chunk of logits per model is in memory at a time. Soft-caps are applied before the shift. With shift 0
    the loss is the KL retain term; with shift = β and the cross entropy it is UNDIAL (arXiv 2402.10052).

    Args:
        hidden: (N, D) hidden states of the label rows, float16, bfloat16, float32 or float64.
        weight: (V, D), same dtype.
        targets: (N,) int64, in 0 .. V − 1; the entries to which the shift applies.
        row_weights: (N,) float32 or float64, or one number for all rows. They receive no gradient.
        reference: hidden states of the frozen model for all N rows, and its head. D' and dtype can differ from the
            policy's (float64 needs a float64 policy); the vocabulary must be the same.
        shift: amount by which the target's reference logit is lowered.
        cross_entropy: if True, add the entropy of q, a constant, to each row's divergence.
        bias: (V,), same dtype, or None.
        softcap: Gemma-2's cap on the policy's logits, z ← softcap · tanh(z / softcap), or None. The reference's cap is
            that of its head.
        chunk_rows: upper bound on the rows of logits in memory at a time. None chooses it from the device and V, and
            uses a single chunk if that needs no more memory than several chunks.
        backend: "auto", "native" (C++, CPU tensors), "triton" (GPU tensors) or "torch".

    Returns:
        DistributionLossOutput, in nats, float32 (float64 for float64 inputs). Gradients have the dtypes of their
        inputs; sums over chunks are accumulated in float32 (float64 for float64 inputs).

        Logits are float32 as well, because the gradient from bfloat16 logits would be rounding noise where p is close
        to q. If the device's GEMM cannot write float32 logits from half-precision operands, both heads are copied to
        float32 for the call. CPUs with bfloat16 instructions instead represent the logits of a bfloat16 head without
        bias as the sum of two bfloat16 matrices, which has 17 significant bits.

    Raises:
        TypeError: if dtypes differ, or ``targets`` are not int64.
        ValueError: if shapes or vocabularies do not match, a target is outside the vocabulary, or tensors are on
            different devices. The range of targets is not checked on a GPU: a target outside the vocabulary makes the
            loss NaN or triggers a device-side assertion.

    Example:
        >>> import torch
        >>> from efface_kernels import Head, ReferenceRows, linear_distribution_loss
        >>> hidden, weight = torch.zeros(2, 8), torch.zeros(2, 8)  # p uniform over 2 tokens
        >>> frozen = ReferenceRows(hidden, Head(weight, bias=torch.tensor([3.0, 1.0]).log()))  # q = 3/4, 1/4
        >>> linear_distribution_loss(hidden, weight, torch.tensor([0, 1]), 0.5, frozen).loss
        tensor(0.1308)
    """
    head = Head(weight, bias, softcap)
    call = _Call(hidden, head, targets, row_weights, reference, shift, cross_entropy, chunk_rows, backend)
    if not torch.compiler.is_compiling():
        return _eager(call)
    # Not traced: calls share workspaces, which a compiler would treat as private to its graph.
    outside: Callable[[_Call], DistributionLossOutput] = torch.compiler.disable(_eager)
    return outside(call)


def _eager(call: _Call) -> DistributionLossOutput:
    call = call.checked()
    hidden, head = call.hidden, call.head
    wanted, dtype = Wanted.of(hidden, head), accumulation_dtype(hidden.dtype)

    def run(rows: int) -> DistributionLossOutput:
        with torch.autocast(hidden.device.type, enabled=False):
            output = _LinearDistributionLoss.apply(hidden, head.weight, head.bias, call, wanted, rows)  # type: ignore[no-untyped-call]
        return DistributionLossOutput(*output)

    def logits_bytes(rows: int) -> int:
        return 2 * rows * head.vocabulary * dtype.itemsize

    sums_weight = logits_bytes if wanted.weight else None
    return run_within_memory(run, call.chunk_rows, hidden, head, logits=dtype, sums_weight=sums_weight)


def _checked_reference(reference: ReferenceRows, hidden: Tensor, head: Head) -> ReferenceRows:
    reference = reference.cast()
    frozen, frozen_head = reference.hidden, reference.head
    frozen_head.check(frozen, prefix="reference_")
    check_shape("reference_hidden", frozen, (hidden.shape[0], "D"), "one row for each row of `hidden`")
    check_dtype("reference_hidden", frozen, FLOATS if hidden.dtype == torch.float64 else FLOATS[:-1])
    if frozen_head.vocabulary != head.vocabulary:
        raise ValueError(
            f"`reference_weight`: expected {head.vocabulary} rows, the vocabulary of `weight`, got "
            f"{frozen_head.vocabulary}; use models with the same vocabulary (cut off padding rows of a head)"
        )
    check_same_device(hidden=hidden, reference_hidden=frozen)
    return reference
