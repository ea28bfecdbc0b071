"""Token stores: tokenised sequences concatenated in flat arrays, which the C++ packer reads in place."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import NamedTuple

import efface_native
import numpy as np
from numpy.typing import NDArray

# ids (tokens,) int32; offsets (sequences + 1,) int64; label_starts (sequences,) int64
Chunk = tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]


class Taken(NamedTuple):
    """The number of data rows that became sequences (``rows``), and the number of rows in the data (``of``)."""

    rows: int
    of: int


class TokenStore:
    """Tokenised sequences in one or more chunks of three flat arrays; ``store[i]`` returns the ids of sequence i.

    Sequence i of a chunk is ``ids[offsets[i]:offsets[i + 1]]``, and its tokens from ``label_starts[i]`` on are labels.
    The arrays are read in place, so arrays in a memory-mapped file can be larger than RAM.

    Args:
        chunks: an (ids int32, offsets int64, label_starts int64) tuple for each chunk.
        taken: number of data rows that the sequences were made from; None if unknown.

    Raises:
        ValueError: if the arrays of a chunk are inconsistent, or a sequence has no label after its first token.
        TypeError: if an array has another dtype.
    """

    def __init__(self, chunks: Iterable[Chunk], taken: Taken | None = None) -> None:
        self.chunks: tuple[Chunk, ...] = tuple(chunks)
        self.taken = taken
        self._native: dict[str, efface_native.TokenStore] = {}
        self.native("store")  # raises if the arrays are inconsistent
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
        """Return a store of one chunk with copies of the given sequences.

        Args:
            sequences: token ids of each sequence.
            label_starts: position of each sequence's first label.

        Raises:
            ValueError: if the numbers of sequences and label starts differ, or a sequence has no label after its first
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
        """Return the token ids of a sequence, as a view."""
        if not 0 <= index < len(self):
            raise IndexError(f"sequence index: expected 0 .. {len(self) - 1}, got {index}")
        c = int(np.searchsorted(self._firsts, index, side="right")) - 1
        ids, offsets, _ = self.chunks[c]
        i = index - int(self._firsts[c])
        return ids[offsets[i] : offsets[i + 1]]

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """(sequences,) number of tokens of each sequence."""
        return _joined(np.diff(offsets) for _, offsets, _ in self.chunks)

    @cached_property
    def label_starts(self) -> NDArray[np.int64]:
        """(sequences,) position of the first label of each sequence."""
        return _joined(starts for _, _, starts in self.chunks)

    @cached_property
    def label_counts(self) -> NDArray[np.int64]:
        """(sequences,) number of label tokens of each sequence, without the first token, which is never predicted."""
        return self.lengths - np.maximum(self.label_starts, 1)

    def native(self, name: str) -> efface_native.TokenStore:
        """Return the store as an ``efface_native.TokenStore``; its error messages use ``name`` for the store."""
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
