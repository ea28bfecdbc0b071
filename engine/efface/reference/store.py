"""Log-probabilities in one SQLite file, shared by processes that fill and read it at the same time."""

import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from efface.keyed_store import Database

APPLICATION_ID = 0x65666663  # "effc": tells our files from other programs'
FORMAT = 1
_SCHEMA = (
    "CREATE TABLE logprobs (model BLOB NOT NULL, sequence BLOB NOT NULL, value REAL NOT NULL, "
    "checksum INTEGER NOT NULL, PRIMARY KEY (model, sequence)) WITHOUT ROWID"
)
_DROP = "DELETE FROM logprobs WHERE model = ? AND sequence = ?"
_QUERY = "SELECT sequence, value, checksum FROM logprobs WHERE model = ? AND sequence IN ({keys})"


class LogprobStore:
    """A file of sequence log-probabilities: (model fingerprint, sequence key) -> L, in float64.

    What ``put`` has returned from is there, also after the process was killed. Any number of processes may read and
    write at once. SQLite has no checksums, so every row carries one: a value is what was put, or the row is dropped,
    with a warning, and found no more.

    Args:
        path: the file; it and its folder are made if they are not there.

    Raises:
        OSError: a place that cannot be read or written, or a full disk; from every method.
        ValueError: a file whose structure is damaged, or of another program or version; from every method. It is left
            as it is.
    """

    def __init__(self, path: str | Path) -> None:
        self._database = Database(
            path,
            schema=_SCHEMA,
            application=APPLICATION_ID,
            version=FORMAT,
            name="reference cache",
            remedy="delete the file, or choose another with --reference-cache",
        )
        self.path = self._database.path

    def get(self, model: bytes, keys: Sequence[bytes]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Return the values (len(keys),) of a model's sequences, NaN where there is none, and where there is one."""
        there: list[bytes] = []
        wrong: list[Any] = []
        numbers: list[float] = []
        checksums: list[int] = []
        with self._database.explained():
            # Row by row: 10,000 tuples alive at once start a garbage collection, which takes 70 ms beside torch.
            for key, number, checksum in self._database.rows(_QUERY, model, keys):
                if not isinstance(key, bytes):  # where its type was damaged
                    wrong.append(key)
                    continue
                there.append(key)
                numbers.append(number if isinstance(number, float) else math.nan)
                checksums.append(checksum)
        right = _checksums(model, there, np.array(numbers, np.float64))
        found = dict(zip(there, numbers, strict=True))
        if right != checksums:
            wrong += [key for key, a, b in zip(there, right, checksums, strict=True) if a != b]
            for key in wrong:
                found.pop(key, None)
        self._database.drop_damaged(_DROP, model, wrong)
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
        values = values + 0.0  # SQLite keeps no sign of a zero, which is the log-probability of a sure answer
        checksums = _checksums(model, keys, values)
        rows = ((model, *row) for row in zip(keys, values.tolist(), checksums, strict=True))
        self._database.change("INSERT OR IGNORE INTO logprobs VALUES (?, ?, ?, ?)", rows)

    def close(self) -> None:
        """Close the file; closing twice changes nothing."""
        self._database.close()


def _checksums(model: bytes, keys: Sequence[bytes], values: NDArray[np.float64]) -> list[int]:
    """Return the CRC-32 of each whole row."""
    start, content = zlib.crc32(model), np.ascontiguousarray(values, "<f8").tobytes()
    return [zlib.crc32(content[8 * i : 8 * i + 8], zlib.crc32(key, start)) for i, key in enumerate(keys)]
