"""Inputs whose softmax looks like an unlearning run's, made deterministically."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossInputs:
    """One batch at the head: policy and reference hidden states and heads, targets, sequences of 32 label rows."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    reference_hidden: Tensor  # (N, D)
    reference_weight: Tensor  # (V, D)
    targets: Tensor  # (N,)
    row_offsets: tuple[int, ...]
    reference_sums: Tensor  # (S,)


def memorised(n: int, d: int, v: int, dtype: torch.dtype, *, share: float = 0.7, seed: int = 0) -> LossInputs:
    """Targets of ``share`` of the rows have p ≈ 0.99 (forget data is memorised); the other rows are flat.

    Rows of the head have length 1 and logits of the noise unit variance, so a flat row's logsumexp is log V + 1/2. A
    memorised row's hidden state has log V + 5.5 times its target's row of the head added.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    weight = torch.nn.functional.normalize(normal(v, d), dim=1)
    targets = torch.randint(v, (n,), generator=g)
    known = (torch.rand(n, 1, generator=g) < share).float()
    boost = known * (torch.log(torch.tensor(float(v))) + 5.5) * weight[targets]
    reference_weight = torch.nn.functional.normalize(weight + 0.1 * normal(v, d) / d**0.5, dim=1).to(dtype)
    offsets = tuple(range(0, n + 1, 32))
    return LossInputs(
        (normal(n, d) + boost).to(dtype).requires_grad_(),
        weight.to(dtype).requires_grad_(),
        (normal(n, d) + boost).to(dtype),
        reference_weight,
        targets,
        offsets,
        torch.full((len(offsets) - 1,), -32 * 3.0),
    )
