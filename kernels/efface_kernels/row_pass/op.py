"""The row pass: log-probability of the target and, in place, the derivative with respect to the logits."""

from typing import NamedTuple

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
from efface_kernels.logits import Logits
from efface_kernels.native import row_pass_native
from efface_kernels.row_pass.launch import row_pass_triton
from efface_kernels.row_pass.reference import row_pass_torch


class RowPassOutput(NamedTuple):
    """What a row pass returns. ``reference_logprobs`` is None where no reference logits were given."""

    logprobs: Tensor  # (n,)
    reference_logprobs: Tensor | None  # (m,)


PASSES = {"torch": row_pass_torch, "native": row_pass_native, "triton": row_pass_triton}


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
    run = PASSES[resolve_backend(backend, logits.device)]
    logprobs, *others = run(Logits(logits, softcap), targets, reference, gradient)
    return RowPassOutput(logprobs, others[0] if others else None)
