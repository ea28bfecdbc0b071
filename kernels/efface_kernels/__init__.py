"""The lm_head loss op and its passes: tensors in, tensors out.

Knows no model, no dataset and no trainer. Letters used throughout:
N label rows, D hidden size, V vocabulary, S sequences; ``z`` logits, ``ℓ`` log-probabilities of the targets.
"""

from efface_kernels.distribution_pass import DistributionPassOutput, distribution_pass
from efface_kernels.linear_loss import (
    DistributionLossOutput,
    Head,
    ReferenceRows,
    RowOffsets,
    SequenceLossOutput,
    Sequences,
    linear_distribution_loss,
    linear_logprob,
    linear_sequence_loss,
)
from efface_kernels.memory import release_workspaces
from efface_kernels.row_pass import RowPassOutput, row_pass
from efface_kernels.sequence_loss import Kind, SequenceRule, SequenceTerms, Term, sequence_loss

__all__ = [
    "DistributionLossOutput",
    "DistributionPassOutput",
    "Head",
    "Kind",
    "ReferenceRows",
    "RowOffsets",
    "RowPassOutput",
    "SequenceLossOutput",
    "SequenceRule",
    "SequenceTerms",
    "Sequences",
    "Term",
    "distribution_pass",
    "linear_distribution_loss",
    "linear_logprob",
    "linear_sequence_loss",
    "release_workspaces",
    "row_pass",
    "sequence_loss",
]
