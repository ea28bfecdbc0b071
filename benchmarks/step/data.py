"""The pairs of some training steps, packed and padded: TOFU where its files are at hand, else its lengths."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from benchmarks import tofu
from efface.batching import Assembler, PackedBatch, StepTotals, TokenStore, plan_epoch
from efface.hf.reference.score import store_logprobs
from efface.simulate.teach import train_tokenizer

FORGET, RETAIN = "forget10", "retain90"


@dataclass(frozen=True)
class Padded:
    """Sequences of one role, padded on the right to their own longest: (B, T) each."""

    input_ids: Tensor
    labels: Tensor  # -100 on prompts and padding
    attention_mask: Tensor

    def to(self, device: torch.device) -> "Padded":
        """Return a copy on the device."""
        return Padded(self.input_ids.to(device), self.labels.to(device), self.attention_mask.to(device))


@dataclass(frozen=True)
class Step:
    """One step's pairs as the packed and the padded providers read them; assembled before the clock starts."""

    batch: PackedBatch
    totals: StepTotals
    reference_sums: Tensor  # (S,) as ``CachedReference.sums`` hands them to the trainer; 0 for retain sequences
    forget: Padded
    retain: Padded

    @property
    def padded_tokens(self) -> int:
        """Tokens that the padded forward passes of the policy read; the packed one reads ``batch.tokens``."""
        return self.forget.input_ids.numel() + self.retain.input_ids.numel()


def stores(vocabulary: int) -> tuple[TokenStore, TokenStore, str]:
    """Return the forget store, the retain store, and what they are."""
    forget, retain = tofu.FOLDER / f"{FORGET}.json", tofu.FOLDER / f"{RETAIN}.json"
    if not (forget.is_file() and retain.is_file()):
        return _like_tofu(vocabulary, "")
    try:
        return *_tokenised(forget, retain, min(vocabulary, 8192)), f"TOFU {FORGET} / {RETAIN}"
    except ImportError as error:
        return _like_tofu(vocabulary, f" ({error})")


@cache  # on a borrowed machine seconds count
def _tokenised(forget: Path, retain: Path, vocabulary: int) -> tuple[TokenStore, TokenStore]:
    from efface.hf.text.data import token_store  # noqa: PLC0415 - needs datasets, which a borrowed machine may lack

    rows = [[json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in (forget, retain)]
    tokenizer = train_tokenizer([text for part in rows for row in part for text in row.values()], vocabulary)
    return token_store(rows[0], tokenizer, name=FORGET), token_store(rows[1], tokenizer, name=RETAIN)


def _like_tofu(vocabulary: int, why: str) -> tuple[TokenStore, TokenStore, str]:
    forget, retain = synthetic(400, vocabulary, seed=0), synthetic(3600, vocabulary, seed=1)
    return forget, retain, f"synthetic, TOFU's lengths{why}"


def synthetic(sequences: int, vocabulary: int, *, seed: int) -> TokenStore:
    """Random tokens with the lengths of TOFU; answers are 58 % of them."""
    rng = np.random.default_rng(seed)
    lengths = tofu.lengths(rng, sequences)
    rows = [rng.integers(0, vocabulary, length).tolist() for length in lengths]
    return TokenStore.from_sequences(rows, [round(0.42 * length) for length in lengths])


def padded(store: TokenStore, index: list[int]) -> Padded:
    """Collate as open-unlearning does."""
    ids = [torch.from_numpy(store[i].astype(np.int64)) for i in index]
    labels = [row.clone() for row in ids]
    for row, start in zip(labels, store.label_starts[index].tolist(), strict=True):
        row[:start] = -100
    return Padded(
        pad_sequence(ids, batch_first=True, padding_value=0),
        pad_sequence(labels, batch_first=True, padding_value=-100),
        pad_sequence([torch.ones_like(row) for row in ids], batch_first=True, padding_value=0),
    )


def make_steps(
    forget: TokenStore, retain: TokenStore, reference: PreTrainedModel, *, pairs: int, count: int
) -> list[Step]:
    """Return the first ``count`` steps that the trainer would take with seed 0, on the reference's device."""
    plan = plan_epoch(forget.lengths, retain.lengths, pairs_per_step=pairs, token_budget=8192, seed=0, epoch=0)
    assembler, sums = Assembler(plan, (forget, retain)), store_logprobs(reference, forget)
    steps = []
    for number in range(count):
        (batch,), totals = assembler[number].to(reference.device).batches, assembler.totals(number)
        pairs_of_step = [index.tolist() for index in plan.pairs(number)]
        padded_pairs = [
            padded(store, index).to(reference.device)
            for store, index in zip((forget, retain), pairs_of_step, strict=True)
        ]
        steps.append(Step(batch, totals, _reference_sums(sums, batch), *padded_pairs))
    return steps


def _reference_sums(sums: Tensor, batch: PackedBatch) -> Tensor:
    """(S,) on the batch's device: the sums of its forget sequences, 0 for the others."""
    forget = batch.forget_sequences
    own = sums.to(batch.storage.device)
    return torch.cat([own[batch.sequences[:forget]], own.new_zeros(len(batch.lengths) - forget)])
