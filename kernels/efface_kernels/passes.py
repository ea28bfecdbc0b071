"""The passes as operations: their arguments checked, and run by the backend that is asked for."""

from typing import NamedTuple

import torch
from torch import Tensor

from efface_kernels.backends import resolve_backend
from efface_kernels.checks import (
    FLOATS,
    check_dtype,
    check_same_device,
    check_shape,
    check_softcap,
    check_targets,
)
from efface_kernels.distribution_pass.launch import distribution_pass_triton
from efface_kernels.distribution_pass.reference import distribution_pass_torch
from efface_kernels.logits import Logits
from efface_kernels.native import distribution_pass_native, row_pass_native
from efface_kernels.row_pass.launch import row_pass_triton
from efface_kernels.row_pass.reference import row_pass_torch
from efface_kernels.scale_pass.launch import scale_pass_triton
from efface_kernels.scale_pass.reference import scale_pass_torch
from efface_kernels.sequence_loss.launch import sequence_loss_triton
from efface_kernels.sequence_loss.rule import SequenceRule, SequenceTerms, sequence_loss_torch
from efface_kernels.sequences import Sequences


class RowPassOutput(NamedTuple):
    """What a row pass returns. ``reference_logprobs`` is None where no reference logits were given."""

    logprobs: Tensor  # (n,)
    reference_logprobs: Tensor | None  # (m,)


ROW_PASSES = {"torch": row_pass_torch, "native": row_pass_native, "triton": row_pass_triton}


def row_pass(
    logits: Tensor,
    targets: Tensor,
    *,
    reference_logits: Tensor | None = None,
    softcap: float | None = None,
    reference_softcap: float | None = None,
    gradient: bool = True,
    backend: str = "auto",
) -> RowPassOutput:
    """Log-probabilities of the targets; with ``gradient``, ``logits`` becomes softmax − onehot in place.

    Equal to::

        z = logits.float()
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        logprobs = torch.log_softmax(z, -1).gather(-1, targets[:, None])[:, 0]
        logits.copy_(-(derivative of logprobs with respect to logits))

    The loss's coefficient of a row, c = ∂loss/∂ℓ, is a factor of the whole row; the pass needs no loss.

    Args:
        logits: (n, V), float16, bfloat16, float32 or float64; overwritten if ``gradient``.
        targets: (n,) int64, in 0 .. V − 1.
        reference_logits: (m, V'), m ≤ n, logits of a frozen model for the first m rows; only read. Its dtype and
            vocabulary may differ from those of ``logits``.
        softcap: cap of Gemma-2's z ← cap · tanh(z / cap), applied here; its derivative is part of the result.
        reference_softcap: the same for ``reference_logits``.
        gradient: False leaves ``logits`` as they are.
        backend: "auto", "triton" (GPU tensors), "native" (C++, CPU tensors) or "torch".

    Returns:
        ``logprobs`` (n,) and ``reference_logprobs`` (m,), in nats, float32 (float64 for float64 logits).

    Raises:
        TypeError: a dtype other than those above.
        ValueError: shapes that do not fit, a target out of the vocabulary, tensors on different devices. On a
            GPU the targets are not looked at beforehand: one out of the vocabulary makes its row's results NaN.
    """
    check_dtype("logits", logits, FLOATS)
    check_shape("logits", logits, ("n", "V"))
    check_targets(targets, *logits.shape)
    check_softcap(softcap)
    check_softcap(reference_softcap)
    check_same_device(logits=logits, targets=targets, reference_logits=reference_logits)
    reference = None
    if reference_logits is not None:
        check_dtype("reference_logits", reference_logits, FLOATS)
        check_shape("reference_logits", reference_logits, ("m", "V"))
        m = reference_logits.shape[0]
        if m > logits.shape[0]:
            raise ValueError(
                f"`reference_logits`: expected at most {logits.shape[0]} rows (those of `logits`), got {m}"
            )
        check_targets(targets[:m], *reference_logits.shape)
        reference = Logits(reference_logits, reference_softcap)
    run = ROW_PASSES[resolve_backend(backend, logits.device)]
    logprobs, *others = run(Logits(logits, softcap), targets, reference, gradient)
    return RowPassOutput(logprobs, others[0] if others else None)


class DistributionPassOutput(NamedTuple):
    """KL(q‖p) and the entropy of q; the cross entropy −Σ q log p is their sum."""

    divergence: Tensor  # (n,)
    entropy: Tensor  # (n,)


def _check_out(out: Tensor, logits: Tensor, reference_logits: Tensor, *, gradient: bool) -> None:
    check_shape("out", out, logits.shape, "it takes the derivative with respect to `logits`")
    check_dtype("out", out, [dtype for dtype in FLOATS if dtype.itemsize <= logits.dtype.itemsize])
    if _overlaps_itself(out):
        raise ValueError(f"`out`: expected entries apart in memory, got strides {out.stride()} of {tuple(out.shape)}")
    if not gradient:
        raise ValueError("`out`: expected None with `gradient=False`, which forms no derivative, got a tensor")
    if _share_memory(out, logits) and _layout(out) != _layout(logits):
        raise ValueError(
            f"`out`: expected `logits` themselves or memory that they do not reach, got {_said(out)} over "
            f"{_said(logits)}; give it memory of its own"
        )
    if _share_memory(out, reference_logits) and not _row_on_row(out, reference_logits):
        raise ValueError(
            "`out`: expected memory of its own, or rows that begin where those of `reference_logits` begin, in a "
            f"dtype no wider, got {_said(out)} over {_said(reference_logits)}; use "
            "`reference_logits.view(dtype)[:, :V]`"
        )


