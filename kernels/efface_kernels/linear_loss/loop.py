"""The loop: a look at a chunk's logits, coefficients, gradients; then the next chunk in the same memory.

The derivation is in this folder's README. Nothing here knows a loss: a ``Look`` makes P of some rows and keeps what it
read on the way, and a ``CoefficientRule`` turns what was read of whole sequences into the row factors c.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from efface_kernels.checks import HALVES
from efface_kernels.linear_loss.chunks import Chunk
from efface_kernels.linear_loss.head import Head
from efface_kernels.logits import accumulation_dtype, power_of_two
from efface_kernels.memory import accumulate_product
from efface_kernels.passes import scale_pass

# chunk, all of whose rows the look has seen -> c (n,), with ∂loss/∂z = −c ⊙ P
CoefficientRule = Callable[[Chunk], Tensor]


class Look(Protocol):
    """What a chunk's logits are read for."""

    def __call__(self, rows: slice, *, gradient: bool, again: bool = False) -> Tensor:
        """Return P (n, V) of these rows, valid until the next call; without ``gradient`` anything.

        ``again``: the rows were seen before, and P is all that is wanted of them.
        """

    def close(self) -> None:
        """Give the workspaces back."""


@dataclass(frozen=True)
class Wanted:
    """Which gradients the caller wants."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False

    @classmethod
    def of(cls, hidden: Tensor, head: Head) -> "Wanted":
        """Return those that autograd is to give."""
        grad = torch.is_grad_enabled()
        given = (hidden, head.weight, head.bias)  # not looked at yet: a bias may be anything
        return cls(*(grad and isinstance(each, Tensor) and each.requires_grad for each in given))

    @property
    def flags(self) -> list[bool]:
        """The three, as an op's schema holds them."""
        return [self.hidden, self.weight, self.bias]

    @property
    def any(self) -> bool:
        """Whether any gradient is wanted."""
        return self.hidden or self.weight or self.bias

    @property
    def head(self) -> bool:
        """Whether the coefficients must be known while a chunk's logits are alive."""
        return self.weight or self.bias


