"""The cached reference: log-probabilities of a frozen model in a file, found again by content."""

from efface.reference.cache import ReferenceCache
from efface.reference.distinct import DistinctSequences
from efface.reference.fingerprint import model_fingerprint
from efface.reference.keys import sequence_keys
from efface.reference.store import LogprobStore

__all__ = ["DistinctSequences", "LogprobStore", "ReferenceCache", "model_fingerprint", "sequence_keys"]
