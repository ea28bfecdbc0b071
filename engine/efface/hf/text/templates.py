"""Prompt templates: conversion of questions and answers into tokens and label positions."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, TypeAlias

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from efface.batching import TokenStore
from efface.batching.store import Chunk

# Row numbers (for messages), questions, answers; all of the same length.
Batch = tuple[Sequence[int], Sequence[str], Sequence[str]]

# {"role": "user" or "assistant", "content": text}, as in the conversations of transformers.
Turn: TypeAlias = dict[str, str]
# A question, or a chat with alternating user and assistant turns that starts and ends with a user turn.
Conversation: TypeAlias = str | Sequence[Turn]

# A tokenizer uses about 200 bytes of memory per token, so texts are tokenised in groups of at most this size.
_GROUP_CHARACTERS = 1_000_000
_GROUP_ROWS = 1000

_PROBE = "efface-probe"
_WORD = "The"  # a typical start of an answer, used if the answer is unknown
_OTHER = "42"  # an answer whose first token differs from that of _WORD


@dataclass(frozen=True)
class Template:
    """The text around a question and its answer. The labels are the answer and the end-of-sequence token.

    Spaces at the end of the prompt count as part of the answer, because many tokenizers split "Answer: Paris" into
    "Answer", ":", " Paris".

    Attributes:
        name: name for messages and for ``get_template``.
        pattern: text before the answer, with ``{question}``; None renders the tokenizer's chat template, which also
            writes the end of the turn.
        system_prompt: first message of a chat; empty for none.
        date_string: date for chat templates that print one; None keeps the template's own (Llama-3's print today's).
        documents: whether the answer is a document, which needs no question and is split at the maximum length.
        answer_tag: text between the pattern and the answer; its tokens are labels too, so the model must generate it.
        labels: rule for the first label. "answer": the first token that contains any character of the answer or its
            tag. "open-unlearning" and "tofu": the position equal to the number of tokens of the prompt tokenised alone;
            see ``get_template``.
    """

    name: str
    pattern: str | None = None
    system_prompt: str = ""
    date_string: str | None = None
    documents: bool = False
    answer_tag: str = ""
    labels: str = "answer"

    @property
    def is_chat(self) -> bool:
        """Whether the tokenizer's chat template is rendered, which writes its own special tokens."""
        return self.pattern is None

    @property
    def counted(self) -> bool:
        """Whether the first label is found by counting the tokens of the prompt tokenised alone."""
        return self.labels != "answer"


AUTO = "auto"
OPEN_UNLEARNING, TOFU = "open-unlearning", "tofu"

_QUESTION_ANSWER = Template("question-answer", "Question: {question}\nAnswer: ")
TEMPLATES = {
    "chat": Template("chat"),
    # The prompt with which open-unlearning trained and evaluates its Llama-3.x TOFU checkpoints.
    "llama-3": Template("llama-3", system_prompt="You are a helpful assistant.", date_string="10 Apr 2025"),
    "llama-2": Template("llama-2", "[INST] {question} [/INST]"),
    "question-answer": _QUESTION_ANSWER,
    # TOFU's prompt for Phi-1.5, StableLM and Pythia.
    "phi": Template("phi", "Question: {question}\n", answer_tag="Answer: "),
    "completion": Template("completion", "{question}", documents=True),  # MUSE: an optional prompt, and a text
}


