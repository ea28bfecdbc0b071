"""What the loop reads logits for: the log-probabilities of targets, or a whole distribution beside a frozen one.

The logits of the policy, and of a live reference, are made in memory that all rows of a batch reuse.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from efface_kernels import passes
from efface_kernels.linear_loss.chunks import Chunk, budget, largest_piece
from efface_kernels.linear_loss.head import Head, ReferenceRows
from efface_kernels.linear_loss.wide_logits import WideLogits
from efface_kernels.logits import Logits, accumulation_dtype, power_of_two
from efface_kernels.memory import BufferPool


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
        self, hidden: Tensor, head: Head, reference: ReferenceRows | None, largest: int, pool: BufferPool, backend: str
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
                self._frozen_workspace = pool.matrix(layout.frozen_rows, columns, like, device)
        self._workspace = pool.matrix(layout.rows, head.vocabulary, hidden.dtype, device)

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
        out = passes.row_pass(first, some, softcap=head.softcap, gradient=False, backend=self._backend)
        self.keep(rows, out.logprobs)
        return self.policy(rows), None

    def keep(self, rows: slice, reference_logprobs: Tensor | None) -> None:
        """Keep what a pass read of the reference, if it did."""
        if self.reference_logprobs is not None and reference_logprobs is not None:
            self.reference_logprobs[rows] = reference_logprobs


class RowLook:
    """P = softmax − onehot = −∂ℓ/∂z, so that c = ∂loss/∂ℓ.

    Attributes:
        logprobs: (N,) ℓ of the rows that were seen.
    """

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        targets: Tensor,
        chunks: list[Chunk],
        *,
        reference: ReferenceRows | None = None,
        backend: str,
    ) -> None:
        self._targets, self._pass = targets, passes.ROW_PASSES[backend]
        self._softcap, self._reference_softcap = head.softcap, None if reference is None else reference.head.softcap
        self._pool = BufferPool()
        self._models = Models(hidden, head, reference, largest_piece(chunks), self._pool, backend)
        self.logprobs = torch.empty(hidden.shape[0], dtype=accumulation_dtype(hidden.dtype), device=hidden.device)

    @property
    def reference_logprobs(self) -> Tensor | None:
        """(M,) the reference's, or None."""
        return self._models.reference_logprobs

    def __call__(self, rows: slice, *, gradient: bool, again: bool = False) -> Tensor:
        """See ``Look``. A second look reads the policy's logits alone."""
        p, frozen = (self._models.policy(rows), None) if again else self._models.logits(rows, self._targets)
        # The loss checked what the public pass would check again.
        reference = None if frozen is None else Logits(frozen, self._reference_softcap)
        logprobs, *others = self._pass(Logits(p, self._softcap), self._targets[rows], reference, gradient)
        if not again:
            self.logprobs[rows] = logprobs
            self._models.keep(rows, others[0] if others else None)
        return p

    def close(self) -> None:
        """See ``Look``."""
        self._pool.release()


class DistributionLook:
    """P = (p − q) / peak, so that c = −∂loss/∂KL(q‖p) · peak.

    Logits of either model are wider than half precision: at the start of a run p = q, and the difference of bfloat16
    ones would be rounding. P has the dtype of the hidden states, for the gradients' GEMMs.

    Attributes:
        divergence: (N,) KL(q‖p) of the rows that were seen.
        entropy: (N,) that of q.
        peaks: (N,) powers of two. p − q of two close models lies below the smallest float16: there a row's peak is its
            largest entry, rounded up. Else None, for 1.
    """

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        targets: Tensor,
        chunks: list[Chunk],
        *,
        reference: ReferenceRows,
        shift: float,
        backend: str,
    ) -> None:
        self._targets, self._shift, self._pass = targets, shift, passes.DISTRIBUTION_PASSES[backend]
        self._pool, largest, pairs = BufferPool(), largest_piece(chunks), backend != "triton"
        self._policy = WideLogits(hidden, head, self._pool, largest, pairs=pairs)
        self._reference = WideLogits(reference.hidden, reference.head, self._pool, largest, pairs=pairs)
        self._dtype, dtype = hidden.dtype, accumulation_dtype(hidden.dtype)
        self.divergence, self.entropy = (hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in range(2))
        self.peaks = torch.ones_like(self.divergence) if self._dtype == torch.float16 else None

    def __call__(self, rows: slice, *, gradient: bool, again: bool = False) -> Tensor:
        """See ``Look``. Coefficients are known beforehand, so there is no second look."""
        logits, frozen = self._policy(rows), self._reference(rows)
        p = into = logits.values
        narrow, later = p.dtype != self._dtype, gradient and self.peaks is not None
        # The memory of the reference's logits takes P: on a GPU when the pass has read a row of them, and in its place.
        if narrow and p.device.type != "cpu":
            into = frozen.values.view(self._dtype)[:, : p.shape[1]]
        elif narrow:
            # Later, and rows side by side: oneDNN's bf16 GEMM multiplies what lies beyond a row of V entries by 0, and
            # the bits of fp32 logits may be NaN in bf16 (V = 100 and 50257, torch 2.13, a Xeon with AMX, 2026-11-27).
            later = gradient
            into = frozen.values.view(self._dtype).flatten()[: p.numel()].view(p.shape)
        self.divergence[rows], self.entropy[rows] = self._pass(
            logits, frozen, self._targets[rows], self._shift, (p if later else into) if gradient else None
        )
        if gradient and self.peaks is not None:
            self.peaks[rows] = power_of_two(p, dim=1)
            p.div_(self.peaks[rows, None])
        if later:
            into.copy_(p)
        return into

    def close(self) -> None:
        """See ``Look``."""
        self._pool.release()
