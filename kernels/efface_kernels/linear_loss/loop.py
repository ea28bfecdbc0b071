"""The loop over chunks: for each chunk, read the logits, compute the coefficients, and accumulate the gradients.

All chunks use the same memory for their logits. The derivation is in the README of this folder. The loop does not
depend on a particular loss: a ``Look`` computes P of some rows and stores what it reads from their logits, and a
``CoefficientRule`` computes the row coefficients c from it, for whole sequences.
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

# chunk whose rows have all been read -> c (n,), with ∂loss/∂z = −c ⊙ P
CoefficientRule = Callable[[Chunk], Tensor]


class Look(Protocol):
    """One read pass over the logits of a chunk."""

    def __call__(self, rows: slice, *, gradient: bool, again: bool = False) -> Tensor:
        """Return P (n, V) of these rows, valid until the next call; without ``gradient`` the result is undefined.

        ``again``: the rows were read before, and only P is needed.
        """

    def close(self) -> None:
        """Return the workspaces to the pool."""


@dataclass(frozen=True)
class Wanted:
    """The gradients to compute."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False

    @classmethod
    def of(cls, hidden: Tensor, head: Head) -> "Wanted":
        """Return the gradients that autograd will ask for."""
        grad = torch.is_grad_enabled()
        given = (hidden, head.weight, head.bias)  # not checked yet: a bias can be of any type
        return cls(*(grad and isinstance(each, Tensor) and each.requires_grad for each in given))

    @property
    def flags(self) -> list[bool]:
        """The three flags as a list, as the schema of an op requires."""
        return [self.hidden, self.weight, self.bias]

    @property
    def any(self) -> bool:
        """Whether any gradient is wanted."""
        return self.hidden or self.weight or self.bias

    @property
    def head(self) -> bool:
        """Whether dW or db is wanted, so that the coefficients are needed while a chunk's logits are in memory."""
        return self.weight or self.bias


@dataclass
class Gradients:
    """Gradients accumulated over the chunks, before the upstream gradient is applied.

    With ∂loss/∂z = f ⊙ P and row factors f = −c:  dh = f ⊙ (P W),  dW = Pᵀ (f ⊙ h),  db = Pᵀ f. P W is stored without
    f, which is applied once, in the backward call.
    """

    wanted: Wanted
    hidden: Tensor
    head: Head
    chunks: int
    backend: str
    spent: bool = field(init=False, default=False)  # the gradients were returned and are no longer available
    pw: Tensor | None = field(init=False, default=None)  # (N, D) P W
    weight: Tensor | None = field(init=False, default=None)  # (V, D)
    bias: Tensor | None = field(init=False, default=None)  # (V,)

    # buffer for the product of one chunk, if the sum has another dtype
    _product: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.wanted.hidden:
            self.pw = torch.empty_like(self.hidden, memory_format=torch.contiguous_format)

    def add_hidden(self, rows: slice, p: Tensor) -> None:
        """Store P W of these rows."""
        if self.pw is not None:
            torch.mm(p, self.head.weight, out=self.pw[rows])

    def add_head(self, rows: slice, p: Tensor, factors: Tensor) -> None:
        """Add the contribution of these rows, with row factors f = ``factors``, to dW and db."""
        # NPO's coefficients of a well forgotten sequence underflow in fp16. Divide each chunk's factors by a power of
        # two, which is exact, and multiply by it in the fp32 sum.
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
        """Return factors ⊙ rows, (n, D), in the rows' dtype: in one launch on a GPU, where ``in_place`` is honoured."""
        if self.hidden.device.type == "cpu" and self.backend != "triton":
            # (1024, 1024) bf16: 2.0 ms, against 2.5 ms for the line below (medians of 21, 2 cores of an Intel Xeon with
            # AMX, torch 2.13, 2026-11-27)
            return (rows * factors[:, None]).to(rows.dtype)
        return torch.mul(rows, factors[:, None], out=rows if in_place else torch.empty_like(rows))

    def _add(
        self, total: Tensor | None, left: Tensor, right: Tensor, scale: Tensor | None, product: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return total + scale · left @ right, and the buffer for products of half-precision chunks."""
        if left.dtype not in HALVES or (self.chunks == 1 and scale is None):
            if total is not None:
                return total.addmm_(left, right), None
            return torch.mm(left, right), None
        # Sums over several half-precision chunks, and scaled fp16 sums, are accumulated in fp32.
        return accumulate_product(total, left, right, scale, product)

    def finish(
        self, factors: Tensor, upstream: Tensor | None = None, *, keep: bool = True
    ) -> tuple[Tensor | None, ...]:
        """Return (dh, dW, db) in the dtypes of their inputs, scaled by the upstream scalar.

        The device is not synchronised. With ``keep`` the stored gradients stay available for another backward call.
        Without it they are scaled in place where the dtype allows, and released.
        """
        if self.spent:
            raise RuntimeError(
                "backward: expected one call for this loss, got a second one, after its gradients were released; pass "
                "retain_graph=True to the first call"
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
        """Release tensors that only the loop reads: the hidden states, and a copy of the head in another dtype.

        The gradients stay in memory until the backward call, which can be much later.
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
    """Return whether the running backward call keeps its graph (``retain_graph=True``).

    This uses a private function that torch's own compiler uses too. If torch does not have it, the result is True,
    which is always safe.
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
    """Run the loop over ``chunks`` of ``hidden`` (N, D); return f = −c (N,) and the accumulated gradients.

    Without a rule the factors are undefined. The logits are read once if the chunk is one piece, or if only dh is
    wanted, because P W needs no coefficient. A chunk of several pieces is read a second time, once c is known, if dW or
    db is wanted.
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
    """Return a tensor of the same shape, dtype and device that stores only one element."""
    return values.new_empty(()).expand(values.shape)
