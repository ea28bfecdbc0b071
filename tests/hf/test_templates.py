"""Tests of templates: the text around a question and its answer, and which tokens are labels."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from efface.batching import TokenStore
from efface.hf.text import templates
from efface.hf.text.templates import TEMPLATES, Template, encode, get_template, prompt_ids
from efface.simulate.teach import train_tokenizer
from support.chats import (
    ASSISTANT,
    CHATS,
    GEMMA_2,
    LLAMA_3,
    MISTRAL_NEMO,
    QWEN_2_5,
    QWEN_3,
    USER,
    chat_tokenizer,
    llama_2_tokenizer,
    open_unlearning,
)
from support.helpers import TEXTS, tiny_tokenizer

TRIMMED = ("Llama-3.2", "Gemma-2")


def parts(tokenizer: PreTrainedTokenizerFast, store: TokenStore, row: int = 0) -> tuple[str, str]:
    """Return the text without labels and the text with labels."""
    ids, start = store[row].tolist(), int(store.label_starts[row])
    return tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:])


@pytest.fixture(scope="module")
def real_rows(tofu: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (tofu / "forget01.json").read_text().splitlines()]


@pytest.mark.parametrize(("name", "tag"), [("auto", ""), ("question-answer", ""), ("phi", "Answer: "), ("llama-2", "")])
def test_exactly_the_answer_its_tag_and_the_end_are_labels(name: str, tag: str) -> None:
    tokenizer = tiny_tokenizer()
    store = encode(tokenizer, [TEXTS[0]["question"]], [TEXTS[0]["answer"]], template=name)
    assert parts(tokenizer, store)[1].strip() == tag + TEXTS[0]["answer"] + "<|end|>"
    assert store[0][-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("answer", ["Aiko.", "t", "model", "think", "user\nWho?", " Aiko. \n", "\n\nAiko"])
def test_chat_templates(chat: str, answer: str) -> None:
    """Also if the answer's words occur in the text around it, or if white space surrounds them."""
    text, eos, before, after = CHATS[chat]
    tokenizer = chat_tokenizer(text, eos)
    prompt, labels = parts(tokenizer, encode(tokenizer, ["Who?"], [answer]))
    rendered = answer.strip() if chat in TRIMMED else answer
    if chat == "Qwen3":
        rendered = rendered.lstrip("\n")
    assert prompt + labels == before + rendered + after
    # White space can share a token with the prompt's white space; the token is then a label.
    assert labels.lstrip() == rendered.lstrip() + after
    assert prompt.rstrip() == before.rstrip()


def test_llama_3_is_open_unlearning_token_for_token(real_rows: list[dict[str, str]]) -> None:
    tokenizer = chat_tokenizer(LLAMA_3, "<|eot_id|>")
    config = {
        "apply_chat_template": True,
        "system_prompt": "You are a helpful assistant.",
        "date_string": "10 Apr 2025",
    }
    store = encode(tokenizer, *zip(*((row["question"], row["answer"]) for row in real_rows), strict=True))
    for i, row in enumerate(real_rows):
        ids, prompt = open_unlearning(tokenizer, config, **row)
        assert store[i].tolist() == ids
        assert store.label_starts[i] == len(prompt)


def test_qwen_is_open_unlearning_but_for_the_next_turn(real_rows: list[dict[str, str]]) -> None:
    """open-unlearning adds a line break after the end of the turn, and a second end-of-sequence token."""
    tokenizer = chat_tokenizer(QWEN_2_5, "<|im_end|>")
    config = {"apply_chat_template": True, "system_prompt": "You are a helpful assistant."}
    template = get_template("auto", tokenizer, system_prompt="You are a helpful assistant.")
    for row in real_rows:
        store = encode(tokenizer, [row["question"]], [row["answer"]], template=template)
        ids, prompt = open_unlearning(tokenizer, config, **row)
        assert tokenizer.decode(ids[-3:]) == "<|im_end|>\n<|im_end|>"
        assert store[0].tolist() == ids[:-2]
        assert store.label_starts[0] == len(prompt)


