"""Token stores: sequences laid end to end, as the packer reads them."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import NamedTuple

import efface_native
import numpy as np
from numpy.typing import NDArray

# ids (tokens,) int32; offsets (sequences + 1,) int64; label_starts (sequences,) int64
Chunk = tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]


class Taken(NamedTuple):
    """How many rows of the data became sequences, and of how many."""

    rows: int
    of: int


class TokenStore:
    """Tokenised sequences in one or more chunks of three flat arrays; ``store[i]`` is the ids of sequence i.

    Sequence i of a chunk is ``ids[offsets[i]:offsets[i + 1]]``, and its tokens from ``label_starts[i]`` on are labels.
    The arrays are read in place: those of a memory-mapped file may exceed RAM.

    Args:
        chunks: (ids int32, offsets int64, label_starts int64) each.
        taken: which rows the sequences were made of; None where that is not known.

    Raises:
        ValueError: arrays that do not fit one another, or a sequence without a label after its first token.
        TypeError: another dtype.
    """

    def __init__(self, chunks: Iterable[Chunk], taken: Taken | None = None) -> None:
        self.chunks: tuple[Chunk, ...] = tuple(chunks)
        self.taken = taken
        self._native: dict[str, efface_native.TokenStore] = {}
        self.native("store")  # refuses arrays that do not fit one another
        self._firsts = np.cumsum([0, *(len(starts) for _, _, starts in self.chunks)])
        bad = np.flatnonzero(self.label_counts < 1)
        if bad.size:
            i = int(bad[0])
            raise ValueError(
                f"sequence {i} has no label: {self.lengths[i]} tokens, labels from position {self.label_starts[i]}; "
                "drop the row, give it an answer, or raise the maximum length"
            )

    @classmethod
    def from_sequences(cls, sequences: Sequence[Sequence[int]], label_starts: Sequence[int]) -> "TokenStore":
        """Lay token id sequences end to end.

        Raises:
            ValueError: as many label starts as sequences are needed; every sequence needs a label after its first
                token.
        """
        if len(sequences) != len(label_starts):
            raise ValueError(f"`label_starts`: expected {len(sequences)} entries, got {len(label_starts)}")
        lengths = np.fromiter(map(len, sequences), dtype=np.int64, count=len(sequences))
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        ids = np.fromiter((token for sequence in sequences for token in sequence), np.int32, count=int(offsets[-1]))
        return cls([(ids, offsets, np.asarray(label_starts, dtype=np.int64))])

    @classmethod
    def empty(cls) -> "TokenStore":
        """Return a store without sequences."""
        return cls([])

    def __len__(self) -> int:
        """Return the number of sequences."""
        return int(self._firsts[-1])

    def __getitem__(self, index: int) -> NDArray[np.int32]:
        """Return the ids of a sequence, as a view."""
        if not 0 <= index < len(self):
            raise IndexError(f"expected a sequence in 0 .. {len(self) - 1}, got {index}")
        c = int(np.searchsorted(self._firsts, index, side="right")) - 1
        ids, offsets, _ = self.chunks[c]
        i = index - int(self._firsts[c])
        return ids[offsets[i] : offsets[i + 1]]

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """(sequences,) tokens of each sequence."""
        return _joined(np.diff(offsets) for _, offsets, _ in self.chunks)

    @cached_property
    def label_starts(self) -> NDArray[np.int64]:
        """(sequences,) position of the first label of each sequence."""
        return _joined(starts for _, _, starts in self.chunks)

    @cached_property
    def label_counts(self) -> NDArray[np.int64]:
        """(sequences,) label tokens of each sequence; the first token is never predicted."""
        return self.lengths - np.maximum(self.label_starts, 1)

    def native(self, name: str) -> efface_native.TokenStore:
        """Return what ``efface_native`` takes; its errors call the store ``name``."""
        if name not in self._native:
            self._native[name] = efface_native.TokenStore(name, self.chunks)
        return self._native[name]

    def check_vocabulary(self, vocabulary: int, name: str) -> None:
        """Raise ValueError if a token id is not in 0 .. ``vocabulary`` − 1."""
        for ids, _, _ in self.chunks:
            if not ids.size:
                continue
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= vocabulary:
                raise ValueError(
                    f"`{name}`: expected token ids in 0 .. {vocabulary - 1} (the model's vocabulary), got "
                    f"{high if high >= vocabulary else low}; use the tokenizer that belongs to the model"
                )


def _joined(parts: Iterable[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate([np.empty(0, np.int64), *parts])
