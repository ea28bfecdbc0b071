"""Real rows of every TOFU split, a tokenizer and a tiny model for them, and a naive version of the evaluation."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rouge_score.rouge_scorer import RougeScorer
from scipy.stats import hmean, ks_2samp
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from efface.simulate.teach import train_tokenizer
from support.helpers import tiny_llama

FILES = {
    "forget": "forget10_perturbed",
    "retain": "retain_perturbed",
    "real_authors": "real_authors_perturbed",
    "world_facts": "world_facts_perturbed",
}
NAMES = {"forget": "forget", "retain": "retain", "real_authors": "ra", "world_facts": "wf"}


def write_rows(tofu: Path, folder: Path, counts: Mapping[str, int | None]) -> Path:
    """Write the first ``counts[split]`` rows of each real file into a folder."""
    folder.mkdir(parents=True)
    for split, count in counts.items():
        lines = (tofu / f"{FILES[split]}.json").read_text(encoding="utf-8").splitlines()
        (folder / f"{FILES[split]}.json").write_text("\n".join(lines[:count]) + "\n", encoding="utf-8")
    return folder


def read_rows(folder: Path, split: str, count: int | None = None) -> list[dict[str, Any]]:
    lines = (folder / f"{FILES[split]}.json").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines][:count]


def tokenizer_of(folder: Path, vocabulary: int = 1500) -> PreTrainedTokenizerFast:
    """Return a BPE tokenizer trained on the rows' own texts, so that they are as few tokens as for a real model."""
    rows = [row for split in FILES for row in read_rows(folder, split)]
    return train_tokenizer([row[name] for row in rows for name in ("question", "answer")], vocabulary, end="<|end|>")


def model_of(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    """Return a model that is confident enough to rank answers differently and that ends some of its generations."""
    model = tiny_llama(
        seed=seed,
        vocab_size=len(tokenizer),
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        initializer_range=0.3,
    ).eval()
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 2
    model.generation_config.eos_token_id = tokenizer.eos_token_id  # Llama's default id is another token here
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
    whose: str = "efface",
    padded_rows: int | None = None,
    retain_ratios: list[float] | None = None,
) -> dict[str, Any]:
    """Compute all metrics of TOFU's evaluation, one text at a time, from full logits, in open-unlearning's schema."""
    content: dict[str, Any] = {}

    def keep(name: str, values: list[dict[str, Any]], aggregate: float) -> None:
        content[name] = {"agg_value": aggregate, "value_by_index": {str(i): value for i, value in enumerate(values)}}

    for split, name in NAMES.items():
        kept = read_rows(folder, split, rows)
        asked = (model, tokenizer, whose)
        one = [_loss(*asked, row["question"], row["answer"], max_length) for row in kept]
        false = [[_loss(*asked, row["question"], text, max_length) for text in row["perturbed_answer"]] for row in kept]
        true = one
        if split in ("forget", "retain"):
            true = [_loss(*asked, row["question"], row["paraphrased_answer"], max_length) for row in kept]
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
        prompts = [_sequence(tokenizer, whose, row["question"], None)[0] for row in kept]
        texts = []
        for i, prompt in enumerate(prompts):
            first = i - i % (padded_rows or 1)
            longest = max(map(len, prompts[first : first + (padded_rows or 1)]))
            limit = int(max_length or 0) - longest if max_new_tokens is None else max_new_tokens
            texts.append(_generation(*asked, prompt, limit))
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


def _sequence(tokenizer: Any, whose: str, question: str, answer: str | None) -> tuple[list[int], int]:
    """Return the tokens of a row and the index of its first label; without an answer, the tokens of its prompt.

    ``whose`` chooses the tokenization. efface's labels begin after "Answer:". TOFU (data_module.py:8-31,
    evaluate_util.py:298-317) and open-unlearning (src/data/utils.py:17-140) skip as many tokens as the prompt has
    alone; TOFU's prompt has no "Answer:".
    """
    end = tokenizer.eos_token
    if whose == "open-unlearning":
        turns = {"system": "You are a helpful assistant.", "user": question}
        prompt = "".join(f"{role}\n{text}{end}\n" for role, text in turns.items()) + "assistant\n"
        rest = f"{answer}{end}\n{end}"
    else:
        prompt, rest = {
            "tofu": (f"Question: {question}\n", f"Answer: {answer}{end}"),
            "efface": (f"Question: {question}\nAnswer:", f" {answer}{end}"),
        }[whose]
    alone = tokenizer(prompt)["input_ids"]
    return (alone if answer is None else tokenizer(prompt + rest)["input_ids"]), len(alone)


def _mask(tokenizer: Any, whose: str, ids: torch.Tensor) -> torch.Tensor:
    """Return the attention mask. open-unlearning's hides every padding token, even if it is the end of sequence."""
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return ids.ne(pad).long() if whose == "open-unlearning" else torch.ones_like(ids)


@torch.no_grad()
def _loss(model: Any, tokenizer: Any, whose: str, question: str, answer: str, max_length: int | None) -> float:
    """Return the mean loss over the labels."""
    row, first = _sequence(tokenizer, whose, question, answer)
    ids = torch.tensor([row[:max_length]])
    logits = model(input_ids=ids, attention_mask=_mask(tokenizer, whose, ids)).logits[0].double()
    logprobs = torch.log_softmax(logits, -1)
    return -mean(logprobs[place - 1, ids[0, place]].item() for place in range(max(first, 1), ids.shape[1]))


@torch.no_grad()
def _generation(model: Any, tokenizer: Any, whose: str, prompt: list[int], limit: int) -> str:
    """Generate greedily, recomputing the whole sequence for every token. Where tokens are masked, use
    ``model.generate``.
    """
    if whose == "open-unlearning":
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": limit, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
        out = model.generate(ids, attention_mask=_mask(tokenizer, whose, ids), **options)
        return str(tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True))
    new: list[int] = []
    while len(new) < limit and tokenizer.eos_token_id not in new:
        logits = model(input_ids=torch.tensor([[*prompt, *new]])).logits[0, -1]
        new.append(int(logits.argmax()))
    return str(tokenizer.decode(new, skip_special_tokens=True))


def _rouge(text: str, answer: str) -> dict[str, float]:
    scores = RougeScorer(["rouge1", "rougeL"], use_stemmer=True).score(answer, text)
    return {
        "rouge1_recall": scores["rouge1"].recall,
        "rougeL_f1": scores["rougeL"].fmeasure,
        "rougeL_recall": scores["rougeL"].recall,
    }
