"""Shared prefixes of a run's sequences: the tokens that a sequence adds to a micro-batch, for the planner."""

from collections.abc import Sequence
from dataclasses import dataclass

import efface_native
import numpy as np
from numpy.typing import NDArray

from efface.batching.store import TokenStore

COPY = 8
"""Shared tokens of a sequence that count as one added token.

Attention copies their keys and values, which are kept for the backward pass in every layer: about an eighth of what a
token needs without grouped heads (2 of about 16 vectors of D numbers), and less with them. So a micro-batch needs no
more memory than one of as many tokens without sharing, however long the prefix is.
"""

_SAMPLE = 64  # sequences of a store that are compared to find its prefix


@dataclass(frozen=True, eq=False)
class AddedTokens:
    """The tokens of micro-batches, as the planner counts them: ``shared`` plus the tokens that each sequence adds.

    The sum is an upper bound of the stored tokens T of a micro-batch, because sequences can share more.

    Attributes:
        shared: number of tokens that every micro-batch contains once.
        forget: (F,) number of tokens that each forget sequence adds, at least 1.
        retain: (R,) the same for each retain sequence.
        alternate: (F,) the same for each alternate answer in the micro-batch of its forget sequence; None without
            alternates.
    """

    shared: int
    forget: NDArray[np.int64]
    retain: NDArray[np.int64]
    alternate: NDArray[np.int64] | None = None


def added_tokens(stores: Sequence[TokenStore], *, share: bool, last_tokens: bool = True) -> AddedTokens:
    """Return the tokens that sequences add to micro-batches packed with the same ``share`` and ``last_tokens``.

    With ``share``, the common beginning of most forget sequences and of most retain sequences counts once per
    micro-batch, and an alternate answer adds the tokens that its forget sequence does not contain. ``COPY`` shared
    tokens count as one more.

    Args:
        stores: the forget store, the retain store and, if alternate answers are used, the alternate store.
        share: see ``pack_items``.
        last_tokens: see ``pack_items``.
    """
    lengths = [store.lengths - (not last_tokens) for store in stores]
    if not share:
        return AddedTokens(0, *lengths)
    (forget, retain), alternates = stores[:2], stores[2:]
    prefixes = [common_prefix(store) for store in (forget, retain)]
    both = min(len(prefix) for prefix in prefixes)
    differ = np.flatnonzero(prefixes[0][:both] != prefixes[1][:both])
    added = [
        _added(length, efface_native.prefix_lengths(store.native(name), prefix))
        for store, name, prefix, length in zip(stores, ("forget", "retain"), prefixes, lengths, strict=False)
    ]
    for alternate, length in zip(alternates, lengths[2:], strict=True):
        pairs = efface_native.pair_prefix_lengths(forget.native("forget"), alternate.native("alternate"))
        # An alternate that begins with the whole forget sequence shares only the tokens that are run, lengths[0].
        added.append(_added(length, np.minimum(pairs, lengths[0])))
    return AddedTokens(sum(map(len, prefixes)) - int(differ[0] if len(differ) else both), *added)


def _added(lengths: NDArray[np.int64], shared: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the tokens that sequences add; each keeps a token of its own, as in the packer."""
    shared = np.minimum(shared, lengths - 1)
    return lengths - shared + shared // COPY


def common_prefix(store: TokenStore) -> NDArray[np.int32]:
    """Return the prefix that saves most tokens if it is stored once: its length times the sequences that repeat it.

    It is found in a sample of evenly spaced sequences, so that one sequence with another beginning does not matter. It
    is empty if no two sequences of the sample begin with the same token.
    """
    sample = [store[i] for i in np.unique(np.linspace(0, len(store) - 1, min(len(store), _SAMPLE)).astype(np.int64))]
    if len(sample) < 2:
        return np.empty(0, np.int32)
    part = TokenStore.from_sequences([ids.tolist() for ids in sample], [0] * len(sample))
    shared = np.stack([efface_native.prefix_lengths(part.native("sample"), ids) for ids in sample])
    np.fill_diagonal(shared, 0)
    shared = -np.sort(-shared, axis=1)  # row i: lengths of the prefixes that sequence i shares, longest first
    saved = shared * np.arange(1, len(sample) + 1)  # the k-th longest one is shared with k other sequences
    best = np.unravel_index(saved.argmax(), saved.shape)
    return sample[best[0]][: int(shared[best])]