def get_template(
    template: str | Template,
    tokenizer: PreTrainedTokenizerBase,
    *,
    system_prompt: str | None = None,
    date_string: str | None = None,
    compat: str | None = None,
) -> Template:
    """Return the template of a name, adapted to the tokenizer and to ``compat``.

    With ``compat``, prompts and labels equal those of another code base token for token, on its own models and texts:

    - "open-unlearning" (``preprocess_chat_instance`` and its ``configs/model``): The prompt is tokenised alone. The
      prompt therefore ends in a space ("Answer: "), and a token that contains both prompt and answer is not a label.
      Chats keep the text after the end of the turn, get a second end-of-sequence token after it, and are never cut. A
      chat without a system prompt gets "You are a helpful assistant." if its template accepts a system prompt.
    - "tofu" (``convert_raw_data_to_model_format`` and its ``model_config.yaml``): The prompt is tokenised alone, and
      "question-answer" becomes "phi", in which "Answer:" is part of the labels. TOFU has no chats, so chats are as
      without ``compat``.

    Documents are as without ``compat`` in both cases.

    Args:
        template: a name in ``TEMPLATES``, a ``Template``, or "auto". "auto" is "llama-3" if the tokenizer's chat
            template reads a ``date_string``, "chat" for any other chat template, and "question-answer" without one.
        tokenizer: the tokenizer; its chat template determines "auto".
        system_prompt: replaces the template's own system prompt; "" for none.
        date_string: replaces the template's own date.
        compat: "open-unlearning", "tofu" or None. With either, "auto" is "llama-2" for Llama-2's chat template, because
            neither code base uses that chat template.

    Raises:
        TypeError: ``tokenizer`` is not a tokenizer.
        ValueError: the name or ``compat`` is unknown, the tokenizer lacks the chat template that the template needs, or
            the template does not use a system prompt or date that was given.
    """
    if not hasattr(tokenizer, "get_chat_template"):
        raise TypeError(
            f"`tokenizer`: expected a tokenizer of transformers, got {type(tokenizer).__name__}; load one with "
            "AutoTokenizer.from_pretrained"
        )
    if compat not in (None, OPEN_UNLEARNING, TOFU):
        raise ValueError(f"`compat`: expected {OPEN_UNLEARNING!r}, {TOFU!r} or None, got {compat!r}")
    known = tokenizer.get_chat_template() if tokenizer.chat_template else ""
    if template == AUTO:
        template = "llama-3" if "date_string" in known else "chat" if known else "question-answer"
        if compat is not None and "<<SYS>>" in known:
            template = "llama-2"
    named = isinstance(template, str)
    if isinstance(template, str):
        if template not in TEMPLATES:
            raise ValueError(f"`template`: expected one of {', '.join([AUTO, *TEMPLATES])}, got {template!r}")
        template = TEMPLATES[template]
    if template.is_chat and not known:
        others = ", ".join(name for name, other in TEMPLATES.items() if not other.is_chat)
        raise ValueError(
            f"`template`: expected a tokenizer with a chat template for {template.name!r}, got one without; use one of "
            f"{others}"
        )
    if system_prompt is not None:
        template = replace(template, system_prompt=system_prompt)
    if date_string is not None:
        template = replace(template, date_string=date_string)
    if not template.is_chat and (template.system_prompt or template.date_string):
        raise ValueError(
            f"`template`: expected no system prompt and no date for {template.name!r}, got one; leave it out, or use a "
            "chat template"
        )
    return template if compat is None else _for_compat(template, tokenizer, compat, named and system_prompt is None)


def _for_compat(template: Template, tokenizer: PreTrainedTokenizerBase, compat: str, plain: bool) -> Template:
    """Return the template with the prompts and labels of ``compat``.

    ``plain`` is whether the template was given by name and without a system prompt.
    """
    if template.documents or template.labels == compat:
        return template
    if compat == TOFU:
        template = TEMPLATES["phi"] if template == _QUESTION_ANSWER else template
        return template if template.is_chat else replace(template, labels=TOFU)
    if not template.is_chat:
        return replace(template, pattern=f"{template.pattern}{template.answer_tag}", answer_tag="", labels=compat)
    if plain and not template.system_prompt:
        template = _with_system_prompt(template, tokenizer)
    return replace(template, labels=compat)


def _with_system_prompt(template: Template, tokenizer: PreTrainedTokenizerBase) -> Template:
    """Return the template with open-unlearning's system prompt; unchanged if the chat template rejects one (Gemma)."""
    wanted = replace(template, system_prompt=TEMPLATES["llama-3"].system_prompt)
    try:
        _Chat(tokenizer, wanted)
    except ValueError:
        return template
    return wanted


