"""A few real rows of every TOFU split, a tokenizer and a tiny model for them, and the evaluation done naively."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers import tiny_llama
from rouge_score.rouge_scorer import RougeScorer
from scipy.stats import hmean, ks_2samp
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from efface.cli.demo.tokenizer import train_tokenizer

FILES = {
    "forget": "forget10_perturbed",
    "retain": "retain_perturbed",
    "real_authors": "real_authors_perturbed",
    "world_facts": "world_facts_perturbed",
}
NAMES = {"forget": "forget", "retain": "retain", "real_authors": "ra", "world_facts": "wf"}


def write_rows(tofu: Path, folder: Path, counts: Mapping[str, int | None]) -> Path:
    """Write the first rows of the real files, so many of each split, into a folder."""
    folder.mkdir(parents=True)
    for split, count in counts.items():
        lines = (tofu / f"{FILES[split]}.json").read_text(encoding="utf-8").splitlines()
        (folder / f"{FILES[split]}.json").write_text("\n".join(lines[:count]) + "\n", encoding="utf-8")
    return folder


def read_rows(folder: Path, split: str, count: int | None = None) -> list[dict[str, Any]]:
    lines = (folder / f"{FILES[split]}.json").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines][:count]


def tokenizer_of(folder: Path, vocabulary: int = 1500) -> PreTrainedTokenizerFast:
    """A BPE tokenizer of the rows' own texts: they become few tokens, as they do for a real model."""
    rows = [row for split in FILES for row in read_rows(folder, split)]
    return train_tokenizer([row[name] for row in rows for name in ("question", "answer")], vocabulary, end="<|end|>")


def model_of(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    """A model that is sure enough of something to tell answers apart, and ends some of its generations."""
    model = tiny_llama(
        seed=seed,
        vocab_size=len(tokenizer),
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        initializer_range=0.3,
    ).eval()
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 2
    model.generation_config.eos_token_id = tokenizer.eos_token_id  # Llama's own would be another token here
    return model


def naive(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    *,
    rows: int | None = None,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
    epsilon: float = 0.0,
    retain_ratios: list[float] | None = None,
) -> dict[str, Any]:
    """Every number of TOFU's evaluation, one text at a time, from full logits; in open-unlearning's schema."""
    content: dict[str, Any] = {}

    def keep(name: str, values: list[dict[str, Any]], aggregate: float) -> None:
        content[name] = {"agg_value": aggregate, "value_by_index": {str(i): value for i, value in enumerate(values)}}

    for split, name in NAMES.items():
        kept = read_rows(folder, split, rows)
        one = [_loss(model, tokenizer, row["question"], row["answer"], max_length) for row in kept]
        false = [
            [_loss(model, tokenizer, row["question"], text, max_length) for text in row["perturbed_answer"]]
            for row in kept
        ]
        true = one
        if split in ("forget", "retain"):
            true = [_loss(model, tokenizer, row["question"], row["paraphrased_answer"], max_length) for row in kept]
            keep(
                f"{name}_Q_A_PARA_Prob",
                [{"prob": math.exp(-x), "avg_loss": x} for x in true],
                mean(math.exp(-x) for x in true),
            )
        keep(f"{name}_Q_A_Prob", [{"prob": math.exp(-x), "avg_loss": x} for x in one], mean(math.exp(-x) for x in one))
        keep(
            f"{name}_Q_A_PERT_Prob",
            [{"prob": [math.exp(-x) for x in xs], "avg_loss": xs} for xs in false],
            mean(mean(math.exp(-x) for x in xs) for xs in false),
        )
        ratios = [math.exp(-mean(xs)) / (math.exp(-x) + epsilon) for x, xs in zip(true, false, strict=True)]
        if split == "forget":
            keep("forget_truth_ratio", [{"score": r} for r in ratios], mean(min(r, 1 / (r + epsilon)) for r in ratios))
        else:
            keep(f"{name}_Truth_Ratio", [{"score": r} for r in ratios], mean(max(0, 1 - r) for r in ratios))
        if split in ("real_authors", "world_facts"):
            shares = [
                math.exp(-x) / (math.exp(-x) + sum(math.exp(-y) for y in ys) + epsilon)
                for x, ys in zip(one, false, strict=True)
            ]
            keep(f"{name}_Q_A_Prob_normalised", [{"prob": share} for share in shares], mean(shares))
        texts = [_generation(model, tokenizer, row["question"], max_length, max_new_tokens) for row in kept]
        scores = [
            {**_rouge(text, row["answer"]), "generation": text.strip(), "ground_truth": row["answer"]}
            for row, text in zip(kept, texts, strict=True)
        ]
        keep(f"{name}_Q_A_ROUGE", scores, mean(score["rougeL_recall"] for score in scores))
    utility = [
        content[f"{name}_{metric}"]["agg_value"]
        for name, probability in (("retain", "Q_A_Prob"), ("ra", "Q_A_Prob_normalised"), ("wf", "Q_A_Prob_normalised"))
        for metric in (probability, "Q_A_ROUGE", "Truth_Ratio")
    ]
    content["model_utility"] = {"agg_value": float(hmean(utility))}
    judged = [row["score"] for row in content["forget_truth_ratio"]["value_by_index"].values()]
    quality = None if retain_ratios is None else float(ks_2samp(judged, retain_ratios).pvalue)
    content["forget_quality"] = {"agg_value": quality}
    return content


def mean(values: Any) -> float:
    return float(np.mean(list(values)))


@torch.no_grad()
def _loss(model: Any, tokenizer: Any, question: str, answer: str, max_length: int | None) -> float:
    """Mean loss over the tokens behind "Answer:", and the end of sequence."""
    prompt = f"Question: {question}\nAnswer:"
    encoded = tokenizer(f"{prompt} {answer}{tokenizer.eos_token}", return_offsets_mapping=True)
    ids = torch.tensor([encoded["input_ids"][:max_length]])
    logprobs = torch.log_softmax(model(input_ids=ids).logits[0].double(), -1)
    ends = [end for _, end in encoded["offset_mapping"][:max_length]]
    return -mean(
        logprobs[place - 1, ids[0, place]].item() for place, end in enumerate(ends) if end > len(prompt) and place
    )


@torch.no_grad()
def _generation(model: Any, tokenizer: Any, question: str, max_length: int | None, max_new_tokens: int | None) -> str:
    """Greedy, the whole sequence anew for every token, from the tokens of the question and "Answer:"."""
    ids = tokenizer(f"Question: {question}\nAnswer:")["input_ids"]
    limit = len(ids) + max_new_tokens if max_new_tokens is not None else int(max_length or 0)
    new: list[int] = []
    while len(ids) + len(new) < limit and tokenizer.eos_token_id not in new:
        logits = model(input_ids=torch.tensor([[*ids, *new]])).logits[0, -1]
        new.append(int(logits.argmax()))
    return str(tokenizer.decode(new, skip_special_tokens=True))


def _rouge(text: str, answer: str) -> dict[str, float]:
    scores = RougeScorer(["rouge1", "rougeL"], use_stemmer=True).score(answer, text)
    return {
        "rouge1_recall": scores["rouge1"].recall,
        "rougeL_f1": scores["rougeL"].fmeasure,
        "rougeL_recall": scores["rougeL"].recall,
    }
