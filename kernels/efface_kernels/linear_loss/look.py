"""What the loop reads logits for: the log-probabilities of targets, or a whole distribution beside a frozen one."""

import torch
from torch import Tensor

from efface_kernels.distribution_pass import op as distribution_pass
from efface_kernels.linear_loss.chunks import Chunk, largest_piece
from efface_kernels.linear_loss.head import Head, ReferenceRows
from efface_kernels.linear_loss.models import Models
from efface_kernels.linear_loss.wide_logits import WideLogits
from efface_kernels.logits import Logits, accumulation_dtype, power_of_two
from efface_kernels.memory import Loan
from efface_kernels.row_pass import op as row_pass


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
        self._targets, self._pass = targets, row_pass.PASSES[backend]
        self._softcap, self._reference_softcap = head.softcap, None if reference is None else reference.head.softcap
        self._loan = Loan()
        self._models = Models(hidden, head, reference, largest_piece(chunks), self._loan, backend)
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
        self._loan.give_back()


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
        self._targets, self._shift, self._pass = targets, shift, distribution_pass.PASSES[backend]
        self._loan, largest, pairs = Loan(), largest_piece(chunks), backend != "triton"
        self._policy = WideLogits(hidden, head, self._loan, largest, pairs=pairs)
        self._reference = WideLogits(reference.hidden, reference.head, self._loan, largest, pairs=pairs)
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
        self._loan.give_back()
