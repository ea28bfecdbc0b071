"""Templates: how a question and its answer become tokens, and which of them are labels."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, TypeAlias

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from efface.batching import TokenStore
from efface.batching.store import Chunk

# Row numbers (for messages), questions, answers: equally many of each.
Batch = tuple[Sequence[int], Sequence[str], Sequence[str]]

# What {"role": "user" or "assistant", "content": text} says, as in transformers' conversations.
Turn: TypeAlias = dict[str, str]
# A question, or a chat that ends with one: user and assistant in turn, the user first and last.
Conversation: TypeAlias = str | Sequence[Turn]

# A tokenizer's working memory is some 200 bytes a token; texts go to it in groups of so many characters and rows.
_GROUP_CHARACTERS = 1_000_000
_GROUP_ROWS = 1000

_PROBE = "efface-probe"
_WORD = "The"  # an answer as answers begin, where the answer is not known
_OTHER = "42"  # one that has no first token in common with it


@dataclass(frozen=True)
class Template:
    """What stands around a question and its answer; the answer and the end of sequence are the labels.

    Spaces at the end of the prompt are the answer's: of "Answer: Paris", many tokenizers make "Answer", ":", " Paris".

    Attributes:
        name: for messages and for ``get_template``.
        pattern: text before the answer, with ``{question}``; None renders the tokenizer's own chat template, which
            also writes the end of the turn.
        system_prompt: first message of a chat; empty for none.
        date_string: the date for chat templates that print one; None leaves it to them (Llama-3's print today's).
        documents: the answer is a document: it needs no question, and one longer than the maximum length is split.
        answer_tag: text between a pattern and the answer; it is labels too, and a model has to write it.
        labels: whose: "answer" are ours, tokens that hold any of the answer or its tag, and the end of sequence. Those
            of "open-unlearning" and "tofu" are whatever follows as many tokens as the prompt has alone; see
            ``get_template``.
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
        """Whether the tokenizer's chat template is rendered; it writes its own special tokens."""
        return self.pattern is None

    @property
    def counted(self) -> bool:
        """Whether the prompt is tokenised alone, and its tokens are counted off to find the first label."""
        return self.labels != "answer"


AUTO = "auto"
OPEN_UNLEARNING, TOFU = "open-unlearning", "tofu"

_QUESTION_ANSWER = Template("question-answer", "Question: {question}\nAnswer: ")
TEMPLATES = {
    "chat": Template("chat"),
    # As open-unlearning trained and evaluates its TOFU checkpoints of Llama-3.x.
    "llama-3": Template("llama-3", system_prompt="You are a helpful assistant.", date_string="10 Apr 2025"),
    "llama-2": Template("llama-2", "[INST] {question} [/INST]"),
    "question-answer": _QUESTION_ANSWER,
    # TOFU's Phi-1.5, StableLM and Pythia.
    "phi": Template("phi", "Question: {question}\n", answer_tag="Answer: "),
    "completion": Template("completion", "{question}", documents=True),  # MUSE: a prompt, if there is one, and a text
}