def _overlaps_itself(values: Tensor) -> bool:
    """Whether two entries of a matrix may share memory."""
    reach = 0
    for stride, size in sorted(zip(values.stride(), values.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _layout(values: Tensor) -> tuple[int, torch.dtype, tuple[int, ...]]:
    """Where the entries lie; a stride along which there is one entry says nothing."""
    strides = tuple(0 if size < 2 else stride for size, stride in zip(values.shape, values.stride(), strict=True))
    return values.data_ptr(), values.dtype, strides


def _said(values: Tensor) -> str:
    return f"{values.dtype} of strides {values.stride()} from entry {values.storage_offset()}"


def _share_memory(one: Tensor, other: Tensor) -> bool:
    """Whether the ranges of memory from the first to the last entry meet."""
    if not one.numel() or not other.numel():
        return False
    (first, last), (other_first, other_last) = (
        (each.data_ptr(), each[-1:, -1:].data_ptr() + each.dtype.itemsize) for each in (one, other)
    )
    return first < other_last and other_first < last


def _row_on_row(out: Tensor, reference: Tensor) -> bool:
    """Whether a row of ``out`` lies on what was read of the same row of ``reference``, and on no other."""
    if out.data_ptr() != reference.data_ptr() or out.dtype.itemsize > reference.dtype.itemsize:
        return False
    starts = [each.stride(0) * each.dtype.itemsize for each in (out, reference)]
    rows, columns = out.shape
    return (rows == 1 or starts[0] == starts[1]) and (columns == 1 or out.stride(1) == reference.stride(1) == 1)


DISTRIBUTION_PASSES = {
    "torch": distribution_pass_torch,
    "native": distribution_pass_native,
    "triton": distribution_pass_triton,
}


def distribution_pass(
    logits: Tensor,
    reference_logits: Tensor,
    targets: Tensor,
    *,
    shift: float = 0.0,
    softcap: float | None = None,
    reference_softcap: float | None = None,
    gradient: bool = True,
    out: Tensor | None = None,
    backend: str = "auto",
) -> DistributionPassOutput:
    """KL(q‖p) of each row, with p = softmax(logits), q = softmax(reference_logits − shift · onehot(targets)).

    Equal to::

        q = torch.softmax(reference_logits.float() - shift * one_hot(targets, V), -1)
        log_p = torch.log_softmax(logits.float(), -1)
        divergence, entropy = (q * (q.log() - log_p)).sum(-1), -(q * q.log()).sum(-1)
        logits.copy_(log_p.exp() - q)  # the derivative of the divergence with respect to logits

    Shift 0 is the KL retain term; UNDIAL's cross entropy (arXiv 2402.10052) is divergence + entropy with shift = β.
    At the start of a run p = q and p − q is nothing but rounding: give float32 logits, not bfloat16.

    Args:
        logits: (n, V), float16, bfloat16, float32 or float64; overwritten if ``gradient``.
        reference_logits: (n, V); only read. Its dtype may differ, but float64 needs float64 ``logits``.
        targets: (n,) int64, in 0 .. V − 1; where the shift applies.
        shift: what the target's reference logit is lowered by, after the cap.
        softcap: z ← cap · tanh(z / cap) of ``logits``, or None; its derivative is part of the result.
        reference_softcap: the same for ``reference_logits``.
        gradient: False forms no derivative and leaves ``logits`` as they are.
        out: (n, V), any of the dtypes but none wider than that of ``logits``: takes the derivative in their place, and
            they are only read. May lie on the memory of ``reference_logits``, row on row
            and in no wider dtype, as ``reference_logits.view(torch.bfloat16)[:, :V]`` does.
        backend: "auto", "triton" (GPU tensors), "native" (C++, CPU tensors) or "torch".

    Returns:
        ``divergence`` and ``entropy``, (n,), in nats, float32 (float64 for float64 logits).

    Raises:
        TypeError: a dtype other than those above.
        ValueError: shapes that differ, a target out of the vocabulary, tensors on different devices, an ``out`` that
            lies on other memory of the inputs or comes without ``gradient``. On a GPU the targets are not looked at
            beforehand: one out of the vocabulary makes its row's results NaN.
    """
    check_dtype("logits", logits, FLOATS)
    check_shape("logits", logits, ("n", "V"))
    check_dtype("reference_logits", reference_logits, FLOATS if logits.dtype == FLOATS[-1] else FLOATS[:-1])
    check_shape("reference_logits", reference_logits, logits.shape, "both models need the same rows and vocabulary")
    check_targets(targets, *logits.shape)
    check_softcap(softcap)
    check_softcap(reference_softcap)
    check_same_device(logits=logits, reference_logits=reference_logits, targets=targets, out=out)
    if out is not None:
        _check_out(out, logits, reference_logits, gradient=gradient)
    into = (logits if out is None else out) if gradient else None
    run = DISTRIBUTION_PASSES[resolve_backend(backend, logits.device)]
    pair = Logits(logits, softcap), Logits(reference_logits, reference_softcap)
    return DistributionPassOutput(*run(*pair, targets, shift, into))


def scale_pass(values: Tensor, factor: Tensor, *, dtype: torch.dtype, keep: bool, backend: str) -> Tensor:
    """A gradient times a scalar that is on its device.

    Equal to::

        (values * factor).to(dtype)

    rounded once. Where the values need not be kept and have that dtype, they are scaled in place and returned.

    Args:
        values: any shape and floating dtype.
        factor: (), float32 (float64 for float64 values).
        dtype: of the result.
        keep: whether ``values`` must stay as they are, and the result be other memory.
        backend: a resolved one; "native" is plain torch.
    """
    run = scale_pass_triton if backend == "triton" else scale_pass_torch
    return run(values, factor, dtype, keep)


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
