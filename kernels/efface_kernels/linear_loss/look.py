"""The two implementations of ``Look``, one read pass over logits each.

``RowLook`` reads the log-probabilities of the targets. ``DistributionLook`` compares the whole distribution with that
of a frozen model. The logits of the policy and of a live reference are computed in workspaces that all chunks reuse.
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
    """Return whether both models' logits are computed in one workspace, one after the other.

    On a GPU this is so if ``both_bytes``, the size of both models' logits, exceeds the budget: it halves the memory and
    costs one more launch. Within the budget, one launch reads both. On the CPU both models always have their own
    logits, because the passes read them in turn anyway and large workspaces are reused between calls.
    """
    return device != "cpu" and both_bytes > budget_bytes


def same_layer(one: Head, other: Head) -> bool:
    """Return whether two heads share their parameters, as with LoRA on other layers, or a frozen or tied head."""
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
    """Sizes of the workspaces in which the logits of a chunk are computed.

    Attributes:
        rows: rows of the policy's workspace.
        frozen_rows: rows of the reference's own workspace. 0 if it has none, because the policy's workspace is used for
            the reference first, or holds the logits of both models.
        together: whether one GEMM computes the logits of both models, each from its own hidden states, in the policy's
            workspace.
    """

    rows: int
    frozen_rows: int = 0
    together: bool = False

    @classmethod
    def of(cls, rows: int, hidden: Tensor, head: Head, reference: ReferenceRows | None) -> "Layout":
        """Return the layout for chunks of at most ``rows`` rows."""
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
        """Return the bytes of all workspaces."""
        own = self.rows * head.vocabulary * hidden.element_size()
        if reference is None:
            return own
        return own + self.frozen_rows * reference.head.vocabulary * reference.hidden.element_size()


class Models:
    """The policy and an optional live reference for the first M rows; stores the reference's log-probabilities.

    If both share a head, one GEMM computes both models' logits and reads the weight once. This takes 0.88 of the time
    of two GEMMs at 64 rows, and the same time from 256 rows on (bf16, D 1024, V 32000, one core of an EPYC 9004,
    2026-11-21).
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
        """Return the policy's logits only."""
        return self._head.logits(self._hidden[rows], self._workspace)

    def logits(self, rows: slice, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the logits of both models.

        The second value is None if there is no reference for these rows, or if its logits were read already because
        both models share one workspace.
        """
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
        """Store the reference's log-probabilities of these rows, if a pass returned them."""
        if self.reference_logprobs is not None and reference_logprobs is not None:
            self.reference_logprobs[rows] = reference_logprobs


class RowLook:
    """Read pass with P = softmax − onehot = −∂ℓ/∂z, so that c = ∂loss/∂ℓ.

    Attributes:
        logprobs: (N,) ℓ of the rows read so far.
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
        """(M,) ℓ of the reference, or None."""
        return self._models.reference_logprobs

    def __call__(self, rows: slice, *, gradient: bool, again: bool = False) -> Tensor:
        """See ``Look``. With ``again`` only the policy's logits are computed."""
        p, frozen = (self._models.policy(rows), None) if again else self._models.logits(rows, self._targets)
        # The backend is called directly: the loss has already made the checks of the public pass.
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
    """Read pass with P = (p − q) / peak, so that c = −∂loss/∂KL(q‖p) · peak.

    The logits of both models are wider than half precision: at the start of a run p = q, and the difference of bfloat16
    logits would be only rounding error. P has the dtype of the hidden states, for the GEMMs of the gradients.

    Attributes:
        divergence: (N,) KL(q‖p) of the rows read so far.
        entropy: (N,) entropy of q of the rows read so far.
        peaks: (N,) powers of two, for float16 only: without them p − q of two close models would underflow. The peak of
            a row is its largest |p − q|, rounded up to a power of two. None for other dtypes, where the peak is 1.
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
        """See ``Look``. Coefficients are known in advance, so no row is read twice."""
        logits, frozen = self._policy(rows), self._reference(rows)
        p = into = logits.values
        narrow, later = p.dtype != self._dtype, gradient and self.peaks is not None
        # P overwrites the reference's logits. On a GPU the pass writes each row of P over the row that it has read.
        if narrow and p.device.type != "cpu":
            into = frozen.values.view(self._dtype)[:, : p.shape[1]]
        elif narrow:
            # On the CPU P is copied after the pass, into contiguous rows: oneDNN's bf16 GEMM reads past the end of a
            # row of V entries and multiplies by 0, and leftover bits of fp32 logits can be NaN as bf16 (V = 100 and
            # 50257, torch 2.13, a Xeon with AMX, 2026-11-27).
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
