"""What a sequence is found by: its token ids, and which of them are labels."""

import hashlib
from itertools import pairwise

import numpy as np

from efface.batching import TokenStore

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
