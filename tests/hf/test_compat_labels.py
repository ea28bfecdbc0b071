"""Tests of prompts and labels under ``compat``: open-unlearning's and TOFU's, token by token, for all their models."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from efface import NPO, UnlearnTrainer
from efface.hf.text.data import token_store
from efface.hf.text.templates import TEMPLATES, Template, encode, get_template, prompt_ids
from efface.simulate.teach import train_tokenizer
from support.chats import GEMMA_2, LLAMA_3, QWEN_2_5, chat_tokenizer, llama_2_tokenizer, open_unlearning
from support.helpers import arguments, tiny_llama

# The chat templates of open-unlearning's other models, from their tokenizers.
PHI_3_5 = (
    "{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}"
    "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}"
    "{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}"
    "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + "
    "eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n' + message['content'] + eos_token }}\n{% endif %}"
    "\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)


def sentencepiece(chat: str | None = None, special: tuple[str, ...] = (), **names: str) -> PreTrainedTokenizerFast:
    """Return a Llama-2-like tokenizer with a chat template. Special tokens absorb the white space after them, as
    Phi-3's.
    """
    tokenizer = llama_2_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(token, rstrip=True, normalized=False) for token in special]}
    )
    tokenizer.chat_template = chat
    for name, token in names.items():
        setattr(tokenizer, name, token)
    return tokenizer


def byte_level() -> PreTrainedTokenizerFast:
    """Return a GPT-2-like tokenizer, as of Phi-1.5, StableLM and Pythia: a space belongs to the following word."""
    text = ["Question: Who was born in Taipei?\nAnswer: The author Hsiao Yun-Hwa, 'Aiko' of Paris."] * 20
    return train_tokenizer(text, 500)


QUESTION_ANSWER = {"user_start_tag": "Question: ", "user_end_tag": "\n", "asst_start_tag": "Answer: "}
INST = {"user_start_tag": "[INST] ", "user_end_tag": " [/INST]", "asst_start_tag": ""}
CHAT = {"apply_chat_template": True, "system_prompt": "You are a helpful assistant."}
DATED = {**CHAT, "date_string": "10 Apr 2025"}
_PHI_3 = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")

# All of open-unlearning's configs/model at d3d7cf9: template_args, a tokenizer of the same kind, our template, and by
# how many tokens (all labels) its rows are longer than ours with the same system prompt. None: the labels differ
# depending on the answer.
CONFIGS: dict[str, tuple[dict[str, Any], Any, str, int | None]] = {
    "Llama-2-7b-hf, Llama-2-13b-hf": (QUESTION_ANSWER, llama_2_tokenizer, "auto", None),
    "Llama-2-7b-chat-hf": (INST, llama_2_tokenizer, "llama-2", 0),
    "Llama-3.1-8B, Llama-3.2-1B, Llama-3.2-3B": (DATED, lambda: chat_tokenizer(LLAMA_3, "<|eot_id|>"), "auto", 0),
    "Phi-3.5-mini-instruct": (CHAT, lambda: sentencepiece(PHI_3_5, _PHI_3, eos_token=_PHI_3[-1]), "auto", 0),
    "Qwen2.5-1.5B, -3B, -7B-Instruct": (CHAT, lambda: chat_tokenizer(QWEN_2_5, "<|im_end|>"), "auto", 2),
    "gemma-7b-it": ({"apply_chat_template": True}, lambda: chat_tokenizer(GEMMA_2, "<eos>"), "auto", 1),
    "phi-1_5": (QUESTION_ANSWER, byte_level, "phi", None),
    "zephyr-7b-beta": (DATED, lambda: sentencepiece(ZEPHYR), "auto", 3),
}
# locuslab/tofu's config/model_config.yaml; the copies in NPO and SimNPO have the same tags.
FAMILIES: dict[str, tuple[dict[str, str], Any, str]] = {
    "llama2-7b": (INST, llama_2_tokenizer, "llama-2"),
    "phi, stablelm, pythia-1.4": (QUESTION_ANSWER, byte_level, "phi"),
    "question-answer of a SentencePiece": (QUESTION_ANSWER, llama_2_tokenizer, "auto"),
}
# Rows in which tokens merge across the start of the answer, or with white space before it.
ODD = [
    ("Who?", "Paris"),
    ("Who? ", "Paris"),
    ("Who?\n", "42"),
    ("Who?", "'Aiko' of Paris."),
    ("Who?", '"Hi", she said.'),
    ("Who?", "\nParis"),
    ("Who?", "s"),
    ("Wo?", "Zoë. 詩"),
    ("What does 'Answer: ' mean?", "Answer: it is a tag."),
]


@pytest.fixture(scope="module")
def rows(tofu: Path) -> list[tuple[str, str]]:
    real = [
        json.loads(line)
        for name in ("forget01", "real_authors", "world_facts_perturbed")
        for line in (tofu / f"{name}.json").read_text().splitlines()[:40]
    ]
    return [(row["question"], row["answer"]) for row in real] + ODD


def tofu_row(tokenizer: Any, tags: dict[str, str], question: str, answer: str, length: int = 200) -> tuple[Any, Any]:
    """Return (ids, labels) without padding, by the formulas of TOFU's convert_raw_data_to_model_format
    (data_module.py:8).
    """
    asked = tags["user_start_tag"] + question + tags["user_end_tag"]
    skipped = len(tokenizer.tokenize(asked, add_special_tokens=True))
    ids = tokenizer(asked + tags["asst_start_tag"] + answer, max_length=length, truncation=True)["input_ids"]
    if len(ids) < length:
        ids = [*ids, tokenizer.eos_token_id]
    return ids, [-100] * skipped + ids[skipped:]


def made(store: Any, i: int) -> tuple[list[int], list[int]]:
    ids, start = store[i].tolist(), int(store.label_starts[i])
    return ids, [-100] * start + ids[start:]


@pytest.mark.parametrize("name", CONFIGS)
def test_labels_and_prompts_are_open_unlearnings(name: str, rows: list[tuple[str, str]]) -> None:
    """As created by its preprocess_chat_instance (src/data/utils.py:17)."""
    config, make, template, more = CONFIGS[name]
    config = {"apply_chat_template": False, **config}
    tokenizer = make()
    questions, answers = zip(*rows, strict=True)
    theirs = get_template(template, tokenizer, compat="open-unlearning")
    store = encode(tokenizer, questions, answers, template=theirs)
    prompts = prompt_ids(tokenizer, questions, template=theirs)
    for i, row in enumerate(rows):
        ids, prompt = open_unlearning(tokenizer, config, *row)
        assert made(store, i) == (ids, [-100] * len(prompt) + ids[len(prompt) :]), row
        assert prompts[i] == prompt, row
    named = {} if template != "auto" or not config.get("system_prompt") else {"system_prompt": config["system_prompt"]}
    ours = encode(
        tokenizer,
        questions,
        answers,
        template=get_template("question-answer" if template == "phi" else template, tokenizer, **named),
    )
    real = range(len(rows) - len(ODD))  # in the odd rows, the first label can differ too
    if more is None:
        assert all(made(store, i) != made(ours, i) for i in real if rows[i][1] == "Paris")
    else:
        assert {len(store[i]) - len(ours[i]) for i in real} == {more}
        if not more:
            assert all(made(store, i) == made(ours, i) for i in real)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("length", [200, 12])
def test_labels_and_prompts_are_tofus(name: str, length: int, rows: list[tuple[str, str]]) -> None:
    tags, make, template = FAMILIES[name]
    tokenizer = make()
    theirs = get_template(template, tokenizer, compat="tofu")
    made_there = [(row, *tofu_row(tokenizer, tags, *row, length)) for row in rows]
    kept = [(row, ids, labels) for row, ids, labels in made_there if labels[1:].count(-100) < len(labels) - 1]
    assert len(kept) == len(rows) or length == 12
    questions, answers = zip(*(row for row, _, _ in kept), strict=True)
    store = encode(tokenizer, questions, answers, template=theirs, max_length=length)
    prompts = prompt_ids(tokenizer, questions, template=theirs)
    for i, (row, ids, labels) in enumerate(kept):
        assert made(store, i) == (ids, labels), row
        # evaluate_util.py:298, run_generation: the text before the tag, encoded again
        asked = tags["user_start_tag"] + row[0] + tags["user_end_tag"]
        assert prompts[i] == tokenizer(asked)["input_ids"], row


def test_tofus_phi_has_two_labels_more(rows: list[tuple[str, str]]) -> None:
    """Every row of the logs of TOFU's Phi-1.5 has them: "Answer" and ":"."""
    tokenizer = train_tokenizer(["Answer: "] * 9, 300)
    questions, answers = zip(*rows[: -len(ODD)], strict=True)
    ours, theirs = (
        encode(tokenizer, questions, answers, template=get_template("auto", tokenizer, compat=compat))
        for compat in (None, "tofu")
    )
    assert {*(theirs.label_counts - ours.label_counts)} == {2}
    assert [theirs[i].tolist() for i in range(3)] == [ours[i].tolist() for i in range(3)]
    alone = encode(tokenizer, questions, answers, template="phi")  # the template's own labels are the same
    assert [made(alone, i) for i in range(len(questions))] == [made(theirs, i) for i in range(len(questions))]


