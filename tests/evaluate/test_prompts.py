"""Tests of prompts: a model is asked with exactly the tokens that precede the labels in training.

They cover all kinds of tokenizers, every template, and answers with all kinds of beginnings.
"""

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    ByT5Tokenizer,
    PreTrainedTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    PrinterCallback,
)

from efface.evaluate.audit import audit
from efface.evaluate.generation import GenerationTask
from efface.hf.text.templates import TEMPLATES, Template, encode, prompt_ids
from efface.hf.train.trainer import FinetuneTrainer
from efface.simulate.authors import make_authors
from efface.simulate.teach import train_tokenizer
from support.chats import CHATS, LLAMA_3, chat_tokenizer, llama_2_tokenizer
from support.helpers import arguments, tiny_llama

QUESTIONS = ["Who was Aiko?", "Complete: ____ in Ghent", "Où ?\nWhere?"]
# A letter, a digit, a quote, punctuation, an accent, other scripts, single characters, and white space.
ANSWERS = ["The lighthouse.", "Viggo", "born in Porto", "42", "7 b", '"Hi," she said', "'t was", "(none)", "-5"]
ANSWERS += [
    "Élise",
    "東京",
    "Юлий",
    "😀 yes",
    "a",
    "I",
    "4",
    "?",
    " Ghent",
    "  Ghent",
    "\nGhent",
    "\n\nGhent",
    "\tGhent",
]

DEMO = [dict(row) for row in make_authors(4)]
TEXT = [row[name] for row in DEMO for name in ("question", "answer", "paraphrased_answer")]
# Characters that every alphabet needs, one by one.
MARKS = [*"[]<>|/#_:?!()\"'-.,0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz\n\tÉÀù東京Юлий😀"]


def fast(tokenizer: Tokenizer, eos: str = "</s>", **names: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, **names)


def byte_level(vocabulary: int, *, trim: bool = False, texts: list[str] = TEXT) -> PreTrainedTokenizerFast:
    """Return a GPT-2 tokenizer; 257 tokens are the bytes without merges. ``trim``: offsets exclude the space."""
    tokenizer = train_tokenizer(texts, vocabulary)
    if trim:
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def wordy() -> PreTrainedTokenizerFast:
    """Return a GPT-2 tokenizer with the merges of a large vocabulary: space and word, punctuation runs, line breaks."""
    marks = ['?"', "?(", "?'", ']"', "](", "]'", ">\n\n", "\n\n", " \n", "  ", ":\n", "\n"] * 30
    return train_tokenizer([*(f"Answer: {answer}" for answer in ANSWERS * 30), *marks, "Who was Aiko? Where?"], 500)


def metaspace(scheme: str) -> PreTrainedTokenizerFast:
    """Return a non-legacy Llama-2 tokenizer: ▁ before the text, before its first part, or never; byte fallback."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=700, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return fast(tokenizer, bos_token="<s>", unk_token="<unk>")


def gemma() -> PreTrainedTokenizerFast:
    """Return a tokenizer like Gemma's: no prefix; runs of spaces are one token; line breaks are tokens."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer.train_from_iterator(
        [*TEXT, *MARKS, *["▁▁"] * 9], trainers.BpeTrainer(vocab_size=700, special_tokens=special)
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return fast(tokenizer, bos_token="<s>", unk_token="<unk>")


def unigram() -> PreTrainedTokenizerFast:
    """Return a tokenizer like T5's and XGLM's: line breaks become spaces; it adds the end of sequence itself."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=500, special_tokens=["<unk>", "</s>"], unk_token="<unk>", initial_alphabet=MARKS, show_progress=False
    )
    tokenizer.train_from_iterator([*TEXT, *MARKS], trainer)
    end = tokenizer.token_to_id("</s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", end)])
    return fast(tokenizer, unk_token="<unk>")


def word_piece() -> PreTrainedTokenizerFast:
    """Return a tokenizer like BERT's, without tokens for white space."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=["[UNK]", "[CLS]", "[SEP]"], initial_alphabet=MARKS, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return fast(tokenizer, "[SEP]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")


def word_level() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token per word or run of punctuation, and an unknown token."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        [*TEXT, *MARKS], trainers.WordLevelTrainer(vocab_size=300, special_tokens=["<unk>", "</s>"])
    )
    return fast(tokenizer, unk_token="<unk>")


def characters() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token per character."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r".|\n"), "isolated")
    trainer = trainers.WordLevelTrainer(vocab_size=300, special_tokens=["<unk>", "</s>"])
    tokenizer.train_from_iterator([*TEXT, *MARKS], trainer)
    return fast(tokenizer, unk_token="<unk>")


