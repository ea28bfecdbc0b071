"""The logits of some rows of a batch: the policy's, and a live reference's, in memory that all rows reuse."""

from dataclasses import dataclass

import torch
from torch import Tensor

from efface_kernels.linear_loss.head import Head, ReferenceRows
from efface_kernels.linear_loss.workspace import budget
from efface_kernels.logits import accumulation_dtype
from efface_kernels.memory import Loan
from efface_kernels.row_pass import row_pass


def shares_workspace(device: str, both_bytes: int, budget_bytes: int) -> bool:
    """Whether both models' logits, which take ``both_bytes``, are made in one workspace, one after the other.

    On a GPU, beyond the budget of logits that may be alive: one launch more, and half the memory. Within it, one launch
    reads both. On the CPU both stay alive, where the passes read them in turn anyway and a large workspace is kept.
    """
    return device != "cpu" and both_bytes > budget_bytes


def same_layer(one: Head, other: Head) -> bool:
    """Whether two heads are one layer: LoRA elsewhere, a frozen or a tied head."""
    pairs = ((one.weight, other.weight), (one.bias, other.bias))
    return all(
        a is b
        or (
            a is not None
            and b is not None
            and (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)
        )
        for a, b in pairs
    )


@dataclass(frozen=True)
class Layout:
    """The workspaces in which the logits of a chunk are made.

    Attributes:
        rows: of the policy's.
        frozen_rows: of the reference's own; 0 where it has none, because it comes first or shares the policy's GEMM.
        together: whether one GEMM makes both models' logits, of their own rows each, in the policy's.
    """

    rows: int
    frozen_rows: int = 0
    together: bool = False

    @classmethod
    def of(cls, rows: int, hidden: Tensor, head: Head, reference: ReferenceRows | None) -> "Layout":
        """Return it for chunks of at most ``rows`` of ``hidden``."""
        if reference is None:
            return cls(rows)
        frozen = min(rows, reference.hidden.shape[0])
        like, columns, dtype = reference.hidden.dtype, reference.head.vocabulary, hidden.dtype
        both = cls(rows, frozen).nbytes(hidden, head, reference)
        device = hidden.device
        if (columns, like) == (head.vocabulary, dtype) and shares_workspace(device.type, both, budget(device)):
            return cls(rows)
        if like == dtype and same_layer(head, reference.head):
            return cls(rows + frozen, together=True)
        return cls(rows, frozen)

    def nbytes(self, hidden: Tensor, head: Head, reference: ReferenceRows | None) -> int:
        """Return the bytes of all of them."""
        own = self.rows * head.vocabulary * hidden.element_size()
        if reference is None:
            return own
        return own + self.frozen_rows * reference.head.vocabulary * reference.hidden.element_size()


class Models:
    """The policy, and maybe a live reference for the first M rows, whose log-probabilities it keeps.

    Where both share their head, their hidden states go through one GEMM, which reads the weight once: 0.88 of the time
    of two at 64 rows, the same from 256 (bf16, D 1024, V 32000, one core of an EPYC 9004, 2026-11-21).
    """

    def __init__(
        self, hidden: Tensor, head: Head, reference: ReferenceRows | None, largest: int, loan: Loan, backend: str
    ) -> None:
        self._hidden, self._head, self._reference, self._backend = hidden, head, reference, backend
        self.reference_logprobs: Tensor | None = None
        self._frozen_workspace: Tensor | None = None
        layout, device = Layout.of(largest, hidden, head, reference), hidden.device
        self._together = layout.together
        if reference is not None:
            m, columns, like = reference.hidden.shape[0], reference.head.vocabulary, reference.hidden.dtype
            self.reference_logprobs = torch.empty(m, dtype=accumulation_dtype(hidden.dtype), device=device)
            if layout.frozen_rows:
                self._frozen_workspace = loan.matrix(layout.frozen_rows, columns, like, device)
        self._workspace = loan.matrix(layout.rows, head.vocabulary, hidden.dtype, device)

    def policy(self, rows: slice) -> Tensor:
        """Return the policy's logits alone."""
        return self._head.logits(self._hidden[rows], self._workspace)

    def logits(self, rows: slice, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return both models' logits; None for a reference that has none here, or whose were read already."""
        frozen = None if self._reference is None else self._reference.hidden[rows]
        if self._reference is None or frozen is None or not frozen.shape[0]:
            return self.policy(rows), None
        if self._together:
            own = self._hidden[rows]
            both = self._head.logits(torch.cat([own, frozen]), self._workspace)
            return both[: own.shape[0]], both[own.shape[0] :]
        head = self._reference.head
        if self._frozen_workspace is not None:
            return self.policy(rows), head.logits(frozen, self._frozen_workspace)
        first = head.logits(frozen, self._workspace)
        some = targets[rows][: frozen.shape[0]]
        out = row_pass(first, some, softcap=head.softcap, gradient=False, backend=self._backend)
        self.keep(rows, out.logprobs)
        return self.policy(rows), None

    def keep(self, rows: slice, reference_logprobs: Tensor | None) -> None:
        """Keep what a pass read of the reference, if it did."""
        if self.reference_logprobs is not None and reference_logprobs is not None:
            self.reference_logprobs[rows] = reference_logprobs
