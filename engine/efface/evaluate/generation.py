"""Generation of answers, greedy or sampled, and their ROUGE scores against a reference.

Both protocols of TOFU use greedy answers. Prompts are sorted by length and batched by a budget of tokens.
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rouge_score.rouge_scorer import RougeScorer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from efface.evaluate.decoding import Answer, Sampling, decode, draw, end_ids, generate, has_selectable_cache, uniforms
from efface.evaluate.runner import NotFiniteError, RowResult, Task
from efface.hf.model.adapted_head import base_of
from efface.hf.model.supported import undisturbed
from efface.hf.text.templates import AUTO, Conversation, Template, prompt_ids
from efface.hf.text.token_cache import tokenizer_digest

_NEW_TOKENS = 200  # open-unlearning's limit; TOFU's limit is 200 tokens including the prompt


class GenerationTask(Task):
    """A ``Task`` that generates a model's answers to questions, or to chats that end with a question.

    Greedy answers equal those of ``model.generate(do_sample=False)`` on one row at a time, up to rounding. Of the
    model's generation_config only the end tokens are used: no repetition penalty, minimum length or suppressed tokens,
    because the protocols define plain greedy decoding. The tokenizer's end-of-sequence token ends an answer too, since
    training ends answers with it.

    A row's result is ``{"text": str, "tokens": int, "ended": bool}``: the answer, stripped and without special tokens;
    its number of tokens without the end token; and whether it ended before the limit. With ``sampling`` the result is
    ``{"texts": [...], "tokens": [...], "ended": [...]}``, with n entries in each list.

    Args:
        tokenizer: see ``prompt_ids``.
        questions: one question or chat per row; see ``prompt_ids``.
        template: see ``prompt_ids``.
        max_new_tokens: maximum tokens of an answer. None means 200, unless ``max_length`` is given.
        max_length: maximum tokens of prompt and answer together. It replaces ``max_new_tokens``.
        padded_rows: count each prompt as long as the longest of its group of so many consecutive rows, as a limit on
            padded batches does. None counts the prompt's own tokens.
        hidden: a token id that the attention mask hides in prompts, as happens where the mask is built by comparing
            tokens with the padding token. None hides nothing.
        token_budget: maximum tokens of a batch, counting every answer at its limit. A single row may exceed it.
        sampling: how to draw answers; None generates the greedy answer.
        name: used in messages and progress.

    Raises:
        ValueError: as ``prompt_ids``; both limits are given, or one is below 1; a prompt fills ``max_length``, so that
            no token is left for the answer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        questions: Sequence[Conversation],
        *,
        template: str | Template = AUTO,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        padded_rows: int | None = None,
        hidden: int | None = None,
        token_budget: int = 16384,
        sampling: Sampling | None = None,
        name: str = "generation",
    ) -> None:
        self.name = name
        self._tokenizer, self._sampling, self._hidden = tokenizer, sampling, hidden
        self._prompts = prompt_ids(tokenizer, questions, template=template)
        lengths = np.array([len(prompt) for prompt in self._prompts], dtype=np.int64)
        self._limits = _limits(_padded(lengths, padded_rows), max_new_tokens, max_length)
        self.batches = _batches(lengths, self._limits, token_budget, 1 if sampling is None else sampling.n)
        settings = [tokenizer_digest(tokenizer), None if sampling is None else asdict(sampling)]
        self.keys = [
            _digest("generation", *settings, limit, prompt, *([] if hidden is None else [hidden]))
            for limit, prompt in zip(self._limits.tolist(), self._prompts, strict=True)
        ]

    def run(self, model: PreTrainedModel, rows: NDArray[np.int64]) -> list[RowResult]:
        """Generate the answers of one batch.

        Raises:
            ValueError: neither tokenizer nor model defines an end token; a prompt and its answer could exceed the
                model's positions; a prompt has tokens outside the vocabulary; or ``sampling`` is used with a model
                whose cache cannot be repeated.
            NotFiniteError: the model's logits are NaN or infinite.
        """
        base = base_of(model)
        prompts, limits = [self._prompts[row] for row in rows], self._limits[rows].tolist()
        ends = end_ids(base, self._tokenizer)
        self._check(base, rows)
        with undisturbed(base):
            if self._sampling is not None:
                answers = self._sampled(base, rows, ends, self._sampling)
            elif has_selectable_cache(base):
                answers = decode(base, prompts, limits, ends, hidden=self._hidden)
            else:
                answers = generate(base, prompts, limits, ends, hidden=self._hidden)
        n = len(answers) // len(rows)
        for row, answer in zip(np.repeat(rows, n).tolist(), answers, strict=True):
            if not answer.finite:
                raise NotFiniteError(
                    f"{self.name}: expected finite logits, got NaN or infinity in row {row} after "
                    f"{len(answer.ids)} tokens; check the weights, or use bfloat16 if float16 overflows"
                )
        texts = self._texts(answers)
        if self._sampling is None:
            return [
                {"text": text, "tokens": len(answer.ids), "ended": answer.ended}
                for text, answer in zip(texts, answers, strict=True)
            ]
        return [
            {
                "texts": texts[first : first + n],
                "tokens": [len(answer.ids) for answer in answers[first : first + n]],
                "ended": [answer.ended for answer in answers[first : first + n]],
            }
            for first in range(0, len(answers), n)
        ]

    def _sampled(
        self, model: PreTrainedModel, rows: NDArray[np.int64], ends: Sequence[int], sampling: Sampling
    ) -> list[Answer]:
        if not has_selectable_cache(model):
            raise ValueError(
                f"{self.name}: expected a model whose cache can be repeated for samples, got {type(model).__name__}, "
                "which has another kind of state; use greedy answers"
            )
        prompts, limits = [self._prompts[row] for row in rows], self._limits[rows].tolist()
        numbers = [uniforms(sampling, np.asarray(prompt, dtype=np.int64).tobytes(), max(limits)) for prompt in prompts]
        chances = torch.from_numpy(np.concatenate(numbers)).to(model.device)  # (rows * n, tokens)

        def pick(logits: Tensor, answers: Tensor, step: int) -> Tensor:
            return draw(logits, chances[answers, step], sampling)

        return decode(model, prompts, limits, ends, pick=pick, repeats=sampling.n, hidden=self._hidden)

    def _texts(self, answers: Sequence[Answer]) -> list[str]:
        # As open-unlearning's eval_text_similarity, except that it removes spaces before punctuation. ROUGE ignores
        # both, and transformers 5 no longer cleans up the text of byte-pair tokenizers.
        texts = self._tokenizer.batch_decode(
            [answer.ids for answer in answers], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return [text.strip() for text in texts]

    def _check(self, model: PreTrainedModel, rows: NDArray[np.int64]) -> None:
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        embeddings: Any = model.get_input_embeddings()
        vocabulary = embeddings.weight.shape[0]
        for row in rows.tolist():
            length = len(self._prompts[row]) + int(self._limits[row])
            if positions is not None and length > positions > 0:
                raise ValueError(
                    f"{self.name}: expected prompts and answers of at most {positions} tokens (the model's positions), "
                    f"got {length} in row {row}, of which {int(self._limits[row])} are for the answer; lower the limit"
                )
            if max(self._prompts[row]) >= vocabulary:
                raise ValueError(
                    f"{self.name}: expected token ids below {vocabulary} (the model's vocabulary), got "
                    f"{max(self._prompts[row])} in row {row}; use the model's own tokenizer"
                )


def _padded(lengths: NDArray[np.int64], rows: int | None) -> NDArray[np.int64]:
    """Return the lengths of the prompts after padding each group of ``rows`` consecutive ones to its longest."""
    if rows is None or not len(lengths):
        return lengths
    return np.maximum.reduceat(lengths, np.arange(0, len(lengths), rows)).repeat(rows)[: len(lengths)]


def _limits(lengths: NDArray[np.int64], max_new_tokens: int | None, max_length: int | None) -> NDArray[np.int64]:
    """Return the maximum number of tokens of each row's answer."""
    if max_new_tokens is not None and max_length is not None:
        raise ValueError(
            f"expected `max_new_tokens` or `max_length`, got both ({max_new_tokens}, {max_length}); give only one "
            "(`max_length` includes the prompt)"
        )
    if max_length is None:
        new = _NEW_TOKENS if max_new_tokens is None else max_new_tokens
        if new < 1:
            raise ValueError(f"`max_new_tokens`: expected at least 1, got {new}")
        return np.full(len(lengths), new, dtype=np.int64)
    full = np.flatnonzero(lengths >= max_length)
    if len(full):
        raise ValueError(
            f"`max_length`: expected more tokens than every prompt has, got {max_length}, which leaves no token for an "
            f"answer in {len(full)} of {len(lengths)} rows (the prompt of row {full[0]} has {lengths[full[0]]} "
            "tokens); raise it, drop the rows, or use `max_new_tokens`"
        )
    return max_length - lengths


def _batches(
    lengths: NDArray[np.int64], limits: NDArray[np.int64], token_budget: int, repeats: int
) -> list[NDArray[np.int64]]:
    """Group the rows by length of prompt into batches within the budget, longest prompts first.

    If a batch does not fit in memory, it is then the first one. The last batches are small, so that several processes
    finish at about the same time.
    """
    order = np.argsort(-lengths, kind="stable")
    batches: list[NDArray[np.int64]] = []
    first = 0
    for i in range(1, len(order) + 1):
        if i < len(order):
            tokens = lengths[order[first]] + limits[order[first : i + 1]].max()
            if tokens * (i + 1 - first) * repeats <= token_budget:
                continue
        batches.append(order[first:i])
        first = i
    return batches


def _digest(*parts: object) -> bytes:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).digest()


