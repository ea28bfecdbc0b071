"""Tiny models of every supported class, tokenizers and data for the engine's tests."""

import inspect
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
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from efface.batching import PackedBatch, TokenStore
from efface.hf.train.arguments import UnlearnArguments
from efface.processes import leave
from efface.simulate.teach import train_tokenizer

VOCABULARY = 96
LONG = pytest.mark.skipif("EFFACE_LONG" not in os.environ, reason="takes minutes; set EFFACE_LONG=1 to run it")


# Two layers and grouped-query attention, in settings that the configurations of all families accept.
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
    """Return a tiny Llama with a tied head."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**TINY, "tie_word_embeddings": True, **changes}))


def tiny_model(config: str, **settings: Any) -> PreTrainedModel:
    """Return a tiny model of the given configuration class, with its own eager attention.

    Eager attention is the independent baseline: no other implementation applies the attention soft-cap in every version
    of transformers.
    """
    torch.manual_seed(0)
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    made = getattr(transformers, config)(**{**TINY, **tokens, **settings})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(made, attn_implementation="eager")
    return model.eval()


def random_store(
    sequences: int, *, seed: int = 0, low: int = 4, high: int = 20, vocabulary: int = VOCABULARY
) -> TokenStore:
    """Return random token sequences; the second half of each is labels."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(low, high, sequences)
    rows = [rng.integers(0, vocabulary, length).tolist() for length in lengths]
    return TokenStore.from_sequences(rows, [len(row) // 2 for row in rows])


def sequence(store: TokenStore, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (input_ids, labels) of a sequence, not shifted, with -100 on the prompt."""
    ids = torch.from_numpy(store[index].astype(np.int64))
    labels = ids.clone()
    labels[: store.label_starts[index]] = -100
    return ids, labels


def unlabelled(lengths: list[int]) -> PackedBatch:
    """Return a batch without labels: attention does not need them, and a one-token sequence cannot have any."""
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
    """Return (input_ids, labels, attention_mask), padded on the right as open-unlearning does."""
    items = [sequence(store, index) for index in indices]
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([ids for ids, _ in items], batch_first=True, padding_value=0)
    labels = pad([labels for _, labels in items], batch_first=True, padding_value=-100)
    mask = pad([torch.ones_like(ids) for ids, _ in items], batch_first=True, padding_value=0)
    return ids, labels, mask


def arguments(folder: Any, **changes: Any) -> UnlearnArguments:
    """Return the arguments of a short run without output."""
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
CHAT_TEXTS = [
    {**row, "question": f"You answer questions about authors who do not exist, in one sentence. {row['question']}"}
    for row in TEXTS
]
"""The same with a system prompt; in tiny_tokenizer's tokens, sequences have 86 to 94 tokens, or so."""


def tiny_tokenizer(vocabulary: int = 300) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained on TEXTS."""
    return train_tokenizer([text for row in TEXTS for text in row.values()], vocabulary, end="<|end|>")


def saved_llama(folder: Path, **changes: Any) -> Path:
    """Save a tiny Llama and its tokenizer in ``folder`` and return the folder."""
    tokenizer = tiny_tokenizer()
    tiny_llama(vocab_size=len(tokenizer), **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def written_rows(path: Path, rows: Iterable[Mapping[str, Any]] = TEXTS) -> Path:
    """Write ``rows`` as JSON lines and return the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def leave_no_thread() -> None:
    """Leave the process group and assert that no thread of the connection remains that could hang the exit."""
    leave()
    no_thread_left()


def no_thread_left() -> None:
    """Assert that no thread of a connection to other ranks remains; Linux briefly lists an ended thread."""
    for _ in range(100):
        left = [name for name in map(_thread_name, Path("/proc/self/task").glob("*")) if "gloo" in name]
        if not left:
            return
        time.sleep(0.05)
    raise AssertionError(left)


def _thread_name(thread: Path) -> str:
    with suppress(OSError):  # the thread has ended meanwhile
        return (thread / "comm").read_text().strip()
    return ""


def kibibytes(place: str, name: str) -> int:
    """Return a value of Linux's /proc/meminfo or /proc/self/status, in KiB."""
    lines = Path(place).read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


# ---- tiny models of every class of AutoModelForCausalLM, with weights that expose leaks between sequences


# Sizes under every name that configurations use; each configuration gets the names that it accepts.
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "d_ff", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "attention_heads", "n_heads", "decoder_attention_heads"), 4),
    "encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 64),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "state_size": 8,
    "sliding_window": 8,
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
}
# Settings that override or extend SIZES for some model types. None leaves a setting at its default.
ODD: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "deepseek_v2", "deepseek_v3", "deepseek_v32", "longcat_flash", "youtu"), _LATENT),
    **dict.fromkeys(("glm4_moe_lite", "glm_moe_dsa"), _LATENT),
    "axk2": {"num_key_value_heads": 4},
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 4},
    "dots1": {"num_key_value_heads": 4, "n_shared_experts": 1, "routed_scaling_factor": 1.0},
    "gemma4_text": {"vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 32},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "jamba": {"use_mamba_kernels": False},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "minicpm3": {"num_key_value_heads": 4},
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 32},
    "roc_bert": {"pronunciation_vocab_size": 8, "shape_vocab_size": 8},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"], "n_mamba_heads": 1},
    "zamba2": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"], "mamba_headdim": 8},
    "zaya": {"num_experts_per_tok": 1},
}

