"""Inputs whose softmax looks like an unlearning run's, made deterministically."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from efface_kernels import Kind, RowOffsets, SequenceRule, Term

BETA = 0.1


@dataclass(frozen=True)
class LossInputs:
    """One batch at the head: policy and reference hidden states and heads, targets, sequences of 32 label rows."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    reference_hidden: Tensor  # (N, D)
    reference_weight: Tensor  # (V, D)
    targets: Tensor  # (N,)
    row_offsets: RowOffsets
    rule: SequenceRule  # the mean of NPO's terms
    reference_sums: Tensor  # (S,)

    def frozen(self) -> "LossInputs":
        """Return the same with a head that gets no gradient."""
        return replace(self, weight=self.weight.detach())


def memorised(
    n: int, d: int, v: int, dtype: torch.dtype, *, share: float = 0.7, seed: int = 0, device: str = "cpu"
) -> LossInputs:
    """Targets of ``share`` of the rows have p ≈ 0.99 (forget data is memorised); the other rows are flat.

    Rows of the head have length 1 and logits of the noise unit variance, so a flat row's logsumexp is log V + 1/2. A
    memorised row's hidden state has log V + 5.5 times its target's row of the head added.
    """
    g = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device)

    weight = torch.nn.functional.normalize(normal(v, d), dim=1)
    targets = torch.randint(v, (n,), generator=g, device=device)
    known = (torch.rand(n, 1, generator=g, device=device) < share).float()
    boost = known * (torch.log(torch.tensor(float(v))) + 5.5) * weight[targets]
    reference_weight = torch.nn.functional.normalize(weight + 0.1 * normal(v, d) / d**0.5, dim=1).to(dtype)
    host = torch.arange(0, n + 1, 32)
    sequences = len(host) - 1
    roles = torch.zeros(sequences, dtype=torch.int8, device=device)
    return LossInputs(
        (normal(n, d) + boost).to(dtype).requires_grad_(),
        weight.to(dtype).requires_grad_(),
        (normal(n, d) + boost).to(dtype),
        reference_weight,
        targets,
        RowOffsets(host, host.to(device)),
        SequenceRule.of(roles, {0: Term(Kind.NPO, 1 / sequences, beta=BETA)}),
        torch.full((sequences,), -32 * 3.0, device=device),
    )
