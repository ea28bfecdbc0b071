"""The row pass in plain PyTorch: the readable truth, and the implementation for any device."""

import torch
from torch import Tensor

# Elements of a block of rows in the accumulation dtype. The pass reads the chunk block by block, so that its
# temporaries stay in the cache and no second chunk is ever alive: 2^19 fp32 values are 2 MiB.
_BLOCK_ELEMENTS = 1 << 19


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_pass_reference(logits: Tensor, targets: Tensor, *, softcap: float | None, gradient: bool) -> Tensor:
    """Return ℓ (n,), and with ``gradient`` overwrite ``logits`` (n, V) by −∂ℓ/∂logits, that is softmax − onehot."""
    n, vocabulary = logits.shape
    dtype = accumulation_dtype(logits.dtype)
    logprobs = torch.empty(n, dtype=dtype, device=logits.device)
    block = max(1, _BLOCK_ELEMENTS // max(1, vocabulary))
    for start in range(0, n, block):
        rows = slice(start, start + block)
        z = logits[rows].to(dtype, copy=True)  # (b, V)
        target = targets[rows, None]  # (b, 1)
        slope = None
        if softcap is not None:
            tanh = torch.tanh(z / softcap)
            z = softcap * tanh
            slope = 1 - tanh * tanh
        # Relative to the maximum, never to the logsumexp itself: a memorised target is the maximum, and its ℓ ≈ 0 would
        # drown in the rounding of z_y − lse.
        z -= z.amax(dim=1, keepdim=True)
        p = torch.exp(z)
        total = p.sum(dim=1, keepdim=True)
        logprob = z.gather(1, target) - torch.log(total)  # (b, 1)
        logprobs[rows] = logprob[:, 0]
        if gradient:
            p /= total
            # p_y − 1 before any rounding to the dtype of the logits: memorised targets have p_y near 1, and at
            # p = 0.99 the difference taken in bf16 is 20 % wrong.
            p.scatter_(1, target, torch.expm1(logprob))
            logits[rows] = p if slope is None else p * slope
    return logprobs