@dataclass
class Gradients:
    """Sums over the chunks. The row factor f = −c is kept apart from P W: it is applied once, in the backward call.

    With ∂loss/∂z = f ⊙ P:  dh = f ⊙ (P W),  dW = Pᵀ (f ⊙ h),  db = Pᵀ f.
    """

    wanted: Wanted
    hidden: Tensor
    head: Head
    chunks: int
    backend: str
    spent: bool = field(init=False, default=False)  # handed over
    pw: Tensor | None = field(init=False, default=None)  # (N, D) P W
    weight: Tensor | None = field(init=False, default=None)  # (V, D)
    bias: Tensor | None = field(init=False, default=None)  # (V,)

    _product: Tensor | None = field(init=False, default=None)  # one chunk's share, where it is summed in another dtype

    def __post_init__(self) -> None:
        if self.wanted.hidden:
            self.pw = torch.empty_like(self.hidden, memory_format=torch.contiguous_format)

    def add_hidden(self, rows: slice, p: Tensor) -> None:
        """Keep P W of these rows."""
        if self.pw is not None:
            torch.mm(p, self.head.weight, out=self.pw[rows])

    def add_head(self, rows: slice, p: Tensor, factors: Tensor) -> None:
        """Add these rows, whose f are given, to dW and db."""
        # NPO's coefficients of a well forgotten sequence fall under the smallest fp16: scale each chunk by a power
        # of two, exact, and take the scale back in the fp32 sum.
        scale = power_of_two(factors) if p.dtype == torch.float16 else None
        if scale is not None:
            factors = factors / scale
        if self.wanted.weight:
            right = self._times(self.hidden[rows], factors)
            self.weight, self._product = self._add(self.weight, p.t(), right, scale, self._product)
        if self.wanted.bias:
            total = None if self.bias is None else self.bias[:, None]
            self.bias = self._add(total, p.t(), factors[:, None].to(p.dtype), scale, None)[0][:, 0]

    def _times(self, rows: Tensor, factors: Tensor, *, in_place: bool = False) -> Tensor:
        """Return factors ⊙ rows, (n, D), in the rows' dtype; on a device in one launch, and ``in_place`` if so."""
        if self.hidden.device.type == "cpu" and self.backend != "triton":
            # (1024, 1024) bf16: 2.0 ms, and 2.5 ms by the line below (medians of 21, 2 cores of an Intel Xeon with AMX,
            # torch 2.13, 2026-11-27)
            return (rows * factors[:, None]).to(rows.dtype)
        return torch.mul(rows, factors[:, None], out=rows if in_place else torch.empty_like(rows))

    def _add(
        self, total: Tensor | None, left: Tensor, right: Tensor, scale: Tensor | None, product: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return total + scale · left @ right, and the buffer in which products of half-precision chunks are made."""
        if left.dtype not in HALVES or (self.chunks == 1 and scale is None):
            if total is not None:
                return total.addmm_(left, right), None
            return torch.mm(left, right), None
        # Sums over several half-precision chunks run in fp32.
        return accumulate_product(total, left, right, scale, product)

    def finish(
        self, factors: Tensor, upstream: Tensor | None = None, *, keep: bool = True
    ) -> tuple[Tensor | None, ...]:
        """Return (dh, dW, db) in the dtypes of their inputs, scaled by the upstream scalar, without a device sync.

        Unless they are to be kept for another backward call, they are scaled in place where that can be, and handed
        over.
        """
        if self.spent:
            raise RuntimeError(
                "trying to run backward through this loss a second time: its gradients were handed over by the first; "
                "give retain_graph=True to the first call"
            )
        dh, pw = None, self.pw
        if pw is not None:
            scaled = factors if upstream is None else factors * upstream
            dh = self._times(pw, scaled, in_place=not keep)
        gradients = (
            dh,
            self._scaled(self.wanted.weight, self.weight, upstream, self.head.weight, keep=keep),
            self._scaled(self.wanted.bias, self.bias, upstream, self.head.bias, keep=keep),
        )
        if not keep:
            self.spent = True
            self.pw = self.weight = self.bias = self._product = None
        return gradients

    def let_go(self) -> None:
        """Forget what only the loop reads: a copy of the head in another dtype, the hidden states.

        The gradients wait for the backward call, through which the loss is alive.
        """
        self.hidden = _outline(self.hidden)
        bias = None if self.head.bias is None else _outline(self.head.bias)
        self.head = Head(_outline(self.head.weight), bias, self.head.softcap)

    def _scaled(
        self, wanted: bool, total: Tensor | None, upstream: Tensor | None, like: Tensor | None, *, keep: bool
    ) -> Tensor | None:
        if not wanted or like is None:
            return None
        if total is None:  # no rows at all
            return torch.zeros_like(like)
        if upstream is None:
            return total.to(like.dtype, copy=keep)
        return scale_pass(total, upstream, dtype=like.dtype, keep=keep, backend=self.backend)


def graph_is_kept() -> bool:
    """Return whether the backward call that is running keeps its graph for another one (``retain_graph=True``).

    torch's own compiler asks the same; where it does not answer, the graph is taken to be kept.
    """
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)  # noqa: SLF001
    return True if ask is None else bool(ask())


@torch.no_grad()
def run_loop(
    hidden: Tensor,
    head: Head,
    look: Look,
    chunks: list[Chunk],
    *,
    wanted: Wanted,
    backend: str,
    rule: CoefficientRule | None = None,
) -> tuple[Tensor, Gradients]:
    """Run the loop over ``chunks`` of ``hidden`` (N, D); return −c (N,), or anything without a rule, and the sums.

    One look at the logits is enough where the chunk is one piece, or where only dh is wanted, because P W needs no
    coefficient. A sequence of several pieces with a trainable head gets a second look once c is known.
    """
    factors = torch.empty(hidden.shape[0], dtype=accumulation_dtype(hidden.dtype), device=hidden.device)
    gradients = Gradients(wanted, hidden, head, sum(len(chunk.pieces) for chunk in chunks), backend)
    for chunk in chunks:
        one_look = len(chunk.pieces) == 1 or not wanted.head
        p = hidden[:0]
        for start, stop in chunk.pieces:
            rows = slice(start, stop)
            p = look(rows, gradient=wanted.any and one_look)
            if one_look:
                gradients.add_hidden(rows, p)
        if rule is None:
            continue
        torch.neg(rule(chunk), out=factors[chunk.rows])
        if not wanted.head:
            continue
        if one_look:
            gradients.add_head(chunk.rows, p, factors[chunk.rows])
            continue
        for start, stop in chunk.pieces:
            rows = slice(start, stop)
            p = look(rows, gradient=True, again=True)
            gradients.add_hidden(rows, p)
            gradients.add_head(rows, p, factors[rows])
    look.close()
    gradients.let_go()
    return factors, gradients


def _outline(values: Tensor) -> Tensor:
    """Return a tensor of the same shape, dtype and device that holds a single value."""
    return values.new_empty(()).expand(values.shape)
