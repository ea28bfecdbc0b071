"""The public passes over logits and log-probabilities: they check their arguments and dispatch to a backend."""

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
    """Result of ``row_pass``."""

    logprobs: Tensor  # (n,)
    reference_logprobs: Tensor | None  # (m,), or None without reference logits


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
    """Return the targets' log-probabilities; with ``gradient``, overwrite ``logits`` by softmax − onehot.

    Equal to::

        z = logits.float()
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        logprobs = torch.log_softmax(z, -1).gather(-1, targets[:, None])[:, 0]
        logits.copy_(-(derivative of logprobs with respect to logits))

    The pass needs no loss: the loss enters through one coefficient per row, c = ∂loss/∂ℓ, by which the whole row is
    multiplied later.

    Args:
        logits: (n, V), float16, bfloat16, float32 or float64; overwritten if ``gradient``.
        targets: (n,) int64, in 0 .. V − 1.
        reference_logits: (m, V'), m ≤ n, logits of a frozen model for the first m rows; only read. Their dtype and
            vocabulary can differ from those of ``logits``.
        softcap: Gemma-2's cap, z ← cap · tanh(z / cap), applied by the pass; its derivative is part of the result.
        reference_softcap: the same for ``reference_logits``.
        gradient: if False, ``logits`` are only read.
        backend: "auto", "triton" (GPU tensors), "native" (C++, CPU tensors) or "torch".

    Returns:
        ``logprobs`` (n,) and ``reference_logprobs`` (m,), in nats, float32 (float64 for float64 logits).

    Raises:
        TypeError: if a dtype is not one of those above.
        ValueError: if shapes do not match, a target is outside the vocabulary, or tensors are on different devices. The
            range of targets is not checked on a GPU: the Triton kernel makes the results of such a row NaN.

    Example:
        >>> import torch
        >>> from efface_kernels import row_pass
        >>> logits = torch.zeros(1, 4)
        >>> row_pass(logits, torch.tensor([1])).logprobs  # -log 4
        tensor([-1.3863])
        >>> logits  # softmax - onehot
        tensor([[ 0.2500, -0.7500,  0.2500,  0.2500]])
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
                f"`reference_logits`: expected at most {logits.shape[0]} rows (as many as `logits`), got {m}"
            )
        check_targets(targets[:m], *reference_logits.shape)
        reference = Logits(reference_logits, reference_softcap)
    run = ROW_PASSES[resolve_backend(backend, logits.device)]
    logprobs, *others = run(Logits(logits, softcap), targets, reference, gradient)
    return RowPassOutput(logprobs, others[0] if others else None)


class DistributionPassOutput(NamedTuple):
    """Result of ``distribution_pass``: KL(q‖p) and the entropy of q. Their sum is the cross entropy −Σ q log p."""

    divergence: Tensor  # (n,)
    entropy: Tensor  # (n,)


def _check_out(out: Tensor, logits: Tensor, reference_logits: Tensor, *, gradient: bool) -> None:
    check_shape("out", out, logits.shape, "it receives the derivative with respect to `logits`")
    check_dtype("out", out, [dtype for dtype in FLOATS if dtype.itemsize <= logits.dtype.itemsize])
    if _overlaps_itself(out):
        raise ValueError(f"`out`: expected disjoint entries, got strides {out.stride()} for shape {tuple(out.shape)}")
    if not gradient:
        raise ValueError("`out`: expected None with `gradient=False`, got a tensor; omit `out` or set `gradient=True`")
    if _share_memory(out, logits) and _layout(out) != _layout(logits):
        raise ValueError(
            f"`out`: expected `logits` themselves or memory that does not overlap them, got {_layout_text(out)} "
            f"overlapping {_layout_text(logits)}; pass a separate tensor"
        )
    if _share_memory(out, reference_logits) and not _row_on_row(out, reference_logits):
        raise ValueError(
            "`out`: expected separate memory, or rows that begin where the rows of `reference_logits` begin, in a "
            f"dtype that is not wider, got {_layout_text(out)} overlapping {_layout_text(reference_logits)}; use "
            "`reference_logits.view(dtype)[:, :V]`"
        )


def _overlaps_itself(values: Tensor) -> bool:
    """Return whether two entries of a matrix can share memory."""
    reach = 0
    for stride, size in sorted(zip(values.stride(), values.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _layout(values: Tensor) -> tuple[int, torch.dtype, tuple[int, ...]]:
    """Return address, dtype and strides. The stride of a dimension of size 0 or 1 is irrelevant and set to 0."""
    strides = tuple(0 if size < 2 else stride for size, stride in zip(values.shape, values.stride(), strict=True))
    return values.data_ptr(), values.dtype, strides


def _layout_text(values: Tensor) -> str:
    return f"{values.dtype} with strides {values.stride()} and offset {values.storage_offset()}"


def _share_memory(one: Tensor, other: Tensor) -> bool:
    """Return whether the memory ranges from the first to the last entry of two matrices overlap."""
    if not one.numel() or not other.numel():
        return False
    (first, last), (other_first, other_last) = (
        (each.data_ptr(), each[-1:, -1:].data_ptr() + each.dtype.itemsize) for each in (one, other)
    )
    return first < other_last and other_first < last


def _row_on_row(out: Tensor, reference: Tensor) -> bool:
    """Return whether each row of ``out`` overlaps the same row of ``reference`` and no other row."""
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
    """Return KL(q‖p) and the entropy of q for each row; with ``gradient``, write p − q.

    Here p = softmax(logits) and q = softmax(reference_logits − shift · onehot(targets)).

    Equal to::

        q = torch.softmax(reference_logits.float() - shift * one_hot(targets, V), -1)
        log_p = torch.log_softmax(logits.float(), -1)
        divergence, entropy = (q * (q.log() - log_p)).sum(-1), -(q * q.log()).sum(-1)
        logits.copy_(log_p.exp() - q)  # the derivative of the divergence with respect to logits

    With shift 0 the divergence is the KL retain term. With shift = β, divergence + entropy is UNDIAL's cross entropy
    (arXiv 2402.10052). At the start of a run p = q, and p − q from bfloat16 logits would be only rounding error: pass
    float32 logits.

    Args:
        logits: (n, V), float16, bfloat16, float32 or float64; overwritten if ``gradient``.
        reference_logits: (n, V); only read, unless ``out`` shares their memory. Their dtype can differ, but float64
            needs float64 ``logits``.
        targets: (n,) int64, in 0 .. V − 1; the entries to which the shift applies.
        shift: amount by which the target's reference logit is lowered, after the cap.
        softcap: z ← cap · tanh(z / cap) for ``logits``, or None; its derivative is part of the result.
        reference_softcap: the same for ``reference_logits``.
        gradient: if False, no derivative is formed and ``logits`` are only read.
        out: (n, V) matrix that receives the derivative, so that ``logits`` are only read; None overwrites ``logits``.
            Its dtype must not be wider than that of ``logits``. It can share the memory of ``reference_logits`` if each
            row begins where the row of ``reference_logits`` begins and the dtype is not wider, as in
            ``reference_logits.view(torch.bfloat16)[:, :V]``.
        backend: "auto", "triton" (GPU tensors), "native" (C++, CPU tensors) or "torch".

    Returns:
        ``divergence`` and ``entropy``, (n,), in nats, float32 (float64 for float64 logits).

    Raises:
        TypeError: if a dtype is not one of those above.
        ValueError: if shapes differ, a target is outside the vocabulary, tensors are on different devices, ``out``
            overlaps an input in any other way, or ``out`` is passed without ``gradient``. The range of targets is not
            checked on a GPU: the Triton kernel makes the results of such a row NaN.
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
    """Return ``values`` times a scalar tensor on the same device, in ``dtype``.

    Equal to::

        (values * factor).to(dtype)

    but rounded once. If ``keep`` is False and the values have this dtype already, they are scaled in place and
    returned.

    Args:
        values: a gradient of any shape and floating dtype.
        factor: (), float32 (float64 for float64 values).
        dtype: dtype of the result.
        keep: if True, ``values`` stay unchanged and the result is new memory.
        backend: a resolved backend; "native" runs plain torch.
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
    """Return the loss terms of whole sequences and their derivatives with respect to the log-probabilities.

    Equal to::

        terms = rule(Sequences(logprobs.requires_grad_(), row_offsets, 0, reference_sums))
        (coefficients,) = torch.autograd.grad(terms.sum(), logprobs)

    Args:
        logprobs: (n,) ℓ of the label rows, float32 or float64.
        row_offsets: (S + 1) int64 on the device of ``logprobs``, ascending from 0 to n.
        rule: assigns a term to each of the S sequences.
        reference_logprobs: (m,) ℓ of a live reference for the first m rows.
        reference_sums: (S,) cached L_ref, instead of ``reference_logprobs``.
        backend: "auto", "triton" (GPU tensors), "native" (CPU tensors) or "torch"; "native" also runs plain torch.

    Raises:
        TypeError: if a dtype is not one of those above.
        ValueError: if shapes do not match, tensors are on different devices, or a term needs a reference and none is
            given.
    """
    check_dtype("logprobs", logprobs, (torch.float32, torch.float64))
    check_shape("logprobs", logprobs, ("n",))
    check_dtype("row_offsets", row_offsets, (torch.int64,))
    check_shape("row_offsets", row_offsets, (rule.roles.shape[0] + 1,), "one offset more than the rule has roles")
    check_same_device(
        logprobs=logprobs,
        row_offsets=row_offsets,
        roles=rule.roles,
        reference_logprobs=reference_logprobs,
        reference_sums=reference_sums,
    )
    if reference_logprobs is not None and reference_sums is not None:
        raise ValueError("`reference_sums`: expected None with `reference_logprobs`, got both; pass one of them")
    if rule.needs_reference and reference_logprobs is None and reference_sums is None:
        raise ValueError(
            "`rule`: NPO and DPO need the reference model's log-probabilities, got none; pass `reference_logprobs` or "
            "`reference_sums`"
        )
    run = sequence_loss_triton if resolve_backend(backend, logprobs.device) == "triton" else sequence_loss_torch
    return run(Sequences(logprobs, row_offsets, 0, reference_sums), rule, reference_logprobs)
