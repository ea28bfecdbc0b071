"""``Head``, the linear layer from hidden states to logits, and ``ReferenceRows``, the input of a frozen one."""

from dataclasses import dataclass

import torch
from torch import Tensor

from efface_kernels.checks import FLOATS, HALVES, check_dtype, check_same_device, check_shape, check_softcap


@dataclass(frozen=True)
class Head:
    """A language-model head: logits = softcap(hidden @ weight.T + bias).

    Attributes:
        weight: (V, D).
        bias: (V,) or None.
        softcap: Gemma-2's cap, z ← softcap · tanh(z / softcap), or None. The passes apply it, not ``logits``.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None

    @property
    def vocabulary(self) -> int:
        """Vocabulary size V."""
        return self.weight.shape[0]

    @property
    def hidden_size(self) -> int:
        """Hidden size D."""
        return self.weight.shape[1]

    def check(self, hidden: Tensor, *, prefix: str = "") -> None:
        """Raise TypeError or ValueError unless this head can be applied to ``hidden`` (N, D)."""
        check_dtype(f"{prefix}hidden", hidden, FLOATS)
        check_shape(f"{prefix}weight", self.weight, ("V", "D"))
        check_shape(f"{prefix}hidden", hidden, ("N", self.weight.shape[1]), f"D must be that of `{prefix}weight`")
        check_dtype(f"{prefix}weight", self.weight, (hidden.dtype,))
        if self.bias is not None:
            check_shape(f"{prefix}bias", self.bias, (self.vocabulary,))
            check_dtype(f"{prefix}bias", self.bias, (hidden.dtype,))
        check_softcap(self.softcap)
        check_same_device(**{f"{prefix}hidden": hidden, f"{prefix}weight": self.weight, f"{prefix}bias": self.bias})

    def to(self, device: torch.device) -> "Head":
        """Return the head with its parameters on ``device``."""
        return Head(self.weight.to(device), None if self.bias is None else self.bias.to(device), self.softcap)

    def logits(self, hidden: Tensor, workspace: Tensor) -> Tensor:
        """Write the uncapped logits of ``hidden`` (n, D) into the first n rows of ``workspace`` and return them."""
        out = workspace[: hidden.shape[0]]  # (n, V)
        if out.dtype != hidden.dtype:  # only after ``writing`` returned this head unchanged, on CUDA
            torch.mm(hidden, self.weight.t(), out_dtype=out.dtype, out=out)
            return out if self.bias is None else out.add_(self.bias)
        if self.bias is None:
            return torch.mm(hidden, self.weight.t(), out=out)
        return torch.addmm(self.bias, hidden, self.weight.t(), out=out)

    def residual(self, hidden: Tensor, logits: Tensor, workspace: Tensor) -> Tensor:
        """Write the rounding error of ``logits(hidden)`` (exact − rounded) into ``workspace``; needs no bias."""
        return torch.addmm(logits, hidden, self.weight.t(), beta=-1, out=workspace[: hidden.shape[0]])

    def writing(self, dtype: torch.dtype) -> "Head":
        """Return a head that writes logits of ``dtype``: this one, or a copy with its parameters in ``dtype``.

        On CUDA a GEMM can read half precision and write float32 (torch 2.8 refuses this on ROCm). If the parameters
        were copied, the caller must cast the hidden states as well.
        """
        device = self.weight.device.type
        if self.weight.dtype == dtype or (device == "cuda" and torch.version.hip is None and dtype == torch.float32):
            return self
        return self._in(dtype)

    def cast_for(self, hidden: Tensor) -> tuple[Tensor, "Head"]:
        """Return hidden states and head cast to the dtype of the GEMM; gradients keep the dtypes of the inputs.

        Inside ``torch.autocast`` both are cast as ``torch.nn.functional.linear`` casts them. Otherwise, a float32 head
        with half-precision hidden states is cast to their dtype: the logits are rounded to this dtype, and the gradient
        of the head is float32. Such heads are master copies, or heads kept in float32 on a quantised model.
        """
        device = hidden.device.type
        if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        elif hidden.dtype in HALVES and self.weight.dtype == torch.float32:
            dtype = hidden.dtype
        else:
            return hidden, self
        return hidden.to(dtype), self._in(dtype)

    def _in(self, dtype: torch.dtype) -> "Head":
        return Head(self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype), self.softcap)


@dataclass(frozen=True)
class ReferenceRows:
    """Hidden states of a frozen reference model for the first M label rows, and its head. Neither receives a gradient.

    Attributes:
        hidden: (M, D') hidden states for the first M of the policy's N rows. These are whole sequences, namely those
            whose loss needs a reference.
        head: head of the reference model; its D', vocabulary and dtype can differ from the policy's.
    """

    hidden: Tensor
    head: Head

    @torch.no_grad()
    def cast(self) -> "ReferenceRows":
        """Return the detached rows and the head, cast to the dtype of the GEMM; see ``Head.cast_for``."""
        return ReferenceRows(*self.head.cast_for(self.hidden.detach()))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, float | None]:
        """Return hidden states, weight, bias and soft-cap, the types that the schema of an op supports."""
        return self.hidden, self.head.weight, self.head.bias, self.head.softcap
