"""Token stores: sequences laid end to end, as the packer reads them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class TokenStore:
    """Tokenised sequences in three flat arrays.

    Attributes:
        ids: (tokens,) int32.
        offsets: (sequences + 1,) int64; sequence i is ``ids[offsets[i]:offsets[i + 1]]``.
        label_starts: (sequences,) int64; tokens from there on, counted within the sequence, are labels.
    """

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    label_starts: NDArray[np.int64]

    @classmethod
    def from_sequences(cls, sequences: Sequence[Sequence[int]], label_starts: Sequence[int]) -> "TokenStore":
        """Lay token id sequences end to end.

        Raises:
            ValueError: as many label starts as sequences are needed; every sequence needs a label after its first
                token.
        """
        if len(sequences) != len(label_starts):
            raise ValueError(f"`label_starts`: expected {len(sequences)} entries, got {len(label_starts)}")
        for i, (sequence, start) in enumerate(zip(sequences, label_starts, strict=True)):
            if max(start, 1) >= len(sequence):
                raise ValueError(
                    f"sequence {i} has no label: {len(sequence)} tokens, labels from position {start}; "
                    "drop the row, give it an answer, or raise the maximum length"
                )
        lengths = np.fromiter(map(len, sequences), dtype=np.int64, count=len(sequences))
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        ids = np.fromiter((token for sequence in sequences for token in sequence), np.int32, count=int(offsets[-1]))
        return cls(ids, offsets, np.asarray(label_starts, dtype=np.int64))

    @classmethod
    def empty(cls) -> "TokenStore":
        """Return a store without sequences."""
        return cls.from_sequences([], [])

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.label_starts)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(sequences,) tokens of each sequence."""
        return np.diff(self.offsets)

    @property
    def label_counts(self) -> NDArray[np.int64]:
        """(sequences,) label tokens of each sequence; the first token is never predicted."""
        return self.lengths - np.maximum(self.label_starts, 1)

    @property
    def arrays(self) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
        """What ``efface_native`` takes."""
        return self.ids, self.offsets, self.label_starts

    def check_vocabulary(self, vocabulary: int, name: str) -> None:
        """Raise ValueError if a token id is not below ``vocabulary``."""
        if self.ids.size and (int(self.ids.max()) >= vocabulary or int(self.ids.min()) < 0):
            wrong = int(self.ids.max()) if int(self.ids.max()) >= vocabulary else int(self.ids.min())
            raise ValueError(
                f"`{name}`: expected token ids in 0 .. {vocabulary - 1} (the model's vocabulary), got {wrong}; "
                "use the tokenizer that belongs to the model"
            )
