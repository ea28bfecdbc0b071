"""What the loop reads logits for: the log-probabilities of targets, or a whole distribution beside a frozen one."""

import torch
from torch import Tensor

from efface_kernels.distribution_pass import distribution_pass
from efface_kernels.linear_loss.chunks import Chunk, largest_piece
from efface_kernels.linear_loss.head import Head, ReferenceRows
from efface_kernels.linear_loss.models import Models
from efface_kernels.logits import accumulation_dtype, power_of_two
from efface_kernels.memory import Loan
from efface_kernels.row_pass import row_pass


class _WideLogits:
    """A model's logits in fp32 (fp64), piece by piece in one workspace."""

    def __init__(self, hidden: Tensor, head: Head, loan: Loan, largest: int) -> None:
        dtype = accumulation_dtype(hidden.dtype)
        self._hidden = hidden
        self._head = head.writing(dtype)
        self._workspace = loan.matrix(min(largest, hidden.shape[0]), head.vocabulary, dtype, hidden.device)

    def __call__(self, rows: slice) -> Tensor:
        hidden = self._hidden[rows].to(self._head.weight.dtype)
        return self._head.logits(hidden, self._workspace)


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
        self._targets, self._backend = targets, backend
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
        out = row_pass(
            p,
            self._targets[rows],
            reference_logits=frozen,
            softcap=self._softcap,
            reference_softcap=self._reference_softcap,
            gradient=gradient,
            backend=self._backend,
        )
        if not again:
            self.logprobs[rows] = out.logprobs
            self._models.keep(rows, out.reference_logprobs)
        return p

    def close(self) -> None:
        """See ``Look``."""
        self._loan.give_back()


class DistributionLook:
    """P = (p − q) / peak, so that c = −∂loss/∂KL(q‖p) · peak.

    Logits of either model are float32 (float64 for float64): at the start of a run p = q, and the difference of
    bfloat16 ones would be rounding. P has the dtype of the hidden states, for the gradients' GEMMs.

    Attributes:
        divergence: (N,) KL(q‖p) of the rows that were seen.
        entropy: (N,) that of q.
        peaks: (N,) powers of two. p − q of two close models lies below the smallest float16: there a row's peak is its
            largest entry, rounded up. Else 1.
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
        self._targets, self._shift, self._backend = targets, shift, backend
        self._softcap, self._reference_softcap = head.softcap, reference.head.softcap
        self._loan, largest = Loan(), largest_piece(chunks)
        self._policy = _WideLogits(hidden, head, self._loan, largest)
        self._reference = _WideLogits(reference.hidden, reference.head, self._loan, largest)
        self._dtype, dtype = hidden.dtype, accumulation_dtype(hidden.dtype)
        self.divergence, self.entropy = (hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in range(2))
        self.peaks = torch.ones_like(self.divergence)

    def __call__(self, rows: slice, *, gradient: bool, again: bool = False) -> Tensor:
        """See ``Look``. Coefficients are known beforehand, so there is no second look."""
        difference, beside = self._policy(rows), self._reference(rows)
        narrow = difference.dtype != self._dtype
        # The pass has read a row of the reference's logits when it writes P: their memory takes P in its own dtype.
        into = beside.view(self._dtype)[:, : difference.shape[1]] if narrow else difference
        scaled = gradient and self._dtype == torch.float16
        self.divergence[rows], self.entropy[rows] = distribution_pass(
            difference,
            beside,
            self._targets[rows],
            shift=self._shift,
            softcap=self._softcap,
            reference_softcap=self._reference_softcap,
            gradient=gradient,
            out=into if gradient and not scaled else None,
            backend=self._backend,
        )
        if scaled:
            self.peaks[rows] = power_of_two(difference, dim=1)
            into.copy_(difference.div_(self.peaks[rows, None]))
        return into

    def close(self) -> None:
        """See ``Look``."""
        self._loan.give_back()
