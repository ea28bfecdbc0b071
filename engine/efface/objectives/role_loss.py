"""Losses of label rows that are no function of their log-probabilities alone: what UNDIAL, KL and PDU hand to the head.

Most objectives need none of these: their ``Objective.term`` of the log-probabilities is their loss.
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
    """The label rows of some whole sequences, at the head.

    Attributes:
        hidden: (n, D).
        head: the policy's.
        targets: (n,) int64.
        row_offsets: (s + 1,) int64 on the device, from 0 to n.
        reference: the frozen model's hidden states of the same rows, and its head; None where nothing reads it.
        chunk_rows: rows of logits alive at a time; None chooses.
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
        """Return the value (n,) of each row's sequence, from those of the sequences (s,)."""
        return torch.repeat_interleave(values, self.row_offsets.diff(), output_size=self.targets.shape[0])


class RoleLossOutput(NamedTuple):
    """A loss, which carries the gradient, and its share of each sequence, which does not."""

    loss: Tensor  # ()
    terms: Tensor  # (s,)


class RoleLoss(ABC):
    """The loss of the label rows of a role: a weighted sum over sequences of sums over their rows."""

    @abstractmethod
    def __call__(self, rows: HeadRows, weights: Tensor) -> RoleLossOutput:
        """Return Σ weights · Σ over rows; ``weights`` are (s,)."""


@dataclass(frozen=True)
class DistributionLoss(RoleLoss):
    """KL(q‖p), or the cross entropy −Σ q log p, to q = softmax(z_ref − shift · onehot(target)) of the frozen model."""

    shift: float = 0.0
    cross_entropy: bool = False

    def __call__(self, rows: HeadRows, weights: Tensor) -> RoleLossOutput:
        """See ``efface_kernels.linear_distribution_loss``."""
        if rows.reference is None:
            raise ValueError("a loss between distributions needs the reference model's logits, got none; run it live")
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
    """(max z − mean z)² of each row's logits z."""

    def __call__(self, rows: HeadRows, weights: Tensor) -> RoleLossOutput:
        """Run one GEMM, without gradients, that finds the largest logits; what remains are products of vectors."""
        values = logit_margins(rows.hidden, rows.head, rows.chunk_rows).square()
        terms = weights * segment_sums(values, rows.row_offsets)
        return RoleLossOutput(terms.sum(), terms.detach())


def logit_margins(hidden: Tensor, head: Head, chunk_rows: int | None = None) -> Tensor:
    """Return max z − mean z of each row's logits z = softcap(hidden @ weight.T + bias), (n,), in float32 (or float64).

    The mean of a linear head's logits is the logit of its mean row, and the largest one is a row of the head: neither
    needs the others' gradient. Soft-capped logits have no such form; they are made again in the backward pass.
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
        raise ValueError("`head`: expected one with a soft-cap, got none")
    logits = torch.nn.functional.linear(hidden, *_linear(head)).to(accumulation_dtype(hidden.dtype))
    logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits.amax(-1) - logits.mean(-1)


def _linear(head: Head) -> tuple[Tensor, Tensor | None]:
    return head.weight, head.bias
