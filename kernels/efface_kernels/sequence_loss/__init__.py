"""The sequence loss: from log-probabilities of rows to loss terms and coefficients, for a batch of mixed kinds."""

from efface_kernels.sequence_loss.kinds import Kind
from efface_kernels.sequence_loss.op import SequenceTerms, sequence_loss
from efface_kernels.sequence_loss.rule import SequenceRule, Term

__all__ = ["Kind", "SequenceRule", "SequenceTerms", "Term", "sequence_loss"]