def encode(
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    answers: Sequence[str],
    *,
    template: str | Template = AUTO,
    max_length: int | None = None,
) -> TokenStore:
    """Tokenise prompt + answer + end of sequence; the tokens after the prompt are the labels.

    The prompt ends before its trailing spaces. The tokens before the labels are then the same whether the tokenizer
    joins the space and the answer (" Paris") or not (" ", "42"), so the log-probability of every answer is conditioned
    on the same tokens: those of ``prompt_ids``. Line breaks at the end of the prompt belong to the prompt, as in chat
    templates, unless the tokenizer treats them as spaces. A token that contains characters of both, such as GPT-2's
    `]"` in `[/INST]"Hi"`, is a label.

    Args:
        tokenizer: a tokenizer with an ``eos_token``.
        questions: n texts.
        answers: n texts.
        template: a name or a ``Template``; see ``get_template``.
        max_length: maximum tokens of a sequence; longer answers are cut, longer documents are split. None is no limit.

    Returns:
        n sequences, in order; a document can be several sequences.

    Raises:
        ValueError: the template is unknown, the tokenizer has no end-of-sequence token or no chat template, or an
            answer is empty or entirely cut off.
    """
    if len(questions) != len(answers):
        raise ValueError(f"`questions` and `answers`: expected equal lengths, got {len(questions)} and {len(answers)}")
    rows = (range(len(answers)), questions, answers)
    return TokenStore(
        encode_batches(tokenizer, [rows], template=get_template(template, tokenizer), max_length=max_length)
    )


def encode_batches(
    tokenizer: PreTrainedTokenizerBase,
    batches: Iterable[Batch],
    *,
    template: Template,
    max_length: int | None,
    where: str = "",
) -> Iterator[Chunk]:
    """Tokenise batches one after another as ``encode`` does; memory use is bounded by the batch size.

    Args:
        tokenizer: a tokenizer with an ``eos_token``.
        batches: row numbers, questions and answers.
        template: the result of ``get_template``.
        max_length: as in ``encode``.
        where: the start of the message about a row without an answer, such as ``forget data, column 'answer', ``.

    Yields:
        The arrays of a ``TokenStore``: ids int32, offsets int64, label_starts int64.

    Raises:
        ValueError: as ``encode``, or ``max_length`` is less than 2.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("`tokenizer`: expected an end-of-sequence token, got none; set `tokenizer.eos_token`")
    if max_length is not None and max_length < 2:
        raise ValueError(f"`max_length`: expected at least 2 (a label and the token before it), got {max_length}")
    write = _writer(tokenizer, template)
    for rows, questions, answers in batches:
        for row, answer in zip(rows, answers, strict=True):
            if not answer.strip():
                raise ValueError(f"{where}row {row}: expected an answer, got {answer!r}; drop the row")
        texts = [write(row, question, answer) for row, question, answer in zip(rows, questions, answers, strict=True)]
        for group in _groups([len(text) for text, _ in texts]):
            yield _chunk(tokenizer, rows[group], texts[group], template, max_length)


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation], *, template: str | Template = AUTO
) -> list[list[int]]:
    """Tokenise prompts: return the tokens that ``encode`` puts before the labels.

    These tokens are the same for every answer, with one exception. If no space separates prompt and answer, a tokenizer
    can join the last character of the prompt and the first of the answer. This happens if the prompt ends and the
    answer starts with punctuation, if the answer starts with white space after a chat's line break, and if the answer
    continues the last word of the prompt. ``encode`` then puts only the tokens without any character of the answer
    before the labels.

    For Llama-3, Gemma-2 and Qwen2.5 the result equals ``apply_chat_template(..., add_generation_prompt=True)`` with the
    template's system prompt and date. For Qwen3 it also contains the empty think block, as in training.

    Args:
        tokenizer: see ``get_template``.
        conversations: questions; or chats. A chat template renders the earlier turns of a chat itself; a pattern
            template writes each earlier exchange on a line of its own.
        template: a name or a ``Template``; see ``get_template``.

    Returns:
        The ids of each prompt, without truncation. With the labels of "open-unlearning" or "tofu", the ids of the
        prompt tokenised alone.

    Raises:
        ValueError: as ``get_template``; or the turns are out of order, or a prompt has no token.
    """
    template = get_template(template, tokenizer)
    write = _writer(tokenizer, template)
    # The tokens of the prompt's last characters depend on an answer being there: without one, GPT-2's tokenizer makes
    # one token of two line breaks. If the prompt ends in a letter or digit, a space keeps _WORD from continuing it.
    texts = []
    for row, conversation in enumerate(conversations):
        text, start = write(row, conversation, _WORD)
        texts.append((f"{text[:start]} {text[start:]}" if text[:start][-1:].isalnum() else text, start))
    if template.counted:  # open-unlearning and TOFU tokenise the prompt alone
        texts = [(text[:end], end) for text, end in texts]
    prompts: list[list[int]] = []
    for group in _groups([len(text) for text, _ in texts]):
        prompts += [ids[:start] for ids, start in _tokens(tokenizer, texts[group], template)]
    if empty := [row for row, ids in enumerate(prompts) if not ids]:
        raise ValueError(
            f"row {empty[0]}: expected a prompt of at least one token, got {conversations[empty[0]]!r} with template "
            f"{template.name!r}; drop the row, or use a tokenizer that begins sequences with a token"
        )
    return prompts


def _turns(row: int, conversation: Conversation) -> list[Turn]:
    """Return the turns of a chat; raise ValueError unless the roles alternate and the last turn is the user's."""
    turns: list[Turn] = (
        [{"role": "user", "content": conversation}] if isinstance(conversation, str) else [*conversation]
    )
    roles = [turn["role"] for turn in turns]
    if len(roles) % 2 == 0 or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(roles)):
        raise ValueError(
            f"row {row}: expected alternating turns (user, assistant, user, ...) that end with a user turn, got "
            f"{', '.join(roles) or 'none'}; pass a system prompt as `system_prompt`"
        )
    return turns