@pytest.mark.parametrize("name", ["llama-2", "question-answer"])
@pytest.mark.parametrize("make", [llama_2_tokenizer, lambda: tiny_tokenizer(600)], ids=["sentencepiece", "byte-level"])
def test_patterns_are_open_unlearning_where_the_prompt_ends_in_no_space(
    name: str, make: Any, real_rows: list[dict[str, str]]
) -> None:
    """In efface the space of "Answer: " is a label, alone or merged with the answer. In open-unlearning it never is."""
    tokenizer = make()
    tags = {"llama-2": ("[INST] ", " [/INST]", ""), "question-answer": ("Question: ", "\n", "Answer: ")}[name]
    config = {
        "apply_chat_template": False,
        **dict(zip(("user_start_tag", "user_end_tag", "asst_start_tag"), tags, strict=True)),
    }
    rows = [*TEXTS, *real_rows]
    store = encode(tokenizer, *zip(*((row["question"], row["answer"]) for row in rows), strict=True), template=name)
    for i, row in enumerate(rows):
        ids, prompt = open_unlearning(tokenizer, config, **row)
        assert store[i].tolist() == ids
        start = int(store.label_starts[i])
        assert start == len(prompt) - (name == "question-answer")
        assert ids[:start] == prompt[:start]


def test_a_token_that_straddles_the_border_is_a_label() -> None:
    tokenizer = llama_2_tokenizer()
    store = encode(tokenizer, ["Who?"], ["Aiko was."], template="question-answer")
    prompt, labels = parts(tokenizer, store)
    assert prompt.endswith("Answer:")
    assert labels == " Aiko was.</s>"


def test_a_tokenizer_without_offsets() -> None:
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    store = encode(tokenizer, ["Who?", "Où?"], ["Zoë.", "Là."], template="question-answer")
    assert parts(tokenizer, store, 0) == ("Question: Who?\nAnswer:", " Zoë.</s>")
    assert parts(tokenizer, store, 1) == ("Question: Où?\nAnswer:", " Là.</s>")


