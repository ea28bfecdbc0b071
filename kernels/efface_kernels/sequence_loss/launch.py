"""Launch of the sequence loss in Triton, and its launch configuration, which has not been timed on a GPU yet."""

import torch
from torch import Tensor

from efface_kernels.sequence_loss.rule import SequenceRule, SequenceTerms
from efface_kernels.sequences import Sequences
from efface_kernels.triton_launch import LaunchConfig, on_device

# One configuration for all shapes: the block size determines the order of addition, and the bits of a sequence must not
# depend on the lengths of other sequences. TOFU's answers have 33 label rows on average, so one warp handles most
# sequences in one step.
LAUNCH = LaunchConfig(block=128, num_warps=1)


def sequence_loss_triton(
    sequences: Sequences,
    rule: SequenceRule,
    reference_logprobs: Tensor | None,
    into: tuple[Tensor, Tensor, Tensor | None] | None = None,
) -> SequenceTerms:
    """Run ``sequence_loss_torch`` in one launch.

    ``into``: optional output tensors for terms, sums and reference sums.
    """
    from efface_kernels.sequence_loss.kernel import sequence_loss_kernel  # Triton is imported when a kernel first runs

    logprobs, count = sequences.logprobs.contiguous(), len(sequences)
    if into is None:
        new = [torch.empty(count, dtype=logprobs.dtype, device=logprobs.device) for _ in range(3)]
        into = new[0], new[1], sequences.reference_sums if reference_logprobs is None else new[2]
    terms, sums, reference_sums = into
    coefficients = torch.empty_like(logprobs)
    if count:  # an empty grid is a launch error
        with on_device(logprobs):
            sequence_loss_kernel[(count,)](
                logprobs,
                sequences.row_offsets.contiguous(),
                sequences.own(rule.roles).contiguous(),
                rule.table,
                reference_logprobs,
                0 if reference_logprobs is None else reference_logprobs.shape[0],
                reference_sums,
                terms,
                sums,
                coefficients,
                EPS=torch.finfo(logprobs.dtype).eps,
                BLOCK=LAUNCH.block,
                num_warps=LAUNCH.num_warps,
            )
    return SequenceTerms(terms, coefficients, sums, reference_sums)
