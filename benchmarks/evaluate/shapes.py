"""The models that the evaluate suite runs: Llamas with random weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Shape:
    """A model, and how many rows of each split it is asked."""

    dtype: torch.dtype
    config: Mapping[str, Any]
    rows: int


_COMMON = {"max_position_embeddings": 512, "tie_word_embeddings": False, "use_cache": False}
_SMOKE = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_TINY = {
    "vocab_size": 8192,
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_MID = {
    "vocab_size": 32000,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
}

SHAPES = {
    "smoke": Shape(torch.float32, _SMOKE, rows=4),
    "Llama 4 layers, d 128, V 8192, fp32": Shape(torch.float32, _TINY, rows=48),
    "Llama 8 layers, d 512, V 32000, fp32": Shape(torch.float32, _MID, rows=16),
    "Llama 8 layers, d 512, V 32000, bf16": Shape(torch.bfloat16, _MID, rows=16),
}


def model_of(shape: Shape, dtype: torch.dtype | None = None) -> LlamaForCausalLM:
    """Return the shape's model with SDPA attention, in evaluation mode; always the same weights."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**_COMMON, **shape.config, attn_implementation="sdpa")).eval()
    torch.nn.Module.to(model, dtype or shape.dtype)
    return model