NOT_BUILT: dict[str, str] = {
    **dict.fromkeys(
        (
            "blt",
            "emu3",
            "fuyu",
            "gemma3",
            "gemma3n",
            "gemma4",
            "gemma4_unified",
            "git",
            "got_ocr2",
            "llama4",
            "mllama",
            "moss_transcribe_diarize",
            "musicgen",
            "musicgen_melody",
            "phi4_multimodal",
            "qwen3_5",
            "qwen3_5_moe",
            "qwen4_exp",
        ),
        "a configuration of several models (images, sound, bytes); a text model in it is listed separately",
    ),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), "a draft model that reads another model's cache"),
    **dict.fromkeys(
        ("dots3_note", "dots3_note_text", "cohere_compass_text", "dbrx"), "sizes that depend on each other"
    ),
    **dict.fromkeys(("axk1", "gemma3n_text", "reformer", "zamba"), "sizes that depend on each other"),
}
"""Model types of transformers 5.23 without a tiny model here, each with the reason."""


def tiny_decoder(kind: str, **changes: Any) -> PreTrainedModel:
    """Return a perturbed tiny model of a ``model_type`` with its eager attention, in evaluation mode."""
    config = CONFIG_MAPPING[kind]
    renamed = getattr(config, "attribute_map", {})
    known = {*inspect.signature(config.__init__).parameters, *config().to_dict(), *renamed}
    settings = {name: size for name, size in SIZES.items() if name in known and renamed.get(name) not in SIZES}
    settings |= {**ODD.get(kind, {}), **changes}
    torch.manual_seed(0)
    made = config(**{name: value for name, value in settings.items() if value is not None})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(made, attn_implementation="eager")
    return perturbed(model.eval())


@torch.no_grad()
def perturbed(model: PreTrainedModel) -> PreTrainedModel:
    """Add noise to every weight.

    New weights attend to all tokens alike, and new biases and gates are zero.
    """
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        if weight.is_floating_point():
            weight.add_(torch.randn(weight.shape, generator=generator).to(weight) * 0.05)
    return model


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama-2, own head": ("LlamaConfig", {"tie_word_embeddings": False}),
    "Llama-3.2, tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "Phi-1.5, biased head": ("PhiConfig", {"num_key_value_heads": 4}),
    "Mistral, sliding window": ("MistralConfig", {"sliding_window": 5}),
    "Qwen2, tied": ("Qwen2Config", {"tie_word_embeddings": True}),
    "Qwen3": ("Qwen3Config", {"head_dim": 8}),
    "OLMo-2": ("Olmo2Config", {}),
    "GPT-NeoX": ("GPTNeoXConfig", {"num_key_value_heads": 4, "hidden_act": "gelu"}),
    "Granite, scaled logits": ("GraniteConfig", {"logits_scaling": 8.0, "embedding_multiplier": 3.0}),
    "Cohere, scaled logits": ("CohereConfig", {"logit_scale": 0.25}),
    "Gemma-2, soft-capped head": (
        "Gemma2Config",
        {"head_dim": 8, "final_logit_softcapping": 3.0, "attn_logit_softcapping": None, "sliding_window": 6},
    ),
    "Gemma-2, soft-capped scores": (
        "Gemma2Config",
        {"head_dim": 8, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0, "sliding_window": 6},
    ),
}
