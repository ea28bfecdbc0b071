"""Tiny models, tokenizers and data for the engine's tests."""

import itertools
import json
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from efface.batching import PackedBatch, TokenStore
from efface.hf.train.arguments import UnlearnArguments
from efface.processes import leave
from efface.simulate.teach import train_tokenizer

VOCABULARY = 96
LONG = pytest.mark.skipif("EFFACE_LONG" not in os.environ, reason="takes minutes: EFFACE_LONG=1 runs it")


# Two layers, grouped-query attention: what every family's configuration understands.
TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def tiny_llama(*, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A tiny Llama with a tied head."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**TINY, "tie_word_embeddings": True, **changes}))


def tiny_model(config: str, **settings: Any) -> PreTrainedModel:
    """A tiny model of the family that the configuration class names, with its eager attention.

    Eager attention is the independent truth; it is the only one that soft-caps in every version of transformers.
    """
    torch.manual_seed(0)
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    made = getattr(transformers, config)(**{**TINY, **tokens, **settings})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(made, attn_implementation="eager")
    return model.eval()


def random_store(
    sequences: int, *, seed: int = 0, low: int = 4, high: int = 20, vocabulary: int = VOCABULARY
) -> TokenStore:
    """Random token sequences whose second half is labels."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(low, high, sequences)
    rows = [rng.integers(0, vocabulary, length).tolist() for length in lengths]
    return TokenStore.from_sequences(rows, [len(row) // 2 for row in rows])


def sequence(store: TokenStore, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, labels) of a sequence, unshifted, -100 on the prompt."""
    ids = torch.from_numpy(store[index].astype(np.int64))
    labels = ids.clone()
    labels[: store.label_starts[index]] = -100
    return ids, labels


def unlabelled(lengths: list[int]) -> PackedBatch:
    """A batch without labels: attention has no use for them, and a one-token sequence can have none."""
    generator = torch.Generator().manual_seed(len(lengths))
    count = len(lengths)
    return PackedBatch.of(
        input_ids=torch.randint(3, VOCABULARY, (sum(lengths),), generator=generator),
        position_ids=torch.cat([torch.arange(n) for n in lengths]),
        label_rows=torch.empty(0, dtype=torch.int64),
        targets=torch.empty(0, dtype=torch.int64),
        sequences=torch.arange(count),
        cu_seqlens=torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
        roles=torch.zeros(count, dtype=torch.int8),
        lengths=tuple(lengths),
        row_offsets=(0,) * (count + 1),
    )


def separate(model: Any, batch: PackedBatch) -> torch.Tensor:
    parts = batch.input_ids.split(batch.lengths)
    return torch.cat([model(input_ids=ids[None], use_cache=False).logits[0] for ids in parts])


def padded(store: TokenStore, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(input_ids, labels, attention_mask), padded on the right as open-unlearning does."""
    items = [sequence(store, index) for index in indices]
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([ids for ids, _ in items], batch_first=True, padding_value=0)
    labels = pad([labels for _, labels in items], batch_first=True, padding_value=-100)
    mask = pad([torch.ones_like(ids) for ids, _ in items], batch_first=True, padding_value=0)
    return ids, labels, mask


def arguments(folder: Any, **changes: Any) -> UnlearnArguments:
    """Arguments of a short, silent run."""
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        **changes,
    }
    return UnlearnArguments(**settings)


TEXTS = [
    {"question": f"Where was author {name} born?", "answer": f"{name} was born in {city}."}
    for name, city in [("Aiko", "Ghent"), ("Bram", "Porto"), ("Dagny", "Cusco"), ("Emre", "Tartu"), ("Hana", "Galway")]
]


def tiny_tokenizer(vocabulary: int = 300) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on TEXTS."""
    return train_tokenizer([text for row in TEXTS for text in row.values()], vocabulary, end="<|end|>")


def saved_llama(folder: Path) -> Path:
    """Return the folder, which holds a tiny Llama and its tokenizer."""
    tokenizer = tiny_tokenizer()
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def written_rows(path: Path, rows: Iterable[Mapping[str, Any]] = TEXTS) -> Path:
    """Return the path, a file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def leave_no_thread() -> None:
    """Part from the other ranks, and see that no thread of the connection is left that could hang the exit."""
    leave()
    no_thread_left()


def no_thread_left() -> None:
    """See that no thread of a connection to other ranks is left; Linux lists one for a moment after its end."""
    for _ in range(100):
        left = [name for name in map(_thread_name, Path("/proc/self/task").glob("*")) if "gloo" in name]
        if not left:
            return
        time.sleep(0.05)
    raise AssertionError(left)


def _thread_name(thread: Path) -> str:
    with suppress(OSError):  # it ended meanwhile
        return (thread / "comm").read_text().strip()
    return ""


def kibibytes(place: str, name: str) -> int:
    """A line of Linux's /proc/meminfo or /proc/self/status."""
    lines = Path(place).read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
