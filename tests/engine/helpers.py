"""Tiny models, tokenizers and data for the engine's tests."""

from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from efface.batching import TokenStore
from efface.hf.arguments import UnlearnArguments

VOCABULARY = 96


def tiny_llama(*, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """Two layers, grouped-query attention, tied head."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        **changes,
    }
    return LlamaForCausalLM(LlamaConfig(**settings))


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
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text for row in TEXTS for text in row.values()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
