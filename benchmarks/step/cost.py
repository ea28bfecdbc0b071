"""What a step must compute, and what a GPU could: model FLOP utilisation."""

import re

from transformers import LlamaConfig

from benchmarks.step.data import Step

# Dense bf16 tensor-core FLOP/s from NVIDIA's data sheets (SXM), by what the device's name contains.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}


def peak_flops(device_name: str) -> float | None:
    """Return the dense bf16 FLOP/s that the maker states, None for a device that is not listed."""
    return next((peak for name, peak in PEAKS.items() if name in device_name), None)


def layer_parameters(config: LlamaConfig) -> int:
    """Weights of all matrices of the decoder's layers; embeddings and the head are not among them."""
    d, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
    attention = 2 * d * config.num_attention_heads * config.head_dim + 2 * d * kv
    return int(config.num_hidden_layers * (attention + 3 * d * config.intermediate_size))


def model_flop(config: LlamaConfig, step: Step, *, lora: bool, reference: str) -> float:
    """FLOP that the step needs: 2 a weight and token forward, twice that backward.

    With P weights in the layers, T real tokens and N label rows, all of them of forget and retain, and a reference
    model on the T_f and N_f of forget: 6 P T + 6 V D N + 2 P T_f + 2 V D N_f. A cached reference is free; LoRA's
    backward pass has no gradients of frozen weights, 4 instead of 6. Not counted, as for everybody: padding, prompt
    rows in the head, layers run again by gradient checkpointing, attention scores and adapters (below 1 % each at
    these lengths).
    """
    layers, head = layer_parameters(config), config.vocab_size * config.hidden_size
    batch = step.batch
    forget = batch.forget_part()
    own = layers * batch.tokens + head * len(batch.targets)
    compared = layers * forget.tokens + head * len(forget.targets)
    return (4 if lora else 6) * own + (0 if reference == "cached" else 2) * compared


def asked_for(message: str) -> str:
    """Return the size that torch's "out of memory" message names, or "an unknown size"."""
    found = re.search(r"[Tt]ried to allocate ([\d.]+ [KMGT]iB)", message)
    return found.group(1) if found else "an unknown size"