def rouge_recall(generated: str, reference: str) -> dict[str, float]:
    """Return ROUGE scores (Lin 2004) as TOFU and open-unlearning compute them, by ``rouge-score`` with stemming.

    With r words in the reference and g in the generated text,

        rouge1_recall = Σ_w min(count_r(w), count_g(w)) / r
        rougeL_recall = LCS / r,   rougeL_f1 = 2 LCS / (r + g)

    LCS is the length of the longest common subsequence of words. Words are runs of a-z and 0-9 after lower-casing. A
    text in another script has no words, and its scores are 0, like those of an empty text. ``empty_texts`` counts
    such texts.
    """
    scores = _scorer().score(reference, generated)
    return {
        "rouge1_recall": float(scores["rouge1"].recall),
        "rougeL_recall": float(scores["rougeL"].recall),
        "rougeL_f1": float(scores["rougeL"].fmeasure),
    }


@functools.lru_cache(maxsize=1)
def _scorer() -> Any:
    return RougeScorer(["rouge1", "rougeL"], use_stemmer=True)


def empty_texts(texts: Sequence[str]) -> int:
    """Return how many texts contain no word for ROUGE, so that their score is 0 for every reference."""
    return sum(not any(c.isascii() and c.isalnum() for c in text.lower()) for text in texts)