def test_tokenised_in_groups_is_tokenised_alone(
    real_rows: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = chat_tokenizer(LLAMA_3, "<|eot_id|>")
    questions, answers = zip(*((row["question"], row["answer"]) for row in real_rows), strict=True)
    alone = [encode(tokenizer, [question], [answer]) for question, answer in zip(questions, answers, strict=True)]
    chunks = []
    for characters, rows in ((1_000_000, 1000), (1_000_000, 7), (1500, 1000), (1, 1000)):
        monkeypatch.setattr(templates, "_GROUP_CHARACTERS", characters)
        monkeypatch.setattr(templates, "_GROUP_ROWS", rows)
        store = encode(tokenizer, questions, answers)
        chunks.append(len(store.chunks))
        assert [store[i].tolist() for i in range(len(store))] == [one[0].tolist() for one in alone]
        assert store.label_starts.tolist() == [int(one.label_starts[0]) for one in alone]
    assert chunks[0] == 1
    assert chunks[1] == 6
    assert chunks[1] < chunks[2] < chunks[3] == 40


def test_max_length_cuts_on_purpose_only() -> None:
    tokenizer = tiny_tokenizer()
    question, answer = TEXTS[0]["question"], TEXTS[0]["answer"]
    whole = encode(tokenizer, [question], [answer])
    cut = encode(tokenizer, [question], [answer], max_length=len(whole[0]) - 2)
    assert cut[0].tolist() == whole[0][:-2].tolist()
    with pytest.raises(ValueError, match="row 0: expected a label within.*raise `max_length`"):
        encode(tokenizer, [question], [answer], max_length=int(whole.label_starts[0]))
    with pytest.raises(ValueError, match="`max_length`: expected at least 2"):
        encode(tokenizer, [question], [answer], max_length=1)


def test_a_completion_labels_all_of_its_text() -> None:
    tokenizer, bare = chat_tokenizer(LLAMA_3, "<eos>"), tiny_tokenizer()
    text = TEXTS[0]["answer"]
    store = encode(tokenizer, ["", TEXTS[0]["question"] + " "], [text, text], template="completion")
    assert parts(tokenizer, store, 0) == ("<s>", text + "<eos>")
    prompt, labels = parts(tokenizer, store, 1)
    assert (prompt, labels) == ("<s>" + TEXTS[0]["question"], f" {text}<eos>")
    # Without a <s>, nothing precedes the first token to predict it.
    store = encode(bare, [""], [text], template="completion")
    assert store.label_counts.tolist() == [len(store[0]) - 1]
    assert bare.decode(store[0].tolist()) == text + "<|end|>"


@pytest.mark.parametrize("max_length", [2, 3, 7, 16, 1000])
@pytest.mark.parametrize("make", [lambda: chat_tokenizer(LLAMA_3, "<eos>"), tiny_tokenizer], ids=["with <s>", "bare"])
def test_long_documents_are_split_and_nothing_is_lost(make: Any, max_length: int) -> None:
    tokenizer = make()
    documents = [" ".join(row["answer"] for row in TEXTS), TEXTS[1]["answer"]]
    whole = encode(tokenizer, ["", ""], documents, template="completion")
    split = encode(tokenizer, ["", ""], documents, template="completion", max_length=max_length)
    assert split.lengths.max() <= max_length
    labels = [token for i in range(len(split)) for token in split[i][max(1, split.label_starts[i]) :].tolist()]
    assert labels == [token for i in range(2) for token in whole[i][1:].tolist()]
    assert (
        sum(sequence.tolist().count(tokenizer.eos_token_id) for sequence in map(split.__getitem__, range(len(split))))
        == 2
    )
    if tokenizer.bos_token_id is not None:
        assert {int(split[i][0]) for i in range(len(split))} == {tokenizer.bos_token_id}


def test_a_prompt_that_leaves_no_room() -> None:
    with pytest.raises(ValueError, match="row 1: expected a label within"):
        encode(tiny_tokenizer(), ["", "a b c d e f g"], ["text", "text"], template="completion", max_length=5)


def test_which_template_is_automatic() -> None:
    for chat, (text, eos, _, _) in CHATS.items():
        assert get_template("auto", chat_tokenizer(text, eos)).name == ("llama-3" if chat == "Llama-3.2" else "chat")
    assert get_template("auto", tiny_tokenizer()).name == "question-answer"


def test_system_prompt_date_and_templates_of_ones_own() -> None:
    tokenizer = chat_tokenizer(LLAMA_3, "<|eot_id|>")
    template = get_template("llama-3", tokenizer, system_prompt="Be brief.", date_string="1 Jan 2000")
    prompt, _ = parts(tokenizer, encode(tokenizer, ["Who?"], ["Aiko."], template=template))
    assert "Today Date: 1 Jan 2000\n\nBe brief.<|eot_id|>" in prompt
    prompt, _ = parts(
        tokenizer, encode(tokenizer, ["Who?"], ["Aiko."], template=get_template("llama-3", tokenizer, system_prompt=""))
    )
    assert "Today Date: 10 Apr 2025\n\n<|eot_id|>" in prompt
    own = Template("own", "Q: {question} A:")
    assert parts(tokenizer, encode(tokenizer, ["{Who}?"], ["Aiko."], template=own)) == (
        "<s>Q: {Who}? A:",
        "Aiko.<|eot_id|>",
    )


def test_bad_templates_and_tokenizers() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="`template`: expected one of auto, chat, llama-3, llama-2, question-answer"):
        encode(tokenizer, ["a"], ["b"], template="alpaca")
    with pytest.raises(
        ValueError, match="a chat template for 'chat', got one without; use one of llama-2, question-answer"
    ):
        encode(tokenizer, ["a"], ["b"], template="chat")
    with pytest.raises(ValueError, match="expected no system prompt and no date for 'llama-2'"):
        get_template("llama-2", tokenizer, system_prompt="Be brief.")
    with pytest.raises(ValueError, match="expected equal lengths, got 1 and 2"):
        encode(tokenizer, ["a"], ["b", "c"])
    with pytest.raises(ValueError, match="row 1: expected an answer, got ' '; drop the row"):
        encode(tokenizer, ["a", "b"], ["c", " "])
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="expected an end-of-sequence token"):
        encode(tokenizer, ["a"], ["b"])


@pytest.mark.parametrize(
    ("chat_template", "system_prompt", "answer", "message"),
    [
        (GEMMA_2, "Be brief.", "Aiko.", r"rejects the conversation \(System role not supported\); set an empty system"),
        (MISTRAL_NEMO, "Be brief.", "Aiko.", "renders the system prompt, got one that leaves it out"),
        (
            "{% for m in messages %}{{ m.role }}{% endfor %}",
            None,
            "Aiko.",
            "renders the question, got one that leaves it out",
        ),
        (
            "{{ messages[0].content }}",
            None,
            "Aiko.",
            "renders the question, got one that leaves it out",
        ),  # the only text in the message
        (
            "{{ messages[0].content }} {{ messages[0].content }}",
            None,
            "Aiko.",
            "keeps the answer 'Aiko.', got one that changes it",
        ),
        (QWEN_3, None, "Hm </think> Aiko.", "row 0: expected a chat template that keeps the answer 'Hm </think>"),
        ("{% if %}", None, "Aiko.", "rejects the conversation .*use another `template`"),
    ],
)
def test_unusable_chat_templates_are_refused(
    chat_template: str, system_prompt: str | None, answer: str, message: str
) -> None:
    tokenizer = chat_tokenizer(chat_template, "<eos>")
    template = get_template("chat", tokenizer, system_prompt=system_prompt)
    with pytest.raises(ValueError, match=message):
        encode(tokenizer, ["Who?"], [answer], template=template)