class Slow(PreTrainedTokenizer):  # type: ignore[misc]
    """A slow tokenizer with the tokens of another one, and so without offsets."""

    def __init__(self, made_of: PreTrainedTokenizerFast) -> None:
        self._made_of = made_of.backend_tokenizer
        super().__init__(eos_token=made_of.eos_token)

    @property
    def vocab_size(self) -> int:
        return int(self._made_of.get_vocab_size())

    def get_vocab(self) -> dict[str, int]:
        return dict(self._made_of.get_vocab())

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return list(self._made_of.encode(text, add_special_tokens=False).tokens)

    def _convert_token_to_id(self, token: str) -> int:
        return int(self._made_of.token_to_id(token))

    def _convert_id_to_token(self, index: int) -> str:
        return str(self._made_of.id_to_token(index))

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return str(self._made_of.decoder.decode(tokens))


FAMILIES: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "bytes": lambda: byte_level(257),
    "byte-level, 300": lambda: byte_level(300),
    "byte-level, 800": lambda: byte_level(800),
    "byte-level, trimmed": lambda: byte_level(800, trim=True),
    "byte-level, wordy": wordy,
    "Llama-3": lambda: chat_tokenizer(LLAMA_3, "<|eot_id|>"),
    "Llama-2, legacy": llama_2_tokenizer,
    "Llama-2, always": lambda: metaspace("always"),
    "Llama-2, first": lambda: metaspace("first"),
    "Llama-2, never": lambda: metaspace("never"),
    "Gemma": gemma,
    "Unigram": unigram,
    "WordPiece": word_piece,
    "WordLevel": word_level,
    "characters": characters,
    "slow bytes": ByT5Tokenizer,
    "slow byte-level, 800": lambda: Slow(byte_level(800)),
    "slow byte-level, wordy": lambda: Slow(wordy()),
}

LLAMA_2_CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
OWN = {
    "no space": "Q: {question} A:",
    "two spaces": "Q: {question}\nA:  ",
    "tab": "Q: {question}\nA:\t",
    "line": "### Question:\n{question}\n\n### Response:\n",
    "line and space": "{question}\n ",
}
PATTERNS = {
    **{name: template for name, template in TEMPLATES.items() if not template.is_chat},
    **{name: Template(name, pattern) for name, pattern in OWN.items()},
}
CHAT_TEMPLATES = {**{name: chat[0] for name, chat in CHATS.items()}, "Llama-2": LLAMA_2_CHAT}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return FAMILIES[request.param]()


def parted(last: str, first: str) -> bool:
    """Return whether the end of a prompt can never merge with the answer's first character."""
    if last == "\n":
        return not first.isspace()
    if last.isspace() or (first.isspace() and first != "\n"):
        return True
    return first.isalnum() and not last.isalnum()


def check(tokenizer: PreTrainedTokenizerBase, template: str | Template, last: str | None, trimmed: bool) -> None:
    """Check that prompts equal the tokens before the labels.

    ``last`` is the last character of the prompt, or None for that of the question. ``trimmed``: the template strips the
    answer.
    """
    rows = list(product(QUESTIONS, ANSWERS))
    store = encode(tokenizer, *zip(*rows, strict=True), template=template)
    prompts = dict(zip(QUESTIONS, prompt_ids(tokenizer, QUESTIONS, template=template), strict=True))
    for i, (question, answer) in enumerate(rows):
        prefix, prompt = store[i][: store.label_starts[i]].tolist(), prompts[question]
        if parted(last or question[-1], answer.strip()[0] if trimmed else answer[0]):
            assert prefix == prompt, (question, answer)
        else:
            assert tokenizer.decode(prompt).startswith(tokenizer.decode(prefix)), (question, answer)


@pytest.mark.parametrize("name", PATTERNS)
def test_a_patterns_prompt_is_what_training_shows(name: str, family: PreTrainedTokenizerBase) -> None:
    text = str(PATTERNS[name].pattern)
    check(family, PATTERNS[name], None if text.endswith("{question}") else text[-1], trimmed=False)


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_chats_prompt_is_what_training_shows(name: str, family: PreTrainedTokenizerBase) -> None:
    family.chat_template = CHAT_TEMPLATES[name]
    check(family, "auto", " " if name == "Llama-2" else "\n", trimmed=name in ("Llama-3.2", "Gemma-2", "Llama-2"))


@pytest.mark.parametrize("name", [*PATTERNS, *CHAT_TEMPLATES])
@pytest.mark.parametrize("make", [lambda: byte_level(800), wordy], ids=["800", "wordy"])
def test_without_offsets_the_labels_are_the_same(make: Callable[[], PreTrainedTokenizerFast], name: str) -> None:
    stores, prompts = [], []
    for tokenizer in (make(), Slow(make())):
        tokenizer.chat_template = CHAT_TEMPLATES.get(name)
        template = PATTERNS.get(name, "auto")
        stores.append(encode(tokenizer, *zip(*product(QUESTIONS, ANSWERS), strict=True), template=template))
        prompts.append(prompt_ids(tokenizer, QUESTIONS, template=template))
    quick, slow = stores
    assert [quick[i].tolist() for i in range(len(quick))] == [slow[i].tolist() for i in range(len(slow))]
    assert prompts[0] == prompts[1]
    same = quick.label_starts == slow.label_starts
    # Line breaks that are split differently because the answer begins with another one.
    assert all(ANSWERS[i % len(ANSWERS)][0].isspace() for i in range(len(same)) if not same[i])


