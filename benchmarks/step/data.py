"""Rows of the step suite as token stores: plain, or in Llama-3's chat template, with refusals for DPO.

The rows are TOFU's if its files exist, otherwise random tokens of the same lengths. Llama-3's tokenizer is not needed:
its template gets as many tokens as that tokenizer makes of it, and the texts the tokens of a BPE trained on TOFU.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.harness import shared
from benchmarks.harness.shared import tofu_files, tofu_lengths
from efface.batching import TokenStore
from efface.simulate.teach import train_tokenizer

FORGET, RETAIN = "forget10", "retain90"
REFUSALS = "idk.jsonl"  # one refusal a line

# Llama-3's chat template with open-unlearning's system prompt and date, split as Llama-3's tokenizer splits it.
BEFORE = (
    *("<|begin_of_text|>", "<|start_header_id|>", "system", "<|end_header_id|>", "\n\n"),
    *("Cut", "ting", " Knowledge", " Date", ":", " December", " ", "202", "3", "\n"),
    *("Today", " Date", ":", " ", "10", " Apr", " ", "202", "5", "\n\n"),
    *("You", " are", " a", " helpful", " assistant", ".", "<|eot_id|>"),
    *("<|start_header_id|>", "user", "<|end_header_id|>", "\n\n"),
)
BETWEEN = ("<|eot_id|>", "<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\n")
AFTER = ("<|eot_id|>",)
_PIECES = tuple(dict.fromkeys((*BEFORE, *BETWEEN, *AFTER)))

Tokens = list[int]


class Rows(NamedTuple):
    """Questions and answers as token ids, without a template."""

    questions: list[Tokens]
    answers: list[Tokens]


@dataclass(frozen=True)
class Stores:
    """The stores of a run, and a description of their data."""

    forget: TokenStore
    retain: TokenStore
    said: str
    alternate: TokenStore | None = None  # an answer to refuse each forget question

    @property
    def all(self) -> tuple[TokenStore, ...]:
        """The stores in the order of their roles."""
        return (self.forget, self.retain, *(() if self.alternate is None else (self.alternate,)))


def stores(vocabulary: int) -> tuple[TokenStore, TokenStore, str]:
    """Return the forget store, the retain store, and a description of the data."""
    files = tofu_files(FORGET, RETAIN)
    if not files:
        return _like_tofu(vocabulary, "")
    try:
        return *_tokenised(*files, min(vocabulary, 8192)), f"TOFU {FORGET} / {RETAIN}"
    except ImportError as error:
        return _like_tofu(vocabulary, f" ({error})")


@cache  # time on a borrowed machine is limited
def _tokenised(forget: Path, retain: Path, vocabulary: int) -> tuple[TokenStore, TokenStore]:
    from efface.hf.text.data import token_store  # noqa: PLC0415 - needs datasets, which a borrowed machine may lack

    rows = [_read(path) for path in (forget, retain)]
    tokenizer = train_tokenizer([text for part in rows for row in part for text in row.values()], vocabulary)
    return token_store(rows[0], tokenizer, name=FORGET), token_store(rows[1], tokenizer, name=RETAIN)


def _read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _like_tofu(vocabulary: int, why: str) -> tuple[TokenStore, TokenStore, str]:
    forget, retain = synthetic(400, vocabulary, seed=0), synthetic(3600, vocabulary, seed=1)
    return forget, retain, f"synthetic, TOFU's lengths{why}"


def synthetic(sequences: int, vocabulary: int, *, seed: int) -> TokenStore:
    """Return random tokens with TOFU's lengths; answers are 58 % of them."""
    rows = random_rows(sequences, vocabulary, seed=seed)
    joined = [question + answer for question, answer in zip(*rows, strict=True)]
    return TokenStore.from_sequences(joined, [len(question) for question in rows.questions])


def random_rows(sequences: int, vocabulary: int, *, seed: int) -> Rows:
    """Return random questions and answers; together they have TOFU's lengths, and answers are 58 % of them."""
    rng = np.random.default_rng(seed)
    lengths = tofu_lengths(rng, sequences)
    rows = [rng.integers(0, vocabulary, length).tolist() for length in lengths]
    return Rows([row[: round(0.42 * len(row))] for row in rows], [row[round(0.42 * len(row)) :] for row in rows])


def chat_stores(vocabulary: int, *, alternates: bool = False) -> Stores:
    """Return stores of questions and answers in Llama-3's chat template; the labels are the answer and its end.

    Args:
        vocabulary: the model's vocabulary; its last ids are the template's tokens.
        alternates: whether to add a store with a refusal of each forget question.
    """
    words = vocabulary - len(_PIECES)
    files = tofu_files(FORGET, RETAIN)
    forget, retain, refusals = _tofu_rows(*files, min(words, 8192)) if files else _made_up_rows(words)
    said = f"TOFU {FORGET} / {RETAIN}" if files else "synthetic, TOFU's lengths"
    said += f", in Llama-3's chat template: {len(BEFORE)} tokens before the question, {len(BETWEEN)} after it"
    alternate = chat(Rows(forget.questions, refusals), words) if alternates else None
    if alternate is not None:
        said += f"; refusals of {np.mean(list(map(len, refusals))):.1f} tokens"
    return Stores(chat(forget, words), chat(retain, words), said, alternate)


def chat(rows: Rows, first: int) -> TokenStore:
    """Return the rows in the template, whose tokens have the ids from ``first`` on."""
    before, between, after = ([first + _PIECES.index(piece) for piece in part] for part in (BEFORE, BETWEEN, AFTER))
    prompts = [before + question + between for question in rows.questions]
    sequences = [prompt + answer + after for prompt, answer in zip(prompts, rows.answers, strict=True)]
    return TokenStore.from_sequences(sequences, [len(prompt) for prompt in prompts])


@cache
def _tofu_rows(forget: Path, retain: Path, vocabulary: int) -> tuple[Rows, Rows, list[Tokens]]:
    """Return the forget rows, the retain rows, and a refusal of each forget question (random, if TOFU has none)."""
    sets = [_read(path) for path in (forget, retain)]
    tokenizer = train_tokenizer([text for rows in sets for row in rows for text in row.values()], vocabulary)

    def tokens(texts: Sequence[str]) -> list[Tokens]:
        ids: list[Tokens] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return ids

    own = [Rows(tokens([row["question"] for row in rows]), tokens([row["answer"] for row in rows])) for rows in sets]
    lines = shared.FOLDER / REFUSALS
    if not lines.is_file():
        return own[0], own[1], _random_refusals(len(sets[0]), vocabulary)
    drawn = np.random.default_rng(0).choice(lines.read_text(encoding="utf-8").splitlines(), len(sets[0]))
    return own[0], own[1], tokens(drawn.tolist())


def _made_up_rows(vocabulary: int) -> tuple[Rows, Rows, list[Tokens]]:
    forget, retain = random_rows(400, vocabulary, seed=0), random_rows(3600, vocabulary, seed=1)
    return forget, retain, _random_refusals(400, vocabulary)


def _random_refusals(count: int, vocabulary: int) -> list[Tokens]:
    """Return random tokens, 5 to 13 a refusal."""
    rng = np.random.default_rng(2)
    return [rng.integers(0, vocabulary, length).tolist() for length in rng.integers(5, 14, count)]
