"""The distinct sequences of several stores: each is scored once, however often it comes."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from efface.batching import TokenStore
from efface.reference.keys import sequence_keys


class DistinctSequences:
    """The K distinct sequences of stores, numbered as they first come.

    Attributes:
        keys: their keys; see ``sequence_keys``.
        labels: (K,) label tokens of each.
    """

    def __init__(self, stores: Sequence[TokenStore]) -> None:
        numbers: dict[bytes, int] = {}
        keys = [key for store in stores for key in sequence_keys(store)]
        self._numbers = np.fromiter((numbers.setdefault(key, len(numbers)) for key in keys), np.int64, len(keys))
        self.keys = list(numbers)
        _, self._places = np.unique(self._numbers, return_index=True)  # (K,) where each comes first, all stores in line
        counts = [np.empty(0, np.int64), *(store.label_counts for store in stores)]
        self.labels: NDArray[np.int64] = np.concatenate(counts)[self._places]
        self._bounds = np.cumsum([0, *map(len, stores)])

    def __len__(self) -> int:
        """Return K."""
        return len(self.keys)

    def located(self, chosen: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Yield, store by store, those of ``chosen`` that first come in it, and their indices in it."""
        places = self._places[chosen]
        for low, high in pairwise(self._bounds.tolist()):
            own = (low <= places) & (places < high)
            yield chosen[own], places[own] - low

    def spread(self, values: NDArray[np.float64]) -> list[NDArray[np.float64]]:
        """Return the values (K,) for every sequence of each store."""
        return np.split(values[self._numbers], self._bounds[1:-1])
