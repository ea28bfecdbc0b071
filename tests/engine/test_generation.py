"""Generated answers against ``model.generate``, one row at a time."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TEXTS, tiny_model, tiny_tokenizer
from transformers import GenerationConfig

from efface.evaluate import GenerationTask, Sampling
from efface.evaluate import decoding, generation
from efface.evaluate.sampling import draw, uniforms
from efface.evaluate.task import RowResult
from efface.hf.head import fuse
from efface.hf.templates import prompt_ids

QUESTIONS = [row["question"] for row in TEXTS] + [
    "Who?",
    "And where was the author Bram of Porto born, if at all? " * 3,
]
TOKENIZER = tiny_tokenizer()
ENDS = (TOKENIZER.eos_token_id, *range(7, len(TOKENIZER), 9))
FAMILIES = {
    "LlamaConfig": {"tie_word_embeddings": True},
    "PhiConfig": {"partial_rotary_factor": 0.5},
    "Gemma2Config": {"head_dim": 8, "sliding_window": 24, "query_pre_attn_scalar": 8, "tie_word_embeddings": False},
    "Qwen2Config": {},
    "MistralConfig": {"sliding_window": 24},
    "GPTNeoXConfig": {},
}


def model_of(config: str = "LlamaConfig", **settings: Any) -> Any:
    """A model that says many things, as its weights are large; one token in nine ends an answer."""
    made = {"vocab_size": len(TOKENIZER), "max_position_embeddings": 256, "initializer_range": 0.3}
    model = tiny_model(config, **{**made, **FAMILIES[config], **settings})
    model.generation_config = GenerationConfig(eos_token_id=list(ENDS[1:]), pad_token_id=0)
    return model


def one_at_a_time(model: Any, prompts: list[list[int]], limits: list[int]) -> list[RowResult]:
    results = []
    for prompt, limit in zip(prompts, limits, strict=True):
        out = model.generate(
            torch.tensor([prompt]), do_sample=False, eos_token_id=list(ENDS), max_new_tokens=limit, use_cache=True
        )
        new = out[0, len(prompt) :].tolist()
        end = next((i for i, token in enumerate(new) if token in ENDS), None)
        text = TOKENIZER.decode(new[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
        results.append({"text": text, "tokens": len(new[:end]), "ended": end is not None})
    return results


def run(task: GenerationTask, model: Any) -> list[RowResult]:
    results: dict[int, RowResult] = {}
    for batch in task.batches:
        results.update(zip(batch.tolist(), task.run(model, batch), strict=True))
    assert sorted(results) == list(range(len(task.keys)))
    return [results[row] for row in range(len(results))]


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("config", FAMILIES)
def test_answers_are_those_of_generate_one_row_at_a_time(config: str, fused: bool) -> None:
    model = model_of(config)
    prompts = prompt_ids(TOKENIZER, QUESTIONS)
    expected = one_at_a_time(model, prompts, [40] * len(prompts))
    assert len({result["tokens"] for result in expected}) > 2  # they end at different lengths
    if fused:
        fuse(model)
    task = GenerationTask(TOKENIZER, QUESTIONS, max_new_tokens=40)
    assert len(task.batches) == 1
    assert run(task, model) == expected
