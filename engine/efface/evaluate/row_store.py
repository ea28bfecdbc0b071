"""Finished rows of evaluations in one SQLite file, so that a killed one goes on where it was."""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from efface.evaluate.task import RowResult
from efface.reference.database import Database

APPLICATION_ID = 0x65666672  # "effr": tells our files from other programs'
FORMAT = 1
_SCHEMA = (
    "CREATE TABLE rows (model BLOB NOT NULL, row BLOB NOT NULL, result TEXT NOT NULL, "
    "checksum INTEGER NOT NULL, PRIMARY KEY (model, row)) WITHOUT ROWID"
)
_DROP = "DELETE FROM rows WHERE model = ? AND row = ?"
# As bytes: a damaged one need not be text.
_QUERY = "SELECT row, CAST(result AS BLOB), checksum FROM rows WHERE model = ? AND row IN ({keys})"


class RowStore:
    """A file of results: (model fingerprint, key of a row's task) -> JSON.

    What ``put`` has returned from is there, also after the process was killed. Results of other models, texts and
    settings lie beside one another and never meet: all of that is in the keys. SQLite has no checksums, so every row
    carries one: a result is what was put, or the row is dropped, with a warning, and found no more.

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
            name="evaluated rows",
            remedy="delete the file: the rows are then computed anew",
        )
        self.path = self._database.path

    def get(self, model: bytes, keys: Sequence[bytes]) -> list[RowResult | None]:
        """Return the results of a model's rows, in order; None where there is none."""
        found: dict[bytes, RowResult] = {}
        wrong: list[Any] = []
        with self._database.explained():
            for key, text, checksum in self._database.rows(_QUERY, model, keys):
                if isinstance(key, bytes) and isinstance(text, bytes) and _checksum(model, key, text) == checksum:
                    found[key] = json.loads(text)
                else:
                    wrong.append(key)
        self._database.drop_damaged(_DROP, model, wrong)
        return [found.get(key) for key in keys]

    def put(self, model: bytes, keys: Sequence[bytes], results: Sequence[RowResult]) -> None:
        """Add results of a model's rows, all or none; of a key that is there already, the result stays."""
        texts = [json.dumps(result) for result in results]
        rows = ((model, key, text, _checksum(model, key, text.encode())) for key, text in zip(keys, texts, strict=True))
        self._database.change("INSERT OR IGNORE INTO rows VALUES (?, ?, ?, ?)", rows)

    def close(self) -> None:
        """Close the file; closing twice changes nothing."""
        self._database.close()


def _checksum(model: bytes, key: bytes, text: bytes) -> int:
    return zlib.crc32(text, zlib.crc32(key, zlib.crc32(model)))
