"""Log-probabilities in one SQLite file, shared by processes that fill and read it at the same time."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
        remedy="delete the file, or choose another with --reference_cache",
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