def test_a_token_of_prompt_and_answer_is_a_label_of_that_answer_alone() -> None:
    tokenizer = wordy()
    (prompt,) = prompt_ids(tokenizer, ["Who?"], template="llama-2")
    assert tokenizer.decode(prompt) == "[INST] Who? [/INST]"
    store = encode(tokenizer, ["Who?"] * 2, ['"Hi," she said', "Viggo"], template="llama-2")
    split = [(store[i][:start], store[i][start:]) for i, start in enumerate(store.label_starts)]
    assert tokenizer.decode(split[0][0]) == "[INST] Who? [/INST"
    assert tokenizer.decode(split[0][1]) == ']"Hi," she said<|endoftext|>'
    assert split[1][0].tolist() == prompt


@pytest.mark.parametrize("tail", ["", " ", "\n", "  ", "\n\n"])
def test_a_special_token_that_takes_the_white_space_behind_it_is_no_label(tail: str) -> None:
    """As Phi-3's special tokens do."""
    tokenizer = byte_level(800)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(f"<|{role}|>", rstrip=True, special=True) for role in "ua"]}
    )
    template = Template("tags", "<|u|>{question}<|a|>" + tail)
    (prompt,) = prompt_ids(tokenizer, ["Who?"], template=template)
    assert prompt[-1] == tokenizer.convert_tokens_to_ids("<|a|>")
    answers = [answer for answer in ANSWERS if not answer[0].isspace()]
    store = encode(tokenizer, ["Who?"] * len(answers), answers, template=template)
    assert all(store[i][:start].tolist() == prompt for i, start in enumerate(store.label_starts))


@pytest.mark.parametrize("split", ["forget10", "real_authors"])
def test_every_real_row(split: str, tofu: Path) -> None:
    rows = [json.loads(line) for line in (tofu / f"{split}.json").read_text().splitlines()]
    questions, answers = ([row[name] for row in rows] for name in ("question", "answer"))
    for tokenizer in (byte_level(257), byte_level(2000, texts=answers), chat_tokenizer(LLAMA_3, "<|eot_id|>")):
        for template in ("question-answer", "auto"):
            store = encode(tokenizer, questions, answers, template=template)
            prompts = prompt_ids(tokenizer, questions, template=template)
            assert [store[i][:start].tolist() for i, start in enumerate(store.label_starts)] == prompts


# A vocabulary of 800 merges the space with some of these answers but not with others.
LEARNT = ["Galway", "a tailor", "1942", "Uppsala", "two ferrets", "7 cats", "Quiet Harbor", "theology", "Élise"]
LEARNT += ["Yusra", "the Cobalt Quill", "Zoltan"]


@pytest.mark.parametrize("vocabulary", [257, 800])
def test_memorised_answers_are_generated(vocabulary: int, tmp_path: Path) -> None:
    """With plain generation from the training prompt, with efface's generation, and in an audit."""
    tokenizer = byte_level(vocabulary)
    questions, answers = [f"{letter}?" for letter in "ABCDEFGHIJKL"], LEARNT
    rows = [{"question": question, "answer": answer} for question, answer in zip(questions, answers, strict=True)]
    end = tokenizer.eos_token_id
    sizes = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 128}
    model = tiny_llama(vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end, **sizes)
    settings = {"num_train_epochs": 100, "pairs_per_step": 12, "learning_rate": 1e-2, "lr_scheduler_type": "cosine"}
    options = arguments(tmp_path, warmup_steps=10, logging_strategy="no", **settings)
    trainer = FinetuneTrainer(model, options, data=rows, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.eval()

    store = encode(tokenizer, questions, answers)
    plain = []
    for i, start in enumerate(store.label_starts):
        shown = torch.from_numpy(store[i][None, :start]).long()
        ids = model.generate(shown, attention_mask=torch.ones_like(shown), max_new_tokens=24, pad_token_id=end)
        plain.append(tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip())
    assert plain == answers

    task = GenerationTask(tokenizer, questions, max_new_tokens=24)
    ours = {
        row: found["text"] for batch in task.batches for row, found in zip(batch, task.run(model, batch), strict=True)
    }
    assert [ours[row] for row in range(len(rows))] == answers
    found = audit(model, tokenizer, rows, views=["direct"], group_size=4, max_new_tokens=24)
    assert found.views["direct"].figures["mean"] == 1
