"""The row pass in plain PyTorch: the readable reference implementation, which runs on any device."""

import torch
from torch import Tensor

from efface_kernels.logits import Logits, accumulation_dtype, row_blocks


def row_pass_torch(logits: Logits, targets: Tensor, reference: Logits | None, gradient: bool) -> tuple[Tensor, ...]:
    """Return ℓ (n,) and, with a reference, ℓ_ref (m,); with ``gradient``, overwrite the logits by softmax − onehot."""
    logprobs = _one_model(logits, targets, gradient)
    if reference is None:
        return (logprobs,)
    return logprobs, _one_model(reference, targets[: reference.values.shape[0]], gradient=False)


def _one_model(logits: Logits, targets: Tensor, gradient: bool) -> Tensor:
    values = logits.values
    dtype = accumulation_dtype(values.dtype)
    logprobs = torch.empty(values.shape[0], dtype=dtype, device=values.device)
    for rows in row_blocks(values):
        z, slope = logits.capped(rows)  # (b, V)
        target = targets[rows, None]  # (b, 1)
        # Subtract the maximum first, not the logsumexp: a memorised target is the maximum, and its ℓ ≈ 0 would be lost
        # in the rounding error of z_y − logsumexp.
        z = z - z.amax(dim=1, keepdim=True)
        p = torch.exp(z)
        total = p.sum(dim=1, keepdim=True)
        logprob = z.gather(1, target) - torch.log(total)  # (b, 1)
        logprobs[rows] = logprob[:, 0]
        if gradient:
            p /= total
            # Compute p_y − 1 before rounding to the dtype of the logits: memorised targets have p_y near 1, and at
            # p = 0.99 the difference computed in bf16 has an error of 20 %.
            p.scatter_(1, target, torch.expm1(logprob))
            values[rows] = p if slope is None else p * slope
    return logprobs