def _writer(tokenizer: PreTrainedTokenizerBase, template: Template) -> "_Chat | _Pattern | _CountedChat":
    """Return the callable that writes rows: it returns a row's text and the character at which the prompt ends."""
    if not template.is_chat:
        return _Pattern(template)
    return _CountedChat(tokenizer, template) if template.counted else _Chat(tokenizer, template)


class _Pattern:
    """Writer of a pattern template: returns the text and the character at which the answer, or its tag, starts."""

    def __init__(self, template: Template) -> None:
        self._pattern, self._tag = template.pattern or "", template.answer_tag

    def __call__(self, row: int, conversation: Conversation, answer: str) -> tuple[str, int]:
        *earlier, question = _turns(row, conversation)
        lines = [
            self._pattern.format(question=asked["content"]) + self._tag + answered["content"] + "\n"
            for asked, answered in zip(earlier[::2], earlier[1::2], strict=True)
        ]
        prompt = "".join(lines) + self._pattern.format(question=question["content"])
        return prompt + self._tag + answer, len(prompt)


class _Chat:
    """Writer of a chat: returns the text up to the end of the turn, and the character at which the answer starts.

    A chat template can trim the answer and insert text before it (Qwen3's empty think block). The answer is therefore
    searched from the end of the text, where only the end of the turn follows it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
        self._tokenizer = tokenizer
        self._system = [{"role": "system", "content": template.system_prompt}] if template.system_prompt else []
        self._options: dict[str, Any] = {} if template.date_string is None else {"date_string": template.date_string}
        before, answer, self._closing = self._render(_turns(0, _PROBE), _PROBE).rpartition(_PROBE)
        wanted = {
            "question": _PROBE in before,
            "answer": answer,
            "system prompt": template.system_prompt.strip() in before,
        }
        if missing := [name for name, there in wanted.items() if not there]:
            raise ValueError(
                f"`template`: expected a chat template that renders the {missing[0]}, got one that leaves it out; use "
                "another `template`, an empty system prompt, or correct `tokenizer.chat_template`"
            )

    def __call__(self, row: int, conversation: Conversation, answer: str) -> tuple[str, int]:
        turns = _turns(row, conversation)
        text = self._render(turns, answer)
        start = self._answer_start(text, answer)
        if start is not None and answer[0].isspace():
            # Render without the leading white space to find out whether the white space belongs to the answer.
            start = self._answer_start(self._render(turns, answer.lstrip()), answer)
        if start is None:
            raise ValueError(
                f"row {row}: expected a chat template that keeps the answer {answer[:60]!r}, got one that changes it, "
                "so its labels are unknown; drop the row, or use another `template`"
            )
        # White space after the end of the turn belongs to the next turn.
        return text.removesuffix(self._closing) + self._closing.rstrip(), start

    def _answer_start(self, text: str, answer: str) -> int | None:
        words = answer.strip()
        body = text.removesuffix(self._closing).rstrip()
        found = text.endswith(self._closing) and body.endswith(words)
        return len(body) - len(words) if found else None

    def _render(self, turns: Sequence[Turn], answer: str | None) -> str:
        """Return the rendered chat with the answer; if ``answer`` is None, up to the generation prompt."""
        chat = [*self._system, *turns, *([] if answer is None else [{"role": "assistant", "content": answer}])]
        options = {**self._options, "tokenize": False, "add_generation_prompt": answer is None}
        try:
            return str(self._tokenizer.apply_chat_template(chat, **options))
        except jinja2.TemplateError as error:
            remedy = "set an empty system prompt" if self._system else "use another `template`"
            raise ValueError(f"the tokenizer's chat template rejects the conversation ({error}); {remedy}") from error


class _CountedChat(_Chat):
    """Writer of a chat as open-unlearning does it: returns the whole text, and where its generation prompt ends."""

    def __call__(self, row: int, conversation: Conversation, answer: str) -> tuple[str, int]:
        turns = _turns(row, conversation)
        text, prompt = self._render(turns, answer), self._render(turns, None)
        if not text.startswith(prompt):
            raise ValueError(
                f"row {row}: expected a chat template whose generation prompt is a prefix of the training text, which "
                "open-unlearning's labels need, got another; use another `template`, or drop compat"
            )
        return text, len(prompt)


def probe(tokenizer: PreTrainedTokenizerBase, template: Template) -> str:
    """Return the text that the template writes for a fixed row, for the cache key.

    The text differs between templates, and between days for templates that print the date.
    """
    text, start = _writer(tokenizer, template)(0, _PROBE, _PROBE)
    return f"{start} {text}"


def _groups(lengths: Sequence[int]) -> Iterator[slice]:
    """Yield slices of consecutive texts with at most ``_GROUP_CHARACTERS`` characters and ``_GROUP_ROWS`` rows each.

    A longer text forms its own group. ``lengths`` are the characters of each text.
    """
    first = characters = 0
    for i, length in enumerate(lengths):
        if i > first and (characters + length > _GROUP_CHARACTERS or i - first == _GROUP_ROWS):
            yield slice(first, i)
            first, characters = i, 0
        characters += length
    if lengths:
        yield slice(first, len(lengths))


def _chunk(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[int],
    texts: Sequence[tuple[str, int]],
    template: Template,
    max_length: int | None,
) -> Chunk:
    sequences: list[list[int]] = []
    starts: list[int] = []
    cuts_before_eos = template.labels == OPEN_UNLEARNING  # it appends EOS after cutting, and does not cut chats
    for row, (tokens, start) in zip(rows, _tokens(tokenizer, texts, template), strict=True):
        ids = tokens[:max_length] if cuts_before_eos and not template.is_chat else tokens
        if ids[-1] != tokenizer.eos_token_id:
            ids.append(tokenizer.eos_token_id)
        kept = ids if cuts_before_eos else ids[:max_length]
        if max(start, 1) >= len(kept):
            raise ValueError(
                f"row {row}: expected a label within {max_length} tokens, got an answer that starts at token {start}; "
                "raise `max_length`"
                if max_length is not None and len(kept) >= max_length
                else f"row {row}: expected a label, got none: the prompt has {start} tokens alone, and {len(kept)} "
                "with the answer and the end of sequence; drop the row"
            )
        sequences.append(kept)
        starts.append(start)
        if template.documents and max_length is not None:
            rest = list(_rest(ids, max_length, tokenizer.bos_token_id))
            sequences.extend(rest)
            starts.extend([1] * len(rest))
    lengths = np.fromiter(map(len, sequences), np.int64, count=len(sequences))
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    return (
        np.fromiter(chain.from_iterable(sequences), np.int32, count=int(offsets[-1])),
        offsets,
        np.asarray(starts, dtype=np.int64),
    )


def _rest(ids: list[int], max_length: int, bos: int | None) -> Iterator[list[int]]:
    """Yield the sequences of a document after its first; each further token is a label in exactly one of them.

    The first token of a sequence is never predicted. It is the beginning-of-sequence token if the document has one,
    else the last token of the previous sequence.
    """
    for first in range(max_length, len(ids), max_length - 1):
        yield [ids[0] if ids[0] == bos else ids[first - 1], *ids[first : first + max_length - 1]]


def _tokens(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[tuple[str, int]], template: Template
) -> Iterator[tuple[list[int], int]]:
    """Yield the ids of each text and the position of its first label; ``texts`` as in ``_tokenise``."""
    if not template.counted:
        yield from _tokenise(tokenizer, texts, special=not template.is_chat)
        return
    options: dict[str, Any] = {"add_special_tokens": not template.is_chat, "verbose": False}
    wholes = tokenizer([text for text, _ in texts], **options)["input_ids"]
    prompts = tokenizer([text[:border] for text, border in texts], **options)["input_ids"]
    for ids, prompt in zip(wholes, prompts, strict=True):
        yield list(ids), len(prompt)


def _tokenise(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[tuple[str, int]], *, special: bool
) -> Iterator[tuple[list[int], int]]:
    """Yield the ids of each text and the position of its first label, by efface's own rule.

    A fast tokenizer reports the characters of each token. With a slow tokenizer, the labels start at the first token in
    which the text and its prompt differ.

    Args:
        tokenizer: a fast or slow tokenizer.
        texts: each text with the character at which its answer starts.
        special: whether the tokenizer adds its special tokens; False for chat templates, which write their own.
    """
    options: dict[str, Any] = {"add_special_tokens": special, "return_attention_mask": False, "verbose": False}
    whole = [text for text, _ in texts]
    # The tokenizers of T5 and XGLM treat a line break as a space, and can join it with the answer.
    line, spaced = tokenizer(["a\nb", "a b"], **options)["input_ids"]
    kept = "" if line == spaced else "\r\n"
    stops = [_prompt_end(text, border, kept) for text, border in texts]
    if tokenizer.is_fast:
        encoded = tokenizer(whole, return_offsets_mapping=True, **options)
        for ids, spans, (_, border), stop in zip(
            encoded["input_ids"], encoded["offset_mapping"], texts, stops, strict=True
        ):
            # A token that starts in the trailing spaces is a label, and so is any token that extends into the answer.
            # A special token of the prompt that includes the space after it (`rstrip`, as in Phi-3) is not a label.
            labels = (i for i, (a, b) in enumerate(spans) if b > stop and (a >= stop or b > border))
            yield list(ids), next(labels, len(ids))
        return
    prompts = tokenizer([text[:stop] for text, stop in zip(whole, stops, strict=True)], **options)["input_ids"]
    special_ids = set(tokenizer.all_special_ids)
    for text, stop, ids, prompt in zip(whole, stops, tokenizer(whole, **options)["input_ids"], prompts, strict=True):
        start = _common(ids, prompt)
        if not special_ids.issuperset(prompt[start:]):
            # Tokenised alone, the prompt ends in different tokens than before an answer. _WORD and _OTHER start
            # differently, so at least one differs from this answer, and the common prefix belongs to the prompt.
            others = tokenizer([text[:stop] + word for word in (_WORD, _OTHER)], **options)["input_ids"]
            start = max(start, min(_common(ids, other) for other in others))
        yield list(ids), start


def _prompt_end(text: str, border: int, kept: str) -> int:
    """Return the start of the white space that ends at ``border``; characters in ``kept`` are not white space here."""
    while border and text[border - 1].isspace() and text[border - 1] not in kept:
        border -= 1
    return border


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the length of the common prefix of two id sequences."""
    differ = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(differ, min(len(first), len(second)))