def get_template(
    template: str | Template,
    tokenizer: PreTrainedTokenizerBase,
    *,
    system_prompt: str | None = None,
    date_string: str | None = None,
    compat: str | None = None,
) -> Template:
    """Return the template of a name, fit for the tokenizer.

    With ``compat``, prompts and labels are another system's, token for token, on its own models and texts:

    - "open-unlearning" (``preprocess_chat_instance`` and its ``configs/model``): the prompt is tokenised alone, so a
      token that it and the answer share in training is no label and the prompt ends in a space ("Answer: "); chats keep
      what follows the end of the turn, get a second end of sequence behind it, and are never cut; a chat without a
      system prompt gets "You are a helpful assistant." where its template has a place for one.
    - "tofu" (``convert_raw_data_to_model_format`` and its ``model_config.yaml``): the prompt is tokenised alone, and
      "question-answer" is "phi", which counts "Answer:" as labels. TOFU has no chats; theirs are as without it.

    Documents are as without it in both.

    Args:
        template: a name in ``TEMPLATES``, a ``Template`` of your own, or "auto": "llama-3" if the tokenizer's chat
            template reads a ``date_string``, "chat" if it has another, else "question-answer".
        tokenizer: its chat template decides what "auto" is.
        system_prompt: in place of the template's own; "" for none.
        date_string: in place of the template's own.
        compat: "open-unlearning" or "tofu"; "auto" is then "llama-2" for Llama-2's chat template, which neither uses.

    Raises:
        TypeError: no tokenizer.
        ValueError: an unknown name, a chat without a chat template, a system prompt or date that has no place.
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
        raise ValueError(f"`template`: the tokenizer has no chat template for {template.name!r}; use one of {others}")
    if system_prompt is not None:
        template = replace(template, system_prompt=system_prompt)
    if date_string is not None:
        template = replace(template, date_string=date_string)
    if not template.is_chat and (template.system_prompt or template.date_string):
        raise ValueError(
            f"`template`: {template.name!r} has no place for a system prompt or a date; leave them out, or use a chat "
            "template"
        )
    return template if compat is None else _as_theirs(template, tokenizer, compat, named and system_prompt is None)


def _as_theirs(template: Template, tokenizer: PreTrainedTokenizerBase, compat: str, plain: bool) -> Template:
    """Return a template with the prompts and labels of ``compat``; ``plain`` is one whose system prompt was not set."""
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
    """Return a chat with the system prompt of open-unlearning's models; as it is where that has no place (Gemma)."""
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
    """Tokenise prompt + answer + end of sequence; the tokens behind the prompt are labels.

    The prompt ends before its trailing spaces, so that the tokens before the labels are the same ones whether a
    tokenizer joins the space and the answer (" Paris") or does not (" ", "42"): each answer's log-probability is given
    the same tokens, which are those of ``prompt_ids``. Line breaks at its end are the prompt's, as chat templates have
    them, unless the tokenizer takes them for spaces. A token that holds some of both, such as GPT-2's `]"` of
    `[/INST]"Hi"`, is a label.

    Args:
        tokenizer: with an ``eos_token``.
        questions: n texts.
        answers: n texts.
        template: a name or a ``Template``; see ``get_template``.
        max_length: cut sequences to so many tokens, documents into sequences of so many; None never cuts.

    Returns:
        n sequences, in order; of documents, one or more each.

    Raises:
        ValueError: unknown template, a tokenizer without an end-of-sequence token or chat template, an empty
            answer, or an answer that is cut away whole.
    """
    if len(questions) != len(answers):
        raise ValueError(f"`questions` and `answers`: expected equal lengths, got {len(questions)}, {len(answers)}")
    rows = (range(len(answers)), questions, answers)
    return TokenStore(
        encode_batches(tokenizer, [rows], template=get_template(template, tokenizer), max_length=max_length)
    )


def encode_batches(
    tokenizer: PreTrainedTokenizerBase, batches: Iterable[Batch], *, template: Template, max_length: int | None
) -> Iterator[Chunk]:
    """Tokenise batches one after another, as ``encode`` does; memory is bounded by the batches.

    Args:
        tokenizer: with an ``eos_token``.
        batches: row numbers, questions and answers.
        template: what ``get_template`` returned.
        max_length: as in ``encode``.

    Yields:
        The arrays of a ``TokenStore``: ids int32, offsets int64, label_starts int64.

    Raises:
        ValueError: as ``encode``.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-sequence token, which every answer ends with; set `eos_token`")
    if max_length is not None and max_length < 2:
        raise ValueError(f"`max_length`: expected at least 2 (a token and the one before it), got {max_length}")
    write = _writer(tokenizer, template)
    for rows, questions, answers in batches:
        for row, answer in zip(rows, answers, strict=True):
            if not answer.strip():
                raise ValueError(f"row {row}: expected an answer, got {answer!r}; drop the row")
        texts = [write(row, question, answer) for row, question, answer in zip(rows, questions, answers, strict=True)]
        for group in _groups([len(text) for text, _ in texts]):
            yield _chunk(tokenizer, rows[group], texts[group], template, max_length)


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation], *, template: str | Template = AUTO
) -> list[list[int]]:
    """Tokenise what stands before an answer: the tokens that ``encode`` puts before the labels.

    They are the same ones for every answer, with one exception: where no space parts prompt and answer, a tokenizer may
    join the prompt's last character and the answer's first. These are punctuation that begins an answer behind a
    prompt that ends with some, white space that begins one behind a chat's line break, and an answer that goes on with
    the prompt's last word. Then ``encode`` puts other tokens before the labels, those that hold none of the answer.

    For Llama-3, Gemma-2 and Qwen2.5 that is ``apply_chat_template(..., add_generation_prompt=True)`` with the
    template's system prompt and date. Qwen3's has its empty think block too, as in training.

    Args:
        tokenizer: see ``get_template``.
        conversations: questions; or chats, whose earlier turns a chat template renders as it does, and a pattern
            writes one exchange a line.
        template: a name or a ``Template``; see ``get_template``.

    Returns:
        The ids of each prompt, as long as they come; with another system's labels, those of the prompt alone.

    Raises:
        ValueError: as ``get_template``; turns out of order; a prompt without a token.
    """
    template = get_template(template, tokenizer)
    write = _writer(tokenizer, template)
    # How the prompt's last characters are cut into tokens shows only in front of an answer: alone, GPT-2's makes one
    # token of two line breaks. A word would go on with the prompt's last one, so a space parts them.
    texts = []
    for row, conversation in enumerate(conversations):
        text, start = write(row, conversation, _WORD)
        texts.append((f"{text[:start]} {text[start:]}" if text[:start][-1:].isalnum() else text, start))
    if template.counted:  # alone, as those systems have it
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
    """Return the turns of a chat; raise ValueError unless it is the assistant's turn."""
    turns: list[Turn] = (
        [{"role": "user", "content": conversation}] if isinstance(conversation, str) else [*conversation]
    )
    roles = [turn["role"] for turn in turns]
    if len(roles) % 2 == 0 or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(roles)):
        raise ValueError(
            f"row {row}: expected turns of user, assistant, user, ... that end with the user's, got "
            f"{', '.join(roles) or 'none'}; the system prompt belongs to the template"
        )
    return turns


