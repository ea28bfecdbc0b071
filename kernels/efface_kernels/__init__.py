"""Fused losses over an ``lm_head``, and the passes over logits that they are built from.

The package works on plain tensors and does not depend on models, data sets or the trainer. Letters used throughout:
N label rows, D hidden size, V vocabulary size, S sequences, ``z`` logits, ``ℓ`` log-probabilities of the targets. A
label row is a hidden state that predicts a label.
"""

from efface_kernels.backends import resolve_backend
from efface_kernels.checks import check_dtype, check_shape
from efface_kernels.linear_loss import compiled  # noqa: F401 - registers the ops of compiled graphs
from efface_kernels.linear_loss.chunks import (
    chunk_capacity,
    default_chunk_rows,
    device_memory,
    logits_budget,
    one_chunk_is_smaller,
    run_within_memory,
)
from efface_kernels.linear_loss.distribution_loss import DistributionLossOutput, linear_distribution_loss
from efface_kernels.linear_loss.fused_loss import SequenceLossOutput, linear_sequence_loss
from efface_kernels.linear_loss.head import Head, ReferenceRows
from efface_kernels.linear_loss.logprob import linear_logprob
from efface_kernels.linear_loss.look import shares_workspace
from efface_kernels.logits import Logits, accumulation_dtype, row_blocks
from efface_kernels.memory import release_workspaces, to_device
from efface_kernels.passes import DistributionPassOutput, RowPassOutput, distribution_pass, row_pass, sequence_loss
from efface_kernels.sequence_loss.kinds import Kind
from efface_kernels.sequence_loss.rule import SequenceRule, SequenceTerms, Term, TermFunction, checked_terms
from efface_kernels.sequences import RowOffsets, Sequences, segment_sums

# The ops, the types of their arguments and results, the parts of a user-defined loss, and the planning of memory.
__all__ = [
    "DistributionLossOutput",
    "DistributionPassOutput",
    "Head",
    "Kind",
    "Logits",
    "ReferenceRows",
    "RowOffsets",
    "RowPassOutput",
    "SequenceLossOutput",
    "SequenceRule",
    "SequenceTerms",
    "Sequences",
    "Term",
    "TermFunction",
    "accumulation_dtype",
    "check_dtype",
    "check_shape",
    "checked_terms",
    "chunk_capacity",
    "default_chunk_rows",
    "device_memory",
    "distribution_pass",
    "linear_distribution_loss",
    "linear_logprob",
    "linear_sequence_loss",
    "logits_budget",
    "one_chunk_is_smaller",
    "release_workspaces",
    "resolve_backend",
    "row_blocks",
    "row_pass",
    "run_within_memory",
    "segment_sums",
    "sequence_loss",
    "shares_workspace",
    "to_device",
]
