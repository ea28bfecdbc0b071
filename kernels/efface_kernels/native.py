"""The border to the C++ passes: tensors become addresses. CPU tensors only; the callers checked everything else."""

from collections.abc import Callable

import torch
from torch import Tensor

from efface_kernels.logits import Logits, accumulation_dtype

try:
    import efface_native
except ImportError as error:  # a source checkout without a compiler
    IMPORT_ERROR: ImportError | None = error
else:
    IMPORT_ERROR = None

Description = tuple[int, str, int, int, int, float]


def describe(logits: Logits) -> Description:
    """Return (address, dtype, rows, vocabulary, row stride, softcap or 0)."""
    values = logits.values
    rows, vocabulary = values.shape
    dtype = str(values.dtype).removeprefix("torch.")
    return values.data_ptr(), dtype, rows, vocabulary, values.stride(0), logits.softcap or 0.0


def unit_stride(logits: Logits) -> Logits:
    """Return the logits with their columns side by side in memory, as a copy where they are not."""
    if logits.values.stride(1) == 1:
        return logits
    return Logits(logits.values.contiguous(), logits.softcap)


def in_place(logits: Logits, run: Callable[[Logits], None]) -> None:
    """Run a pass that overwrites logits, whatever their strides."""
    dense = unit_stride(logits)
    run(dense)
    if dense is not logits:
        logits.values.copy_(dense.values)


def row_pass_native(logits: Logits, targets: Tensor, reference: Logits | None, gradient: bool) -> tuple[Tensor, ...]:
    """``row_pass_torch`` in C++."""
    outputs = [_vector(logits)] if reference is None else [_vector(logits), _vector(reference)]
    frozen = None if reference is None else unit_stride(reference)

    def run(dense: Logits) -> None:
        efface_native.row_pass(
            describe(dense),
            targets.contiguous().numpy(),
            gradient=gradient,
            logprobs=outputs[0].numpy(),
            reference_logits=None if frozen is None else describe(frozen),
            reference_logprobs=None if frozen is None else outputs[1].numpy(),
            threads=torch.get_num_threads(),
        )

    in_place(logits, run)
    return tuple(outputs)


def distribution_pass_native(
    logits: Logits, reference: Logits, targets: Tensor, shift: float, gradient: bool
) -> tuple[Tensor, Tensor]:
    """``distribution_pass_torch`` in C++."""
    divergence, entropy = _vector(logits), _vector(logits)
    frozen = unit_stride(reference)

    def run(dense: Logits) -> None:
        efface_native.distribution_pass(
            describe(dense),
            describe(frozen),
            targets.contiguous().numpy(),
            shift=shift,
            gradient=gradient,
            divergence=divergence.numpy(),
            entropy=entropy.numpy(),
            threads=torch.get_num_threads(),
        )

    in_place(logits, run)
    return divergence, entropy


def _vector(logits: Logits) -> Tensor:
    return torch.empty(logits.values.shape[0], dtype=accumulation_dtype(logits.values.dtype))
