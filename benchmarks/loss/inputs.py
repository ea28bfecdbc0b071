"""Inputs whose softmax looks like an unlearning run's, made deterministically."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.loss.objectives import FORGET, roles, rule
from efface_kernels import RowOffsets, SequenceRule

LENGTH = 32  # label rows of a sequence
SHARE = 0.7  # of rows are memorised


@dataclass(frozen=True)
class Shape:
    """A named row of the suite; N is a multiple of 64."""

    n: int
    d: int
    v: int
    dtype: torch.dtype
    objective: str = "NPO"
    modes: tuple[str, ...] = ("live",)
    bias: bool = False
    softcap: float | None = None
    unlearned: bool = False  # the state after unlearning, see ``make_inputs``
    device: str = "cpu"


@dataclass(frozen=True)
class LossInputs:
    """One batch at the head: policy and reference hidden states and heads, targets, sequences of 32 label rows."""

    objective: str
    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,), the reference's too
    softcap: float | None
    reference_hidden: Tensor  # (N, D)
    reference_weight: Tensor  # (V, D)
    targets: Tensor  # (N,)
    row_offsets: RowOffsets
    rule: SequenceRule | None  # None for KL
    reference_sums: Tensor  # (S,)

    def of(self, mode: str) -> "LossInputs":
        """Return the same for a mode: a frozen head gets no gradient."""
        if not mode.startswith("frozen"):
            return self
        return replace(self, weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach())

    @property
    def wanted(self) -> list[Tensor]:
        """What gets a gradient."""
        given = (self.hidden, self.weight, self.bias)
        return [each for each in given if each is not None and each.requires_grad]


def make_inputs(shape: Shape, *, rows: int | None = None, seed: int = 0) -> LossInputs:
    """Return the batch of a shape, or one of fewer rows.

    Rows of the head have length 1 and logits of the noise unit variance, so a flat row's logsumexp is log V + 1/2.
    Before unlearning, 70 % of the rows are memorised, p(target) about 0.99: their hidden states have log V + 5.5 times
    the target's row of the head added; the other rows are flat. After unlearning, so it is for what is retained and for
    the reference, but the forget sequences' rows have had their mass moved: log V + 5.5 times the row of another token
    is added, and p(target) is about 1e-7 there, 1e-5 in flat rows. A soft-capped head's boost is as much larger as the
    cap takes away.
    """
    n, d, v, device = rows or shape.n, shape.d, shape.v, shape.device
    g = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, device=device)

    weight = torch.nn.functional.normalize(normal(v, d), dim=1)
    targets = torch.randint(v, (n,), generator=g, device=device)
    others = torch.randint(v, (n,), generator=g, device=device)
    host = torch.arange(0, n + 1, LENGTH)
    own_roles = roles(shape.objective, len(host) - 1).to(device)
    known = (torch.rand(n, 1, generator=g, device=device) < SHARE).float()
    height = torch.log(torch.tensor(float(v))) + 5.5
    if shape.softcap is not None:
        height = shape.softcap * torch.atanh(height / shape.softcap)
    forgotten = (own_roles == FORGET).repeat_interleave(LENGTH) & shape.unlearned
    boost = known * height.to(device)
    reference_weight = torch.nn.functional.normalize(weight + 0.1 * normal(v, d) / d**0.5, dim=1).to(shape.dtype)
    bias = (0.1 * normal(v)).to(shape.dtype).requires_grad_() if shape.bias else None
    reference_sums = torch.full((len(host) - 1,), -LENGTH * 3.0, device=device)
    hidden = normal(n, d) + boost * weight[torch.where(forgotten, others, targets)]
    return LossInputs(
        shape.objective,
        hidden.to(shape.dtype).requires_grad_(),
        weight.to(shape.dtype, copy=True).requires_grad_(),  # a copy: `weight` itself wants no gradient
        bias,
        shape.softcap,
        (normal(n, d) + boost * weight[targets]).to(shape.dtype),
        reference_weight,
        targets,
        RowOffsets(host, host.to(device)),
        rule(shape.objective, n, own_roles),
        reference_sums,
    )
