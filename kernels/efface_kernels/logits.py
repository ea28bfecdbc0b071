"""Logits as the passes take them: a matrix and the cap that it has yet to go through."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Elements of a block of rows in the accumulation dtype. The torch passes read a chunk block by block, so that their
# temporaries stay in the cache and no second chunk is ever alive: 2^19 fp32 values are 2 MiB.
_BLOCK_ELEMENTS = 1 << 19
_BLOCK_ELEMENTS_ON_DEVICE = 1 << 25  # 128 MiB: there a block costs a dozen launches, and no cache holds a row anyway


@dataclass(frozen=True)
class Logits:
    """(n, V) logits as the head's GEMM made them.

    Attributes:
        values: the logits, rounded to their dtype.
        softcap: z ← cap · tanh(z / cap), or None.
        residual: what the rounding of ``values`` took away, in the same dtype and layout: the logits are their sum, in
            the accumulation dtype, before the cap. None: nothing. For the torch and native passes.
    """

    values: Tensor
    softcap: float | None = None
    residual: Tensor | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for a residual that does not lie as the values do."""
        layout = [(each.shape, each.stride(), each.dtype) for each in (self.values, self.residual) if each is not None]
        if layout[0] != layout[-1]:
            raise ValueError(f"`residual`: expected shape, strides and dtype {layout[0]} of `values`, got {layout[-1]}")

    def capped(self, rows: slice, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor | None]:
        """Return these rows after the cap, and the cap's derivative (None without one), in the accumulation ``dtype``.

        By default it is that of the logits' own.
        """
        z = self.values[rows].to(dtype or accumulation_dtype(self.values.dtype))
        if self.residual is not None:
            z = z + self.residual[rows].to(z.dtype)
        if self.softcap is None:
            return z, None
        tanh = torch.tanh(z / self.softcap)
        return self.softcap * tanh, 1 - tanh * tanh

    def row_vector(self) -> Tensor:
        """Return an uninitialised (n,) vector of the accumulation dtype, for one result a row."""
        values = self.values
        return torch.empty(values.shape[0], dtype=accumulation_dtype(values.dtype), device=values.device)

    def unit_stride(self) -> "Logits":
        """Return the logits with their columns side by side in memory, as a copy where they are not."""
        if self.values.stride(1) == 1:
            return self
        residual = None if self.residual is None else self.residual.contiguous()
        return Logits(self.values.contiguous(), self.softcap, residual)


def run_dense(logits: Logits, run: Callable[[Logits], None], *, writes: bool) -> None:
    """Run a pass that wants unit stride, and that overwrites the logits if it ``writes``, on logits of any strides.

    Raises ValueError for logits with a residual, which such a pass does not read.
    """
    if logits.residual is not None:
        raise ValueError("`logits`: expected no residual, which this pass does not read; give wider logits")
    dense = logits.unit_stride()
    run(dense)
    if writes and dense is not logits:
        logits.values.copy_(dense.values)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def power_of_two(values: Tensor, dim: int | tuple[int, ...] = ()) -> Tensor:
    """Return 2^k ≥ max|values| over ``dim`` (all of them by default), on the device; 1 where all values are 0."""
    peak = values.abs().amax(dim)
    return torch.where(peak > 0, torch.exp2(torch.ceil(torch.log2(peak))), 1.0)


def row_blocks(values: Tensor) -> Iterator[slice]:
    """Yield slices of rows small enough for the torch passes' temporaries."""
    elements = _BLOCK_ELEMENTS if values.device.type == "cpu" else _BLOCK_ELEMENTS_ON_DEVICE
    block = max(1, elements // max(1, values.shape[1]))
    for start in range(0, values.shape[0], block):
        yield slice(start, start + block)
