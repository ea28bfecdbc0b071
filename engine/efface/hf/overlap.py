"""Rows that stand in the forget and in the retain set: found by their tokens, and refused."""

import warnings

import numpy as np
from numpy.typing import NDArray

from efface.batching import TokenStore

_LOOKED_AT = 8  # tokens of a sequence that its sample holds
_SHOWN = 3


def shared_sequences(
    forget: TokenStore, retain: TokenStore, *, prompts: bool = False
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the forget sequences that are retain sequences too, and for each the first retain one with its tokens.

    A sample of a few tokens tells nearly all sequences apart, in NumPy; those that it does not are compared whole.

    Args:
        forget: sequences.
        retain: sequences.
        prompts: compare what stands before the labels, and not the labels.

    Returns:
        (K,) sequence numbers in ``forget``, in order, and (K,) in ``retain``.
    """
    ours, theirs = _samples(forget, prompts), _samples(retain, prompts)
    candidates = np.flatnonzero(np.isin(theirs, ours))
    first: dict[bytes, int] = {}
    for i in candidates.tolist():
        if key := _content(retain, i, prompts):
            first.setdefault(key, i)
    numbers = np.flatnonzero(np.isin(ours, theirs[candidates])).tolist() if first else []
    pairs = [(i, first[key]) for i in numbers if (key := _content(forget, i, prompts)) in first]
    found = np.array(pairs, np.int64).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def refuse_overlap(forget: TokenStore, retain: TokenStore, *, prompts: bool = False) -> None:
    """Raise ValueError if rows stand in both sets; where the sets are one and the same, warn.

    One set given for both is a choice, or a check that all runs; some rows in both are an accident of a filter or a
    file.

    Args:
        forget: sequences.
        retain: sequences.
        prompts: see ``shared_sequences``.
    """
    numbers, others = shared_sequences(forget, retain, prompts=prompts)
    if not len(numbers):
        return
    what = "question" if prompts else "row"
    if len(numbers) == len(forget) and len(shared_sequences(retain, forget, prompts=prompts)[0]) == len(retain):
        warnings.warn(
            f"the forget and the retain set are the same {len(retain)} rows, which are trained both ways; if that is "
            "meant, --allow_overlap (UnlearnArguments(allow_overlap=True)) says so",
            stacklevel=2,
        )
        return
    pairs = [f"{i} and {j}" for i, j in zip(numbers[:_SHOWN].tolist(), others[:_SHOWN].tolist(), strict=True)]
    raise ValueError(
        f"expected forget and retain sets without a common {what}, got {len(numbers)} of {len(forget)} forget rows in "
        f"both: rows {', '.join(pairs)}{' and more' if len(numbers) > _SHOWN else ''} (of the forget and of the retain "
        f"set as taken, from 0) have the same {'question' if prompts else 'tokens'}; leave them out of one set, with "
        "--retain_filter or a file without them, or insist with --allow_overlap (UnlearnArguments(allow_overlap=True))"
    )


def _samples(store: TokenStore, prompts: bool) -> NDArray[np.uint64]:
    """(sequences,) A number that equal sequences share, of their lengths and some of their tokens."""
    parts = [np.empty(0, np.uint64)]
    for ids, offsets, starts in store.chunks:
        begins = offsets[:-1]
        lengths = starts if prompts else np.diff(offsets)
        mixed = lengths.astype(np.uint64)
        for k in range(_LOOKED_AT):
            # Spread over the sequence, with its last token but one: the very last ends every row.
            places = begins + np.maximum((lengths * (k + 1)) // _LOOKED_AT - 2, 0)
            tokens = ids[places].astype(np.uint64) if len(ids) else np.zeros(len(begins), np.uint64)
            mixed = (mixed ^ tokens) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(29)
        parts.append(mixed)
    return np.concatenate(parts)


def _content(store: TokenStore, index: int, prompts: bool) -> bytes:
    """Return the tokens of a sequence, or of its prompt; nothing where that is at most a mark of the beginning."""
    tokens = store[index]
    if prompts:
        tokens = tokens[: store.label_starts[index]]
    return tokens.tobytes() if len(tokens) > 1 else b""
