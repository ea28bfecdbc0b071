"""The reference cache of a run: distinct sequences by the keys of their content, each scored once, in a SQLite file."""

import hashlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from efface.batching import TokenStore
from efface.keyed_store import KeyedStore, KeyedTable


class LogprobStore(KeyedStore):
    """A file of sequence log-probabilities: (model fingerprint, sequence key) -> L, in float64; see ``KeyedStore``."""

    table = KeyedTable(
        name="logprobs",
        key="sequence",
        value="value",
        kind="REAL",
        application=0x65666663,  # "effc"
        version=1,
        file="reference cache",
        remedy="delete the file, or choose another with --reference-cache",
    )

    @staticmethod
    def encoded(values: Sequence[Any]) -> Sequence[bytes]:
        """Return each number's eight bytes."""
        content = np.array(values, "<f8").tobytes()
        return [content[first : first + 8] for first in range(0, len(content), 8)]

    def get(self, model: bytes, keys: Sequence[bytes]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Return the values (len(keys),) of a model's sequences, NaN where there is none, and where there is one."""
        found = self.read(model, keys)
        result = np.array([found.get(key, math.nan) for key in keys], np.float64)
        return result, ~np.isnan(result)

    def put(self, model: bytes, keys: Sequence[bytes], values: NDArray[np.float64]) -> None:
        """Add values of a model's sequences, all or none; of a key that is there already, the value stays.

        Raises:
            ValueError: as many values as keys are needed, and finite ones.
        """
        if len(keys) != len(values):
            raise ValueError(f"`values`: expected {len(keys)} entries, got {len(values)}")
        if not np.isfinite(values).all():
            raise ValueError("`values`: expected finite log-probabilities, got NaN or infinity")
        # SQLite keeps no sign of a zero, which is the log-probability of a sure answer.
        self.write(model, keys, (values + 0.0).tolist())


KEY_BYTES = 16


def sequence_keys(store: TokenStore) -> list[bytes]:
    """Return the key of every sequence: BLAKE2b of the position of its first label and its token ids.

    Sequences of the same tokens and labels have the same key, in whichever store and place they are. A label on the
    first token, which nothing predicts, changes no key.
    """
    keys = []
    for ids, offsets, starts in store.chunks:
        tokens = np.ascontiguousarray(ids, "<i4").view(np.uint8).data
        heads = np.maximum(starts, 1).astype("<i8").view(np.uint8).data
        bounds = (4 * offsets).tolist()
        for i, (low, high) in enumerate(pairwise(bounds)):
            state = hashlib.blake2b(heads[8 * i : 8 * i + 8], digest_size=KEY_BYTES)
            state.update(tokens[low:high])
            keys.append(state.digest())
    return keys


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


class ReferenceCache:
    """The values of one model in a file that the first rank reads and writes; it tells the others what it read.

    So machines need not share the file, and one on a network has a single host that writes for a run. A file that
    cannot be used costs a warning: nothing is found in it, and nothing is written.

    Args:
        place: returns the path; None keeps no file.
        model: returns the model's fingerprint; called on the first rank, if there is a file.
        rank: this process.
        world_size: of how many.

    Attributes:
        path: on the first rank, the file, from ``read`` on; None while there is none.
        problem: on the first rank, why it cannot be used, or None.
    """

    def __init__(
        self, place: Callable[[], Path] | None, model: Callable[[], bytes], *, rank: int = 0, world_size: int = 1
    ) -> None:
        self.path: Path | None = None
        self.problem: OSError | None = None
        self._place, self._model = place, model
        self._first, self._alone = rank == 0, world_size == 1
        self._store: LogprobStore | None = None
        self._fingerprint = b""

    def read(self, keys: Sequence[bytes]) -> NDArray[np.float64]:
        """Open the file and return its values (len(keys),), NaN where there is none; all ranks have to call this.

        Raises:
            ValueError: on all ranks, a damaged or foreign file.
        """
        told: list[NDArray[np.float64] | ValueError | None] = [None]
        if self._first:
            try:
                told = [self._read(keys)]
            except ValueError as error:
                if self._alone:
                    raise
                told = [error]
        if not self._alone:
            torch.distributed.broadcast_object_list(told)
        (answer,) = told
        if isinstance(answer, ValueError):
            raise answer
        return np.full(len(keys), np.nan) if answer is None else answer

    def write(self, keys: Sequence[bytes], values: NDArray[np.float64]) -> None:
        """Add values; they survive the process from here on.

        Raises:
            ValueError: on the first rank, a file that has been damaged since.
        """
        if self._store is not None:
            try:
                self._store.put(self._fingerprint, keys, values)
            except OSError as error:
                self._give_up(error)

    def close(self) -> None:
        """Close the file."""
        if self._store is not None:
            self._store.close()
            self._store = None

    def _read(self, keys: Sequence[bytes]) -> NDArray[np.float64] | None:
        if self._place is None:
            return None
        self._fingerprint = self._model()
        try:
            self._store = LogprobStore(self._place())
            self.path = self._store.path
            values, _ = self._store.get(self._fingerprint, keys)
        except OSError as error:
            self._give_up(error)
            return None
        return values

    def _give_up(self, error: OSError) -> None:
        self.close()
        self.path, self.problem = None, error
        warnings.warn(
            f"cannot use the reference cache ({error}), so the reference's values are kept in memory and computed anew "
            "in each run; set EFFACE_CACHE or --reference-cache to a place with space, or --reference-cache none",
            stacklevel=4,
        )
