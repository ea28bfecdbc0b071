"""Texts of any length as sequences that a model can read, each token predicted once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from efface.batching import TokenStore
from efface.evaluate.metrics.token_statistics import TokenTask


@dataclass(frozen=True, eq=False)
class Windows:
    """A task whose rows are windows; ``owners`` tells of which text each is."""

    task: TokenTask
    owners: Sequence[int]


def text_windows(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    window: int,
    stride: int,
    token_budget: int = 8192,
    name: str = "texts",
) -> Windows:
    """Cut texts, tokenised with the special tokens that the tokenizer adds by itself, into overlapping windows.

    Windows of ``window`` tokens begin every ``stride`` tokens, until one reaches the end. A token is predicted in the
    first window that holds it, so that from the second window on it has at least ``window − stride`` tokens before it.
    Nothing predicts a text's first token; with most tokenizers that is the beginning-of-sequence token.

    Raises:
        ValueError: a window and a stride that do not fit one another; a text with no token to predict.
    """
    check_window(window, stride)
    encoded = tokenizer(list(texts), return_attention_mask=False, verbose=False)["input_ids"]
    sequences: list[list[int]] = []
    starts: list[int] = []
    owners: list[int] = []
    for row, ids in enumerate(encoded):
        if len(ids) < 2:
            raise ValueError(
                f"{name}, row {row}: expected a text of at least 2 tokens, got {texts[row]!r}, which is {len(ids)}: "
                "nothing predicts the first one; drop the row"
            )
        for begin, label, end in _spans(len(ids), window, stride):
            sequences.append(list(ids[begin:end]))
            starts.append(label - begin)
            owners.append(row)
    store = TokenStore.from_sequences(sequences, starts)
    return Windows(TokenTask(store, token_budget=token_budget, name=f"{name}, windows"), owners)


def check_window(window: int, stride: int) -> None:
    """Raise ValueError unless every window predicts tokens, each with one before it."""
    if not 1 <= stride < window:
        raise ValueError(f"`stride`: expected at least 1 and less than the window, {window}, got {stride}")


def _spans(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield where each window begins, where its labels do, and its end."""
    label = 1
    for begin in range(0, length, stride):
        end = min(begin + window, length)
        yield begin, label, end
        if end == length:
            return
        label = end


def by_text(windows: Windows, values: Sequence[Sequence[float]]) -> list[np.ndarray[tuple[int], np.dtype[np.float64]]]:
    """Join what windows tell of their labels, text by text."""
    texts: list[list[float]] = [[] for _ in range(windows.owners[-1] + 1)]
    for owner, part in zip(windows.owners, values, strict=True):
        texts[owner].extend(part)
    return [np.array(text, np.float64) for text in texts]
