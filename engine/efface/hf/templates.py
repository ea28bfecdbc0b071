"""Templates: how a question and its answer become tokens, and which of them are labels."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from efface.batching import TokenStore

# Prompt formats; the answer and the end-of-sequence token follow, and only they carry labels.
TEMPLATES = {
    "question-answer": "Question: {question}\nAnswer: ",  # Phi-1.5 of TOFU
    "llama-2": "[INST] {question} [/INST]",
}
CHAT = "chat"  # the tokenizer's own chat template
AUTO = "auto"  # "chat" where the tokenizer has one, else "question-answer"


def encode(
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    answers: Sequence[str],
    *,
    template: str = AUTO,
    max_length: int | None = None,
) -> TokenStore:
    """Tokenise prompt + answer + end of sequence; tokens that hold any of the answer are labels.

    Args:
        tokenizer: with an ``eos_token``.
        questions: n texts.
        answers: n texts.
        template: "auto", "chat", "question-answer" or "llama-2".
        max_length: cut sequences to so many tokens; None never cuts.

    Raises:
        ValueError: unknown template, a tokenizer without an end-of-sequence token or chat template, an empty
            answer, or an answer that is cut away whole.
    """
    if len(questions) != len(answers):
        raise ValueError(f"`questions` and `answers`: expected equal lengths, got {len(questions)}, {len(answers)}")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-sequence token, which every answer ends with; set `eos_token`")
    sequences, starts = [], []
    for row, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        if not answer.strip():
            raise ValueError(f"row {row}: expected an answer, got {answer!r}; drop the row")
        prompt = _prompt(tokenizer, question, template)
        ids, start = _encode_one(tokenizer, prompt, answer, special=template_kind(tokenizer, template) != CHAT)
        ids = ids[:max_length]
        if max(start, 1) >= len(ids):
            raise ValueError(
                f"row {row} has no label left: its answer starts at token {start} and sequences are cut to "
                f"{max_length} tokens; raise `max_length`"
            )
        sequences.append(ids)
        starts.append(start)
    return TokenStore.from_sequences(sequences, starts)


def template_kind(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """Resolve "auto" and check the name."""
    if template == AUTO:
        return CHAT if tokenizer.chat_template else "question-answer"
    if template == CHAT and not tokenizer.chat_template:
        raise ValueError(f"`template`: the tokenizer has no chat template; use one of {', '.join(TEMPLATES)}")
    if template != CHAT and template not in TEMPLATES:
        raise ValueError(f"`template`: expected one of {', '.join([AUTO, CHAT, *TEMPLATES])}, got {template!r}")
    return template


def _prompt(tokenizer: PreTrainedTokenizerBase, question: str, template: str) -> str:
    kind = template_kind(tokenizer, template)
    if kind != CHAT:
        return TEMPLATES[kind].format(question=question)
    messages = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _encode_one(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, *, special: bool
) -> tuple[list[int], int]:
    """Return the ids and the position of the first label. A chat template writes its own special tokens."""
    options: dict[str, Any] = {"add_special_tokens": special}
    if tokenizer.is_fast:
        # A token that straddles the border holds some of the answer, so it is a label.
        encoded = tokenizer(prompt + answer, return_offsets_mapping=True, **options)
        ids, spans = list(encoded["input_ids"]), encoded["offset_mapping"]
        start = next((i for i, (_, end) in enumerate(spans) if end > len(prompt)), len(ids))
    else:
        ids, alone = list(tokenizer(prompt + answer, **options)["input_ids"]), tokenizer(prompt, **options)["input_ids"]
        start = next((i for i, (a, b) in enumerate(zip(ids, alone, strict=False)) if a != b), min(len(ids), len(alone)))
    if ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
    return ids, start
