"""The lm_head and its loss as one operation, chunk by chunk."""

from efface_kernels.linear_loss import compiled  # noqa: F401 - registers the ops of compiled graphs
from efface_kernels.linear_loss.distribution_loss import DistributionLossOutput, linear_distribution_loss
from efface_kernels.linear_loss.head import Head, ReferenceRows
from efface_kernels.linear_loss.logprob import linear_logprob
from efface_kernels.linear_loss.offsets import RowOffsets
from efface_kernels.linear_loss.sequence_loss import SequenceLossOutput, linear_sequence_loss
from efface_kernels.linear_loss.sequences import Sequences

__all__ = [
    "DistributionLossOutput",
    "Head",
    "ReferenceRows",
    "RowOffsets",
    "SequenceLossOutput",
    "Sequences",
    "linear_distribution_loss",
    "linear_logprob",
    "linear_sequence_loss",
]
