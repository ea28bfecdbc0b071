"""The reference cache: log-probabilities of a frozen model in a file, keyed by the content of model and sequences."""

from efface.reference.cache import DistinctSequences, LogprobStore, ReferenceCache, sequence_keys
from efface.reference.fingerprint import model_fingerprint

__all__ = ["DistinctSequences", "LogprobStore", "ReferenceCache", "model_fingerprint", "sequence_keys"]
