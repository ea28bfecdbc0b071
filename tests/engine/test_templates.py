"""Templates, labels, and reading data."""

import json
from pathlib import Path

import pytest
from helpers import TEXTS, tiny_tokenizer

from efface.hf.data import load_rows, token_store
from efface.hf.templates import encode


def labels(tokenizer, store, row: int) -> str:  # type: ignore[no-untyped-def]
    return tokenizer.decode(store[row][store.label_starts[row] :].tolist())


@pytest.mark.parametrize("template", ["auto", "question-answer", "llama-2"])
def test_exactly_the_answer_and_the_end_are_labels(template: str) -> None:
    tokenizer = tiny_tokenizer()
    store = encode(tokenizer, [TEXTS[0]["question"]], [TEXTS[0]["answer"]], template=template)
    assert labels(tokenizer, store, 0).strip() == TEXTS[0]["answer"] + "<|end|>"
    assert store[0][-1] == tokenizer.eos_token_id


def test_a_chat_template() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
    )
    store = encode(tokenizer, ["Who?"], ["Aiko."])
    text = tokenizer.decode(store[0].tolist())
    assert text == "<user>Who?<bot>Aiko.<|end|>"
    assert labels(tokenizer, store, 0) == "Aiko.<|end|>"


def test_a_token_that_straddles_the_border_is_a_label() -> None:
    """The merge of the prompt's last and the answer's first character holds some of the answer."""
    tokenizer = tiny_tokenizer()
    store = encode(tokenizer, ["x"], ["ko"], template="llama-2")
    start = int(store.label_starts[0])
    prompt = tokenizer.decode(store[0][:start].tolist())
    assert "[INST] x [/INST]".startswith(prompt)


def test_max_length_cuts_on_purpose_only() -> None:
    tokenizer = tiny_tokenizer()
    question, answer = TEXTS[0]["question"], TEXTS[0]["answer"]
    whole = encode(tokenizer, [question], [answer])
    cut = encode(tokenizer, [question], [answer], max_length=len(whole[0]) - 2)
    assert cut[0].tolist() == whole[0][:-2].tolist()
    with pytest.raises(ValueError, match="row 0 has no label left.*raise `max_length`"):
        encode(tokenizer, [question], [answer], max_length=int(whole.label_starts[0]))


def test_bad_templates_and_tokenizers() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="`template`: expected one of auto, chat"):
        encode(tokenizer, ["a"], ["b"], template="alpaca")
    with pytest.raises(ValueError, match="no chat template"):
        encode(tokenizer, ["a"], ["b"], template="chat")
    with pytest.raises(ValueError, match="expected equal lengths, got 1, 2"):
        encode(tokenizer, ["a"], ["b", "c"])
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        encode(tokenizer, ["a"], ["b"])


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_files(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{suffix}"
    if suffix == ".csv":
        path.write_text("question,answer\n" + "".join(f"{row['question']},{row['answer']}\n" for row in TEXTS))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in TEXTS))
    assert [dict(row) for row in load_rows(path)] == TEXTS
    assert len(token_store(path, tiny_tokenizer(), name="forget")) == len(TEXTS)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="neither a local file nor a data set on the Hub"):
        load_rows("nobody/no-such-data-set")
    (tmp_path / "rows.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"expected a file of type .json"):
        load_rows(tmp_path / "rows.txt")
    with pytest.raises(ValueError, match="expected a column 'reply', got 'question', 'answer'"):
        token_store(TEXTS, tiny_tokenizer(), name="forget", answer_column="reply")
    with pytest.raises(ValueError, match="some rows have no column 'answer'"):
        token_store([TEXTS[0], {"question": "Who?"}], tiny_tokenizer(), name="forget")


def test_real_tofu_rows(tofu: Path) -> None:
    rows = load_rows(tofu / "forget01.json")
    assert len(rows) == 40
    tokenizer = tiny_tokenizer()
    store = token_store(tofu / "forget01.json", tokenizer, name="forget")
    for row in range(40):
        assert labels(tokenizer, store, row).strip() == rows[row]["answer"].strip() + "<|end|>"
