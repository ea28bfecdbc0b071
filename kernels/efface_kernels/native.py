"""Interface to the C++ passes: converts CPU tensors to addresses. The callers check all arguments."""

import torch
from torch import Tensor

from efface_kernels.logits import Logits, run_dense

try:
    import efface_native
except ImportError as error:  # a source checkout without a compiler
    IMPORT_ERROR: ImportError | None = error
else:
    IMPORT_ERROR = None


def describe(logits: Logits) -> "efface_native.Logits":
    """Return the descriptor of logits for the C++ passes: address, dtype, shape and stride; the column stride is 1."""
    values, residual = logits.values, 0 if logits.residual is None else logits.residual.data_ptr()
    rows, vocabulary = values.shape
    dtype = str(values.dtype).removeprefix("torch.")
    # positional, because keyword arguments would cost more than a microsecond
    return efface_native.Logits(
        values.data_ptr(), dtype, rows, vocabulary, values.stride(0), logits.softcap or 0.0, residual
    )


def row_pass_native(logits: Logits, targets: Tensor, reference: Logits | None, gradient: bool) -> tuple[Tensor, ...]:
    """Run ``row_pass_torch`` in C++."""
    outputs = [each.row_vector() for each in (logits, reference) if each is not None]
    frozen = None if reference is None else reference.unit_stride()

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

    run_dense(logits, run, writes=gradient)
    return tuple(outputs)


def distribution_pass_native(
    logits: Logits, reference: Logits, targets: Tensor, shift: float, into: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run ``distribution_pass_torch`` in C++."""
    divergence, entropy = logits.row_vector(), logits.row_vector()
    policy, frozen = logits.unit_stride(), reference.unit_stride()
    out = into if into is None or into.stride(1) == 1 else torch.empty(into.shape, dtype=into.dtype)
    efface_native.distribution_pass(
        describe(policy),
        describe(frozen),
        targets.contiguous().numpy(),
        shift=shift,
        into=None if out is None else describe(Logits(out)),
        divergence=divergence.numpy(),
        entropy=entropy.numpy(),
        threads=torch.get_num_threads(),
    )
    if into is not None and out is not None and out is not into:
        into.copy_(out)
    return divergence, entropy
