"""Inputs of the step suite: models with random weights, and the pairs of its steps, packed and padded.

The pairs are TOFU's rows if its files exist, otherwise synthetic rows of the same lengths.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.harness.shared import LLAMA, LLAMA_MID, LLAMA_SMOKE, tofu_files, tofu_lengths
from efface.batching import Assembler, PackedBatch, StepTotals, TokenStore, plan_epoch
from efface.hf.model.lora import add_lora
from efface.hf.reference.score import store_logprobs
from efface.simulate.teach import train_tokenizer

FORGET, RETAIN = "forget10", "retain90"


@dataclass(frozen=True)
class StepShape:
    """A model, and the pairs of a step. Rounds cycle through ``steps`` different steps."""

    dtype: torch.dtype
    config: Mapping[str, Any]
    pairs: int = 8
    steps: int = 8
    checkpointing: bool = False  # gradient checkpointing of every layer

    def llama(self) -> LlamaConfig:
        settings: dict[str, Any] = {**LLAMA, **self.config}
        return LlamaConfig(**settings)


_GPU = "GPU: "
CHECKED_ON_GPU = "GPU: check"
SHAPES = {
    "smoke": StepShape(torch.float32, LLAMA_SMOKE, pairs=2, steps=2),
    "Llama 8 layers, d 512, V 32000, bf16": StepShape(torch.bfloat16, LLAMA_MID),
    # Used for the check only: the larger models leave no memory for a copy in fp32.
    CHECKED_ON_GPU: StepShape(torch.bfloat16, {**LLAMA_MID, "num_hidden_layers": 4}, steps=2, checkpointing=True),
    "GPU: Llama-3.2-1B, bf16": StepShape(
        torch.bfloat16,
        {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "tie_word_embeddings": True,
        },
        checkpointing=True,
    ),
    "GPU: Llama-2-7B, bf16": StepShape(
        torch.bfloat16,
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
        },
        checkpointing=True,
    ),
}


def timed_on(device: str) -> list[str]:
    own = [name for name in SHAPES if name.startswith(_GPU) == (device == "cuda")]
    return [name for name in own if name not in ("smoke", CHECKED_ON_GPU)]


def make_model(shape: StepShape, device: str, seed: int, *, lora: bool = False) -> Any:
    """Return a Llama with random weights, created on the device in its own dtype, so that a 7B takes seconds.

    With ``lora``, the model is a ``peft.PeftModel`` with nonzero adapters, so that the policy differs from its base, as
    it does after a step.
    """
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(shape.dtype)
    try:
        with torch.device(device):
            model: Any = LlamaForCausalLM(shape.llama())
    finally:
        torch.set_default_dtype(before)
    model.set_attn_implementation("sdpa")
    if lora:
        model = add_lora(model, r=8)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight, std=0.02)
    if shape.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def reference_seed(*, lora: bool) -> int:
    """Return the seed of the reference model; the policy's seed is 0.

    LoRA's reference is its base. In full training it is another model, so that the log-ratio of policy and reference is
    not zero and the check covers it.
    """
    return 0 if lora else 1


def wider(model: Any, dtype: torch.dtype) -> Any:
    """Return a copy in another dtype."""
    return nn.Module.to(copy.deepcopy(model), dtype)


@dataclass(frozen=True)
class PaddedBatch:
    """Sequences of one role, padded on the right to the longest of them: (B, T) each."""

    input_ids: Tensor
    labels: Tensor  # -100 on prompts and padding
    attention_mask: Tensor

    def to(self, device: torch.device) -> "PaddedBatch":
        return PaddedBatch(self.input_ids.to(device), self.labels.to(device), self.attention_mask.to(device))


@dataclass(frozen=True)
class Step:
    """The pairs of one step, packed and padded. They are assembled before the timing."""

    batch: PackedBatch
    totals: StepTotals
    reference_sums: Tensor  # (S,) as ``CachedReference.sums`` returns them to the trainer; 0 for retain sequences
    forget: PaddedBatch
    retain: PaddedBatch

    @property
    def padded_tokens(self) -> int:
        """Tokens that the padded forward passes of the policy read. The packed one reads ``batch.tokens``."""
        return self.forget.input_ids.numel() + self.retain.input_ids.numel()


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

    rows = [[json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in (forget, retain)]
    tokenizer = train_tokenizer([text for part in rows for row in part for text in row.values()], vocabulary)
    return token_store(rows[0], tokenizer, name=FORGET), token_store(rows[1], tokenizer, name=RETAIN)


def _like_tofu(vocabulary: int, why: str) -> tuple[TokenStore, TokenStore, str]:
    forget, retain = synthetic(400, vocabulary, seed=0), synthetic(3600, vocabulary, seed=1)
    return forget, retain, f"synthetic, TOFU's lengths{why}"


def synthetic(sequences: int, vocabulary: int, *, seed: int) -> TokenStore:
    """Return random tokens with TOFU's lengths; answers are 58 % of them."""
    rng = np.random.default_rng(seed)
    lengths = tofu_lengths(rng, sequences)
    rows = [rng.integers(0, vocabulary, length).tolist() for length in lengths]
    return TokenStore.from_sequences(rows, [round(0.42 * length) for length in lengths])


def padded(store: TokenStore, index: list[int]) -> PaddedBatch:
    """Collate sequences as open-unlearning does."""
    ids = [torch.from_numpy(store[i].astype(np.int64)) for i in index]
    labels = [row.clone() for row in ids]
    for row, start in zip(labels, store.label_starts[index].tolist(), strict=True):
        row[:start] = -100
    return PaddedBatch(
        pad_sequence(ids, batch_first=True, padding_value=0),
        pad_sequence(labels, batch_first=True, padding_value=-100),
        pad_sequence([torch.ones_like(row) for row in ids], batch_first=True, padding_value=0),
    )


def make_steps(
    forget: TokenStore, retain: TokenStore, reference: PreTrainedModel, *, pairs: int, count: int
) -> list[Step]:
    """Return the trainer's first ``count`` steps with seed 0, on the reference's device."""
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
    """Return (S,) on the batch's device: the sums of its forget sequences, 0 for the others."""
    forget = batch.forget_sequences
    own = sums.to(batch.storage.device)
    return torch.cat([own[batch.sequences[:forget]], own.new_zeros(len(batch.lengths) - forget)])
