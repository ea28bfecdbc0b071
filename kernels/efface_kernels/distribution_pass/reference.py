"""The distribution pass in plain PyTorch: the readable reference implementation, which runs on any device."""

import torch
from torch import Tensor

from efface_kernels.logits import Logits, accumulation_dtype, row_blocks


def distribution_pass_torch(
    logits: Logits, reference: Logits, targets: Tensor, shift: float, into: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return KL(q‖p) and the entropy of q, (n,) each; write p − q into ``into`` (n, V) unless it is None.

    ``into`` can be ``logits.values`` or a separate matrix. It can also share the memory of the reference's logits, if
    its dtype is not wider and each row begins where the reference's row begins.
    """
    values = logits.values
    dtype = accumulation_dtype(values.dtype)
    divergence, entropy = (torch.empty(values.shape[0], dtype=dtype, device=values.device) for _ in range(2))
    for rows in row_blocks(values):
        z, slope = logits.capped(rows)
        zr, _ = reference.capped(rows, dtype)
        zr = zr.to(dtype, copy=True)
        zr.scatter_add_(1, targets[rows, None], torch.full_like(zr[:, :1], -shift))
        log_p, log_q = torch.log_softmax(z, dim=1), torch.log_softmax(zr, dim=1)
        q = torch.exp(log_q)
        # q log q → 0 as q → 0: a class with q = 0 adds nothing, whatever p is
        absent = q == 0
        divergence[rows] = (q * (log_q - log_p)).masked_fill(absent, 0).sum(dim=1)
        entropy[rows] = -(q * log_q).masked_fill(absent, 0).sum(dim=1)
        if into is not None:  # these rows have been read and can be overwritten
            difference = torch.exp(log_p) - q
            into[rows] = difference if slope is None else difference * slope
    return divergence, entropy