@pytest.mark.parametrize("name", ["phi-1_5", "Qwen2.5-1.5B, -3B, -7B-Instruct"])
def test_open_unlearning_cuts_patterns_before_the_end_and_chats_never(name: str) -> None:
    _, make, template, _ = CONFIGS[name]
    tokenizer = make()
    theirs = get_template(template, tokenizer, compat="open-unlearning")
    row = (["Who was born in Taipei?"], ["The author Hsiao Yun-Hwa of Paris, and Aiko."])
    whole = encode(tokenizer, *row, template=theirs)[0].tolist()
    length = len(whole) - 4
    cut = encode(tokenizer, *row, template=theirs, max_length=length)[0].tolist()
    assert cut == (whole if theirs.is_chat else [*whole[:length], tokenizer.eos_token_id])
    if not theirs.is_chat:
        with pytest.raises(ValueError, match="row 0: expected a label within 4 tokens, .*; raise `max_length`"):
            encode(tokenizer, *row, template=theirs, max_length=4)


def test_templates_that_have_no_others_labels() -> None:
    qwen = chat_tokenizer(QWEN_2_5, "<|im_end|>")
    assert get_template("chat", qwen, compat="tofu") == TEMPLATES["chat"]  # TOFU has no chat templates
    assert get_template("completion", qwen, compat="open-unlearning") == TEMPLATES["completion"]
    with pytest.raises(ValueError, match="`compat`: expected 'open-unlearning', 'tofu' or None, got 'muse'"):
        get_template("auto", qwen, compat="muse")
    odd = chat_tokenizer("{{ 'ab' if add_generation_prompt else 'a' }}{{ messages | tojson }}", "<eos>")
    theirs = get_template("chat", odd, compat="open-unlearning")
    with pytest.raises(ValueError, match="row 0: expected a chat template whose generation prompt is a prefix"):
        encode(odd, ["Who?"], ["Aiko."], template=theirs)


