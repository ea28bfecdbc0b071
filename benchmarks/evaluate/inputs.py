"""Inputs of the evaluate suite: Llamas with random weights, and questions with answers to score.

They come from TOFU's evaluation files if those exist, otherwise from synthetic rows.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.harness.shared import LLAMA, LLAMA_MID, LLAMA_SMOKE, tofu_files
from efface.simulate.teach import train_tokenizer

SPLITS = ("forget10_perturbed", "retain_perturbed", "real_authors_perturbed", "world_facts_perturbed")


@dataclass(frozen=True)
class EvaluateShape:
    """A model, and the number of rows of each split."""

    dtype: torch.dtype
    config: Mapping[str, Any]
    rows: int


_TINY = {
    "vocab_size": 8192,
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SHAPES = {
    "smoke": EvaluateShape(torch.float32, LLAMA_SMOKE, rows=4),
    "Llama 4 layers, d 128, V 8192, fp32": EvaluateShape(torch.float32, _TINY, rows=48),
    "Llama 8 layers, d 512, V 32000, fp32": EvaluateShape(torch.float32, LLAMA_MID, rows=16),
    "Llama 8 layers, d 512, V 32000, bf16": EvaluateShape(torch.bfloat16, LLAMA_MID, rows=16),
}


def model_of(shape: EvaluateShape, dtype: torch.dtype | None = None) -> LlamaForCausalLM:
    """Return the shape's model with SDPA attention, in evaluation mode. The weights are the same every time."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {**LLAMA, **shape.config, "attn_implementation": "sdpa"}
    model: LlamaForCausalLM = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    torch.nn.Module.to(model, dtype or shape.dtype)
    return model


@dataclass(frozen=True)
class Split:
    """The rows of a file; each row's answers are the correct one, its paraphrase if any, then the false ones."""

    name: str
    questions: list[str]
    answers: list[list[str]]


def splits(rows: int) -> tuple[list[Split], str]:
    """Return ``rows`` evenly spaced rows of each split, and a description of them."""
    files = tofu_files(*SPLITS)
    if not files:
        return [_made_up(name, rows) for name in SPLITS], "made up"
    return [_read(file, rows) for file in files], f"TOFU {', '.join(SPLITS)}"


def tokenizer_of(data: list[Split], vocabulary: int) -> PreTrainedTokenizerFast:
    return train_tokenizer(_texts(data), min(vocabulary, 8192))


def _texts(data: list[Split]) -> Iterator[str]:
    for split in data:
        yield from split.questions
        yield from chain.from_iterable(split.answers)


def _read(file: Path, count: int) -> Split:
    lines = file.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[:: len(lines) // count][:count]]
    names = ("answer", "paraphrased_answer")
    answers = [[*(row[name] for name in names if name in row), *row["perturbed_answer"]] for row in rows]
    return Split(file.stem, [row["question"] for row in rows], answers)


def _made_up(name: str, rows: int) -> Split:
    questions = [f"What is the title of book {row} in {name}?" for row in range(rows)]
    ends = ("a river", "the hill", "a town by the sea", "the long and quiet years before the flood")
    answers = [[f"The title of book {row} is {end}." for end in ends] for row in range(rows)]
    return Split(name, questions, answers)
