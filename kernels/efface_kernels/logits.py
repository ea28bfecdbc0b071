"""``Logits``, the input of the passes: a matrix of logits, and the soft-cap that the pass still has to apply."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Elements of a block of rows. The torch passes read a chunk block by block, so that their temporaries stay in the cache
# and never take the memory of a second chunk: 2^19 fp32 values are 2 MiB.
_BLOCK_ELEMENTS = 1 << 19
_BLOCK_ELEMENTS_ON_DEVICE = 1 << 25  # 128 MiB in fp32: on a GPU a block costs a dozen launches, and exceeds the cache


@dataclass(frozen=True)
class Logits:
    """(n, V) logits as written by the head's GEMM.

    Attributes:
        values: the logits, rounded to their dtype.
        softcap: Gemma-2's cap, z ← cap · tanh(z / cap), which the pass applies; or None.
        residual: rounding error of ``values``, in the same dtype and layout; or None. The logits before the cap are
            ``values + residual`` in the accumulation dtype. Supported by the torch passes and by the native
            distribution pass.
    """

    values: Tensor
    softcap: float | None = None
    residual: Tensor | None = None

    def __post_init__(self) -> None:
        """Raise ValueError if shape, strides or dtype of the residual differ from those of the values."""
        layout = [(each.shape, each.stride(), each.dtype) for each in (self.values, self.residual) if each is not None]
        if layout[0] != layout[-1]:
            raise ValueError(
                f"`residual`: expected the shape, strides and dtype of `values`, {layout[0]}, got {layout[-1]}"
            )

    def capped(self, rows: slice, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor | None]:
        """Return these rows after the cap, and the cap's derivative (None without a cap), both in ``dtype``.

        The default is the accumulation dtype of the logits.
        """
        z = self.values[rows].to(dtype or accumulation_dtype(self.values.dtype))
        if self.residual is not None:
            z = z + self.residual[rows].to(z.dtype)
        if self.softcap is None:
            return z, None
        tanh = torch.tanh(z / self.softcap)
        return self.softcap * tanh, 1 - tanh * tanh

    def row_vector(self) -> Tensor:
        """Return an uninitialised (n,) vector of the accumulation dtype, for one result per row."""
        values = self.values
        return torch.empty(values.shape[0], dtype=accumulation_dtype(values.dtype), device=values.device)

    def unit_stride(self) -> "Logits":
        """Return logits with a column stride of 1: these, or a contiguous copy."""
        if self.values.stride(1) == 1:
            return self
        residual = None if self.residual is None else self.residual.contiguous()
        return Logits(self.values.contiguous(), self.softcap, residual)


def run_dense(logits: Logits, run: Callable[[Logits], None], *, writes: bool) -> None:
    """Run a pass that requires a column stride of 1 on logits of any strides.

    ``writes``: whether the pass overwrites the logits.

    Raises:
        ValueError: if the logits have a residual, which such a pass does not read.
    """
    if logits.residual is not None:
        raise ValueError("`logits`: expected no residual, which this pass cannot read, got one; pass wider logits")
    dense = logits.unit_stride()
    run(dense)
    if writes and dense is not logits:
        logits.values.copy_(dense.values)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums over values of ``dtype``: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def power_of_two(values: Tensor, dim: int | tuple[int, ...] = ()) -> Tensor:
    """Return the smallest 2^k ≥ max|values| over ``dim`` (default: all), on the device; 1 if all values are 0."""
    peak = values.abs().amax(dim)
    return torch.where(peak > 0, torch.exp2(torch.ceil(torch.log2(peak))), 1.0)


def row_blocks(values: Tensor) -> Iterator[slice]:
    """Yield slices of rows that are small enough for the temporaries of the torch passes."""
    elements = _BLOCK_ELEMENTS if values.device.type == "cpu" else _BLOCK_ELEMENTS_ON_DEVICE
    block = max(1, elements // max(1, values.shape[1]))
    for start in range(0, values.shape[0], block):
        yield slice(start, start + block)
