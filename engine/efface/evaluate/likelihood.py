"""Log-likelihoods of answers, packed: probability and truth ratio of question-answer rows."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from efface.evaluate.logs import FloatArray, SplitLog, truth_ratios
from efface.hf.rows import column
from efface.hf.score import store_logprobs
from efface.hf.templates import AUTO, Template, encode


def answer_logprobs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    answers: Sequence[str],
    *,
    template: str | Template = AUTO,
    token_budget: int = 8192,
) -> FloatArray:
    """Return the mean token log-probability (n,) of each answer, given its question; exp of it is "probability".

    Raises:
        ValueError: as ``encode`` and ``store_logprobs``.
    """
    store = encode(tokenizer, questions, answers, template=template)
    sums = store_logprobs(model, store, token_budget=token_budget).numpy().astype(np.float64)
    return sums / store.label_counts


def score_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    *,
    template: str | Template = AUTO,
    token_budget: int = 8192,
    truth_ratio: bool = True,
) -> SplitLog:
    """Return probability and truth ratio of rows in TOFU's columns.

    Args:
        model: an ``AutoModelForCausalLM``, fused or not.
        tokenizer: its tokenizer.
        rows: with ``question``, ``answer``; for the truth ratio also ``perturbed_answer`` (a list, equally long in
            every row) and ``paraphrased_answer`` (``answer`` where a row has none, as real authors).
        template: see ``efface.hf.templates``.
        token_budget: tokens of a forward pass.
        truth_ratio: False scores the answers alone.

    Raises:
        ValueError: a missing column, or lists of perturbed answers that differ in length.
    """
    questions, answers = column(rows, "question", "rows"), column(rows, "answer", "rows")
    if not truth_ratio:
        logprobs = answer_logprobs(model, tokenizer, questions, answers, template=template, token_budget=token_budget)
        return SplitLog(probability=np.exp(logprobs))

    false_answers = column(rows, "perturbed_answer", "rows")
    count = len(false_answers[0]) if false_answers else 0
    if not count or any(len(row) != count for row in false_answers):
        lengths = sorted({len(row) for row in false_answers})
        raise ValueError(f"`perturbed_answer`: expected lists of one length, at least 1, got lengths {lengths}")
    # One pass over all: answers, then paraphrases, then the false answers row by row.
    texts = [*answers, *(row.get("paraphrased_answer", row["answer"]) for row in rows)]
    prompts = [*questions, *questions]
    for question, candidates in zip(questions, false_answers, strict=True):
        texts.extend(candidates)
        prompts.extend([question] * count)
    logprobs = answer_logprobs(model, tokenizer, prompts, texts, template=template, token_budget=token_budget)
    n = len(questions)
    perturbed = logprobs[2 * n :].reshape(n, count)
    return SplitLog(np.exp(logprobs[:n]), truth_ratios(logprobs[n : 2 * n], perturbed))
