"""Losses of label rows that need more than log-probabilities: the losses of UNDIAL, PDU and the KL retain term.

The other objectives do not need this module: their loss is ``Objective.term``, a function of log-probabilities.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from efface_kernels import (
    Head,
    ReferenceRows,
    accumulation_dtype,
    linear_distribution_loss,
    run_within_memory,
    segment_sums,
)


@dataclass(frozen=True)
class HeadRows:
    """The inputs of the head for the n label rows of s whole sequences.

    Attributes:
        hidden: (n, D) hidden states of the policy.
        head: head of the policy.
        targets: (n,) int64 label of each row.
        row_offsets: (s + 1,) int64 on the device, start of each sequence's rows; the last entry is n.
        reference: the frozen model's hidden states of the same rows and its head, or None if no loss reads them.
        chunk_rows: number of rows whose logits exist at the same time; None chooses it automatically.
        backend: "auto", "native", "triton" or "torch".
    """

    hidden: Tensor
    head: Head
    targets: Tensor
    row_offsets: Tensor
    reference: ReferenceRows | None = None
    chunk_rows: int | None = None
    backend: str = "auto"

    def spread(self, values: Tensor) -> Tensor:
        """Repeat one value per sequence (s,) for each of the sequence's rows, and return (n,)."""
        return torch.repeat_interleave(values, self.row_offsets.diff(), output_size=self.targets.shape[0])


class RoleLossOutput(NamedTuple):
    """A loss, with gradient, and the contribution of each sequence to it, without gradient."""

    loss: Tensor  # ()
    terms: Tensor  # (s,)


class RoleLoss(ABC):
    """The loss of all label rows of one role: a weighted sum over sequences of the sum over each sequence's rows."""

    @abstractmethod
    def __call__(self, rows: HeadRows, weights: Tensor) -> RoleLossOutput:
        """Return the sum over sequences of ``weights`` (s,) times the sum of the row losses of each sequence."""


@dataclass(frozen=True)
class DistributionLoss(RoleLoss):
    """The KL divergence KL(q‖p) or the cross entropy −Σ q log p, where q is a distribution of the frozen model.

    q = softmax(z_ref − shift · onehot(target)), and p is the policy's distribution.

    Attributes:
        shift: amount by which the target's reference logit is lowered.
        cross_entropy: whether the loss is the cross entropy instead of the KL divergence.
    """

    shift: float = 0.0
    cross_entropy: bool = False

    def __call__(self, rows: HeadRows, weights: Tensor) -> RoleLossOutput:
        """Return the weighted loss; it is computed by ``efface_kernels.linear_distribution_loss``.

        Raises:
            ValueError: if ``rows`` has no reference.
        """
        if rows.reference is None:
            raise ValueError(
                "`rows.reference`: expected the reference model's hidden states and head for a loss between "
                "distributions, got None; use a 'live' or 'adapter' reference"
            )
        out = linear_distribution_loss(
            rows.hidden,
            rows.head.weight,
            rows.targets,
            rows.spread(weights),
            rows.reference,
            shift=self.shift,
            cross_entropy=self.cross_entropy,
            bias=rows.head.bias,
            softcap=rows.head.softcap,
            chunk_rows=rows.chunk_rows,
            backend=rows.backend,
        )
        values = out.divergence + out.entropy if self.cross_entropy else out.divergence
        return RoleLossOutput(out.loss, weights * segment_sums(values, rows.row_offsets))


@dataclass(frozen=True)
class MarginLoss(RoleLoss):
    """The loss (max z − mean z)² of each row's logits z."""

    def __call__(self, rows: HeadRows, weights: Tensor) -> RoleLossOutput:
        """Return the weighted loss.

        Without soft-capping, one GEMM without gradients finds the largest logits, and only products of vectors are
        differentiated.
        """
        values = logit_margins(rows.hidden, rows.head, rows.chunk_rows).square()
        terms = weights * segment_sums(values, rows.row_offsets)
        return RoleLossOutput(terms.sum(), terms.detach())


def logit_margins(hidden: Tensor, head: Head, chunk_rows: int | None = None) -> Tensor:
    """Return max z − mean z of each row's logits z = softcap(hidden @ weight.T + bias), (n,), in float32 (or float64).

    The mean of a linear head's logits is the logit of the head's mean row, and the largest logit belongs to a single
    row of the head. So the backward pass needs no gradient for the other rows' logits. Soft-capped logits do not have
    this property; they are recomputed in the backward pass.
    """
    hidden, head = head.cast_for(hidden)
    return run_within_memory(lambda rows: _margins(hidden, head, rows), chunk_rows, hidden, head)


def _margins(hidden: Tensor, head: Head, chunk_rows: int) -> Tensor:
    pieces = hidden.split(chunk_rows) if hidden.shape[0] else (hidden,)
    with torch.autocast(hidden.device.type, enabled=False):
        if head.softcap is not None:
            return torch.cat([checkpoint(_capped_margins, piece, head, use_reentrant=False) for piece in pieces])
        with torch.no_grad():
            largest = torch.cat([torch.nn.functional.linear(piece, *_linear(head)).argmax(-1) for piece in pieces])
        mean = head.weight.mean(0, dtype=accumulation_dtype(hidden.dtype))
        margins = (hidden.to(mean.dtype) * (head.weight[largest].to(mean.dtype) - mean)).sum(-1)
        if head.bias is not None:
            bias = head.bias.to(mean.dtype)
            margins = margins + bias[largest] - bias.mean()
        return margins


def _capped_margins(hidden: Tensor, head: Head) -> Tensor:
    if head.softcap is None:
        raise ValueError("`head`: expected a head with a soft-cap, got softcap=None")
    logits = torch.nn.functional.linear(hidden, *_linear(head)).to(accumulation_dtype(hidden.dtype))
    logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits.amax(-1) - logits.mean(-1)


def _linear(head: Head) -> tuple[Tensor, Tensor | None]:
    return head.weight, head.bias
