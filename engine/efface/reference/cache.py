"""The reference cache: a SQLite file of sequence log-probabilities, keyed by model and sequence content."""

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
    """A ``KeyedStore`` of sequence log-probabilities: (model fingerprint, sequence key) -> L, in float64."""

    table = KeyedTable(
        name="logprobs",
        key="sequence",
        value="value",
        kind="REAL",
        application=0x65666663,  # "effc"
        version=1,
        file="reference cache",
        remedy="delete the file, or choose another one with --reference-cache",
    )

    @staticmethod
    def encoded(values: Sequence[Any]) -> Sequence[bytes]:
        """Return each number as eight bytes, float64 little-endian."""
        content = np.array(values, "<f8").tobytes()
        return [content[first : first + 8] for first in range(0, len(content), 8)]

    def get(self, model: bytes, keys: Sequence[bytes]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Return the stored values (len(keys),), NaN where a value is missing, and a mask of the stored ones."""
        found = self.read(model, keys)
        result = np.array([found.get(key, math.nan) for key in keys], np.float64)
        return result, ~np.isnan(result)

    def put(self, model: bytes, keys: Sequence[bytes], values: NDArray[np.float64]) -> None:
        """Add values of a model's sequences in one transaction; keys that are already stored keep their value.

        Raises:
            ValueError: if the numbers of keys and values differ, or a value is not finite.
        """
        if len(keys) != len(values):
            raise ValueError(f"`values`: expected {len(keys)} entries, got {len(values)}")
        if not np.isfinite(values).all():
            raise ValueError("`values`: expected finite log-probabilities, got NaN or infinity")
        # SQLite does not keep the sign of −0.0, so the checksum must be computed for +0.0 (probability 1).
        self.write(model, keys, (values + 0.0).tolist())


KEY_BYTES = 16


def sequence_keys(store: TokenStore) -> list[bytes]:
    """Return the key of every sequence: BLAKE2b of the position of its first label and its token ids.

    Sequences with the same tokens and labels have the same key, in any store and at any index. Whether the first token
    is a label does not change the key, because no position predicts it.
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
    """The K distinct sequences of several stores, numbered in the order of their first occurrence.

    Attributes:
        keys: K keys, as returned by ``sequence_keys``.
        labels: (K,) number of label tokens of each sequence.
    """

    def __init__(self, stores: Sequence[TokenStore]) -> None:
        numbers: dict[bytes, int] = {}
        keys = [key for store in stores for key in sequence_keys(store)]
        self._numbers = np.fromiter((numbers.setdefault(key, len(numbers)) for key in keys), np.int64, len(keys))
        self.keys = list(numbers)
        _, self._places = np.unique(self._numbers, return_index=True)  # (K,) first index in the concatenated stores
        counts = [np.empty(0, np.int64), *(store.label_counts for store in stores)]
        self.labels: NDArray[np.int64] = np.concatenate(counts)[self._places]
        self._bounds = np.cumsum([0, *map(len, stores)])

    def __len__(self) -> int:
        """Return K."""
        return len(self.keys)

    def located(self, chosen: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Yield, for each store, the numbers in ``chosen`` that first occur in it, and their indices in that store."""
        places = self._places[chosen]
        for low, high in pairwise(self._bounds.tolist()):
            own = (low <= places) & (places < high)
            yield chosen[own], places[own] - low

    def spread(self, values: NDArray[np.float64]) -> list[NDArray[np.float64]]:
        """Expand one value per distinct sequence (K,) to one array per store, with a value for every sequence."""
        return np.split(values[self._numbers], self._bounds[1:-1])


class ReferenceCache:
    """The cached values of one model; rank 0 reads and writes the file, and broadcasts what it read.

    So the machines of a run do not need to share the file, and on a network file system only one host writes. If the
    file cannot be read or written, a warning is issued and the run continues without it.

    Args:
        place: returns the path of the file; None uses no file.
        model: returns the model's fingerprint; called on rank 0 only, and only if a file is used.
        rank: rank of this process.
        world_size: number of processes.

    Attributes:
        path: on rank 0, the path of the file after ``read``; None before that and without a usable file.
        problem: on rank 0, the error for which the file cannot be used, or None.
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
        """Open the file and return its values (len(keys),), NaN where a value is missing; all ranks must call this.

        Raises:
            ValueError: on all ranks, if the file is damaged or was written by another program.
        """
        message: list[NDArray[np.float64] | ValueError | None] = [None]
        if self._first:
            try:
                message = [self._read(keys)]
            except ValueError as error:
                if self._alone:
                    raise
                message = [error]
        if not self._alone:
            torch.distributed.broadcast_object_list(message)
        (result,) = message
        if isinstance(result, ValueError):
            raise result
        return np.full(len(keys), np.nan) if result is None else result

    def write(self, keys: Sequence[bytes], values: NDArray[np.float64]) -> None:
        """Add values on rank 0; they are in the file when the method returns. A no-op on other ranks.

        Raises:
            ValueError: on rank 0, if the file has been damaged since it was opened.
        """
        if self._store is not None:
            try:
                self._store.put(self._fingerprint, keys, values)
            except OSError as error:
                self._give_up(error)

    def close(self) -> None:
        """Close the file; a no-op if no file is open."""
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
            f"cannot use the reference cache ({error}), so the reference's log-probabilities stay in memory and each "
            "run computes them again; set EFFACE_CACHE or --reference-cache to a folder or file on a writable disk "
            "with free space, or use --reference-cache none",
            stacklevel=4,
        )