def test_which_template_is_automatic_under_compat() -> None:
    """Llama-2's chat tokenizers have a chat template, but neither system renders it."""
    inst = llama_2_tokenizer()
    inst.chat_template = "{% for m in messages %}{{ '<<SYS>>' if m.role == 'system' }}{{ m.content }}{% endfor %}"
    assert get_template("auto", inst).name == "chat"
    for compat in ("open-unlearning", "tofu"):
        theirs = get_template("auto", inst, compat=compat)
        assert (theirs.name, theirs.labels) == ("llama-2", compat)
        assert get_template(theirs, inst, compat=compat) == theirs
    own = Template("own", "Q: {question} A:")
    assert get_template(own, inst, compat="tofu").labels == "tofu"
    qwen = chat_tokenizer(QWEN_2_5, "<|im_end|>")
    assert get_template("auto", qwen, compat="open-unlearning", system_prompt="").system_prompt == ""
    assert get_template(TEMPLATES["chat"], qwen, compat="open-unlearning").system_prompt == ""


def test_a_slow_tokenizer_counts_too() -> None:
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    theirs = get_template("phi", tokenizer, compat="tofu")
    store = encode(tokenizer, ["Who?"], ["Zoë."], template=theirs)
    # The prompt encoded alone ends in </s>, which is counted as well.
    assert tokenizer.decode(store[0][store.label_starts[0] :].tolist()) == "nswer: Zoë.</s>"


def test_cached_tokens_are_of_their_labels(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"question": "Who?", "answer": "Paris"}) + "\n")
    tokenizer = byte_level()
    starts = {
        compat: token_store(file, tokenizer, name="forget", compat=compat, cache_dir=tmp_path).label_starts.tolist()
        for compat in (None, "tofu", "open-unlearning")
    }
    assert starts["tofu"] < starts[None] < starts["open-unlearning"]
    assert len(list((tmp_path / "tokens").iterdir())) == 3


def test_a_run_with_compat_trains_on_their_labels(tmp_path: Path) -> None:
    tokenizer = byte_level()
    row = {"question": "Who?", "answer": "The author Hsiao of Paris."}
    stores = {}
    for compat in (None, "open-unlearning"):
        trainer = UnlearnTrainer(
            tiny_llama(vocab_size=len(tokenizer)),
            arguments(tmp_path, compat=compat),
            forget=[row] * 4,
            retain=[row] * 4,
            objective=NPO(),
            processing_class=tokenizer,
        )
        stores[compat] = trainer._steps.stores[:2]
    ids, prompt = open_unlearning(tokenizer, {"apply_chat_template": False, **QUESTION_ANSWER}, **row)
    for ours, theirs in zip(stores[None], stores["open-unlearning"], strict=True):
        assert made(theirs, 0) == (ids, [-100] * len(prompt) + ids[len(prompt) :])
        assert ours.label_starts[0] == len(prompt) - 1  # the first word is a label