def test_every_name_is_a_template() -> None:
    assert all(TEMPLATES[template.name] is template for template in TEMPLATES.values())


ANSWERS = ["The lighthouse", "Who?", "Ghent", "born in Porto."]


@pytest.mark.parametrize("name", CHATS)
def test_a_chats_prompt_is_what_training_puts_before_the_labels(name: str) -> None:
    template, eos, before, _ = CHATS[name]
    tokenizer = chat_tokenizer(template, eos)
    (ids,) = prompt_ids(tokenizer, ["Who?"])
    assert tokenizer.decode(ids) == before
    for answer in ANSWERS:
        store = encode(tokenizer, ["Who?"], [answer])
        assert ids == store[0][: store.label_starts[0]].tolist()
    if name == "Qwen3":
        return  # its generation prompt lacks the think block that its turns contain
    known = get_template("auto", tokenizer)
    turns = [{"role": "system", "content": known.system_prompt}] if known.system_prompt else []
    options = {} if known.date_string is None else {"date_string": known.date_string}
    text = tokenizer.apply_chat_template(
        [*turns, {"role": "user", "content": "Who?"}], tokenize=False, add_generation_prompt=True, **options
    )
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]


def wordy_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer that merges a space with the word after it, as large vocabularies do."""
    return train_tokenizer([*(f"Answer: {answer}" for answer in ANSWERS), "Who was"] * 20, 400)


@pytest.mark.parametrize(
    ("make", "template"),
    [
        (wordy_tokenizer, "question-answer"),
        (wordy_tokenizer, "llama-2"),
        (wordy_tokenizer, "completion"),
        (llama_2_tokenizer, "llama-2"),
    ],
)
def test_a_patterns_prompt_is_what_training_puts_before_the_labels(make: Any, template: str) -> None:
    tokenizer = make()
    (ids,) = prompt_ids(tokenizer, ["Who was Aiko?"], template=template)
    for answer in ANSWERS:
        store = encode(tokenizer, ["Who was Aiko?"], [answer], template=template)
        assert ids == store[0][: store.label_starts[0]].tolist()
    ends = {"question-answer": "\nAnswer:", "llama-2": " [/INST]", "completion": "Aiko?"}
    # not with the space, which belongs to the answer's first token
    assert tokenizer.decode(ids).endswith(ends[template])


HISTORY = [
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Aiko."},
    {"role": "user", "content": "Where?"},
]


def test_earlier_turns_precede_the_question() -> None:
    template, eos, before, _ = CHATS["Llama-3.2"]
    tokenizer = chat_tokenizer(template, eos)
    (ids,) = prompt_ids(tokenizer, [HISTORY])
    assert tokenizer.decode(ids) == f"{before}Aiko.<|eot_id|>{USER}Where?<|eot_id|>{ASSISTANT}"
    plain = llama_2_tokenizer()
    (ids,) = prompt_ids(plain, [HISTORY], template="llama-2")
    assert plain.decode(ids, skip_special_tokens=True).strip() == "[INST] Who? [/INST]Aiko.\n[INST] Where? [/INST]"
    assert ids.count(plain.bos_token_id) == 1
    assert prompt_ids(plain, [HISTORY[:1]], template="llama-2") == prompt_ids(plain, ["Who?"], template="llama-2")


@pytest.mark.parametrize(
    ("turns", "got"),
    [
        (HISTORY[:2], "user, assistant"),
        (HISTORY[1:], "assistant, user"),
        ([], "none"),
        ([{"role": "system", "content": "x"}], "system"),
    ],
)
def test_turns_out_of_order_are_refused(turns: list[dict[str, str]], got: str) -> None:
    with pytest.raises(ValueError, match=f"row 1: expected alternating turns .* got {got}; pass a system prompt"):
        prompt_ids(tiny_tokenizer(), ["Who?", turns])


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="row 0: expected a prompt of at least one token, got ''"):
        prompt_ids(tiny_tokenizer(), [""], template="completion")
    assert prompt_ids(tiny_tokenizer(), []) == []
