"""The models of the step suite, with random weights, and the shapes of their steps."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from efface.hf.model.lora import add_lora

_COMMON = {"max_position_embeddings": 512, "tie_word_embeddings": False, "use_cache": False}


@dataclass(frozen=True)
class Shape:
    """A model, and the pairs of a step. Rounds cycle through ``steps`` different steps."""

    dtype: torch.dtype
    config: Mapping[str, Any]
    pairs: int = 8
    steps: int = 8
    checkpointing: bool = False  # of gradients, a layer at a time

    def llama(self) -> LlamaConfig:
        """Return the model's configuration."""
        settings: dict[str, Any] = {**_COMMON, **self.config}
        return LlamaConfig(**settings)


_GPU = "GPU: "
CHECKED_ON_GPU = "GPU: check"
SHAPES = {
    "smoke": Shape(
        torch.float32,
        {
            "vocab_size": 512,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
        pairs=2,
        steps=2,
    ),
    "Llama 8 layers, d 512, V 32000, bf16": Shape(
        torch.bfloat16,
        {
            "vocab_size": 32000,
            "hidden_size": 512,
            "intermediate_size": 1376,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
        },
    ),
    # Checked, not timed: the larger models leave no room for the same in fp32.
    CHECKED_ON_GPU: Shape(
        torch.bfloat16,
        {
            "vocab_size": 32000,
            "hidden_size": 512,
            "intermediate_size": 1376,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
        },
        steps=2,
        checkpointing=True,
    ),
    "GPU: Llama-3.2-1B, bf16": Shape(
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
    "GPU: Llama-2-7B, bf16": Shape(
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
    """Return the shapes that are meant for the device."""
    own = [name for name in SHAPES if name.startswith(_GPU) == (device == "cuda")]
    return [name for name in own if name not in ("smoke", CHECKED_ON_GPU)]


def make_model(shape: Shape, device: str, seed: int, *, lora: bool = False) -> Any:
    """Return a Llama with random weights, made on the device in its own dtype: a 7B takes seconds.

    With ``lora``, within a ``peft.PeftModel`` whose adapters are not zero: the policy differs from its base, as it does
    after a step.
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
    """Return the seed of the second model, the policy's being 0.

    LoRA's reference is its base. For full training it is another model: the log-ratio of policy and reference is not
    zero, so that a check sees it.
    """
    return 0 if lora else 1


def wider(model: Any, dtype: torch.dtype) -> Any:
    """Return a copy in another dtype."""
    return nn.Module.to(copy.deepcopy(model), dtype)
