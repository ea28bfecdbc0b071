"""The sequence loss: segment sums, loss terms and coefficients of a batch that mixes kinds of terms."""

import torch
from torch import Tensor

from efface_kernels.backends import resolve_backend
from efface_kernels.checks import check_dtype, check_same_device, check_shape
from efface_kernels.sequence_loss.launch import sequence_loss_triton
from efface_kernels.sequence_loss.rule import SequenceRule, SequenceTerms, sequence_loss_torch
from efface_kernels.sequences import Sequences


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
