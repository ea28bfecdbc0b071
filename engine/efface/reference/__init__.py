"""The cached reference: log-probabilities of a frozen model in a file, found again by content."""

from efface.reference.cache import DistinctSequences, LogprobStore, ReferenceCache, sequence_keys
from efface.reference.fingerprint import model_fingerprint

__all__ = ["DistinctSequences", "LogprobStore", "ReferenceCache", "model_fingerprint", "sequence_keys"]