def _writer(tokenizer: PreTrainedTokenizerBase, template: Template) -> "_Chat | _Pattern | _CountedChat":
    """Return what writes rows: the text, and the character at which the prompt ends."""
    if not template.is_chat:
        return _Pattern(template)
    return _CountedChat(tokenizer, template) if template.counted else _Chat(tokenizer, template)


class _Pattern:
    """Writes a pattern template: returns the text and the character at which the answer, or its tag, starts."""

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
    """Renders a chat: returns the text up to the end of the turn, and the character at which the answer starts.

    A chat template may trim the answer and put text of its own before it (Qwen3's empty think block), so the answer is
    looked for from the end, where nothing but the end of the turn follows it.
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
                f"the tokenizer's chat template leaves out the {missing[0]}; use another `template`, an empty system "
                "prompt, or correct `tokenizer.chat_template`"
            )

    def __call__(self, row: int, conversation: Conversation, answer: str) -> tuple[str, int]:
        turns = _turns(row, conversation)
        text = self._render(turns, answer)
        start = self._answer_start(text, answer)
        if start is not None and answer[0].isspace():
            # Whether leading white space belongs to the answer shows where it is missing.
            start = self._answer_start(self._render(turns, answer.lstrip()), answer)
        if start is None:
            raise ValueError(
                f"row {row}: the tokenizer's chat template changes the answer {answer[:60]!r}, so its labels are not "
                "known; drop the row, or use another `template`"
            )
        # What follows the end of the turn is the next turn's.
        return text.removesuffix(self._closing) + self._closing.rstrip(), start

    def _answer_start(self, text: str, answer: str) -> int | None:
        words = answer.strip()
        body = text.removesuffix(self._closing).rstrip()
        found = text.endswith(self._closing) and body.endswith(words)
        return len(body) - len(words) if found else None

    def _render(self, turns: Sequence[Turn], answer: str | None) -> str:
        """Return the chat with the answer; without one, up to where the chat template has a model go on."""
        chat = [*self._system, *turns, *([] if answer is None else [{"role": "assistant", "content": answer}])]
        options = {**self._options, "tokenize": False, "add_generation_prompt": answer is None}
        try:
            return str(self._tokenizer.apply_chat_template(chat, **options))
        except jinja2.TemplateError as error:
            remedy = "set an empty system prompt" if self._system else "use another `template`"
            raise ValueError(f"the tokenizer's chat template refuses the conversation ({error}); {remedy}") from error


class _CountedChat(_Chat):
    """Renders a chat as open-unlearning does: returns all of the text, and where its generation prompt ends."""

    def __call__(self, row: int, conversation: Conversation, answer: str) -> tuple[str, int]:
        turns = _turns(row, conversation)
        text, prompt = self._render(turns, answer), self._render(turns, None)
        if not text.startswith(prompt):
            raise ValueError(
                f"row {row}: the tokenizer's chat template begins a generation otherwise than a turn of training, so "
                "open-unlearning's labels would begin at no border; use another `template`, or drop compat"
            )
        return text, len(prompt)


def probe(tokenizer: PreTrainedTokenizerBase, template: Template) -> str:
    """Return what the template writes around a fixed row: it tells templates apart, and days of those with a date."""
    text, start = _writer(tokenizer, template)(0, _PROBE, _PROBE)
    return f"{start} {text}"


def _groups(lengths: Sequence[int]) -> Iterator[slice]:
    """Cut texts of so many characters into consecutive groups that suit the tokenizer."""
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
    theirs = template.labels == OPEN_UNLEARNING  # there the end of sequence follows the cut, and no chat is cut
    for row, (tokens, start) in zip(rows, _tokens(tokenizer, texts, template), strict=True):
        ids = tokens[:max_length] if theirs and not template.is_chat else tokens
        if ids[-1] != tokenizer.eos_token_id:
            ids.append(tokenizer.eos_token_id)
        kept = ids if theirs else ids[:max_length]
        if max(start, 1) >= len(kept):
            raise ValueError(
                f"row {row} has no label left: its answer starts at token {start} and sequences are cut to "
                f"{max_length} tokens; raise `max_length`"
                if max_length is not None and len(kept) >= max_length
                else f"row {row} has no label: its prompt has {start} tokens alone, and {len(kept)} with its answer "
                "and the end of sequence; drop the row"
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
    """Yield the sequences behind a document's first; each of its tokens is a label in exactly one of them.

    The first token of a sequence is never predicted. It is the beginning-of-sequence token if the document has one,
    else the last token of the sequence before.
    """
    for first in range(max_length, len(ids), max_length - 1):
        yield [ids[0] if ids[0] == bos else ids[first - 1], *ids[first : first + max_length - 1]]


def _tokens(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[tuple[str, int]], template: Template
) -> Iterator[tuple[list[int], int]]:
    """Yield the ids of each text and the position of its first label; ``texts`` as of ``_tokenise``."""
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
    """Yield the ids of each text and the position of its first label; the one place that knows where labels start.

    Args:
        tokenizer: fast ones tell which characters a token holds; of the others, tokens are labels from where the text
            and its prompt differ.
        texts: each with the character at which its answer starts.
        special: whether the tokenizer adds its special tokens; a chat template writes its own.
    """
    options: dict[str, Any] = {"add_special_tokens": special, "return_attention_mask": False, "verbose": False}
    whole = [text for text, _ in texts]
    # T5's and XGLM's take a line break for a space, and may join it with the answer.
    line, spaced = tokenizer(["a\nb", "a b"], **options)["input_ids"]
    kept = "" if line == spaced else "\r\n"
    stops = [_prompt_end(text, border, kept) for text, border in texts]
    if tokenizer.is_fast:
        encoded = tokenizer(whole, return_offsets_mapping=True, **options)
        for ids, spans, (_, border), stop in zip(
            encoded["input_ids"], encoded["offset_mapping"], texts, stops, strict=True
        ):
            # A token of the spaces, with or without some of the answer, is a label; so is any other that straddles the
            # border. Not a special token of the prompt that has the space behind it (`rstrip`), as Phi-3's have.
            labels = (i for i, (a, b) in enumerate(spans) if b > stop and (a >= stop or b > border))
            yield list(ids), next(labels, len(ids))
        return
    prompts = tokenizer([text[:stop] for text, stop in zip(whole, stops, strict=True)], **options)["input_ids"]
    special_ids = set(tokenizer.all_special_ids)
    for text, stop, ids, prompt in zip(whole, stops, tokenizer(whole, **options)["input_ids"], prompts, strict=True):
        start = _common(ids, prompt)
        if not special_ids.issuperset(prompt[start:]):
            # Alone, the prompt ends in other tokens than before an answer. One of the two begins as this answer does
            # not, so what all have in common is the prompt's.
            others = tokenizer([text[:stop] + word for word in (_WORD, _OTHER)], **options)["input_ids"]
            start = max(start, min(_common(ids, other) for other in others))
        yield list(ids), start


def _prompt_end(text: str, border: int, kept: str) -> int:
    """Return where the white space before the border begins, all but the characters that are kept."""
    while border and text[border - 1].isspace() and text[border - 1] not in kept:
        border -= 1
    return border


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many ids two sequences begin with alike."""
    differ = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(differ, min(len(first), len(second)))
