"""Tests of generated answers against ``model.generate``, one row at a time; ROUGE against stored logs and by hand."""

import copy
import dataclasses
import inspect
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, MambaConfig, MambaForCausalLM

from efface.evaluate import GenerationTask, Sampling, decoding, generation, rouge_recall
from efface.evaluate.decoding import draw, padding_of, uniforms
from efface.evaluate.generation import empty_texts
from efface.evaluate.runner import NotFiniteError, RowResult
from efface.hf.model.head import fuse
from efface.hf.text.templates import prompt_ids
from support.helpers import TEXTS, tiny_model, tiny_tokenizer

QUESTIONS = [row["question"] for row in TEXTS] + [
    "Who?",
    "And where was the author Bram of Porto born, if at all? " * 3,
]
TOKENIZER = tiny_tokenizer()
ENDS = (TOKENIZER.eos_token_id, *range(7, len(TOKENIZER), 9))
FAMILIES = {
    "LlamaConfig": {"tie_word_embeddings": True},
    "PhiConfig": {"partial_rotary_factor": 0.5},
    "Gemma2Config": {"head_dim": 8, "sliding_window": 24, "query_pre_attn_scalar": 8, "tie_word_embeddings": False},
    "Qwen2Config": {},
    "MistralConfig": {"sliding_window": 24},
    "GPTNeoXConfig": {},
    "GPT2Config": {},  # absolute positions, with which padding that shifts a prompt would show
}


def model_of(config: str = "LlamaConfig", **settings: Any) -> Any:
    """Return a model with large weights, so that it generates varied text. One token in nine ends an answer."""
    made = {"vocab_size": len(TOKENIZER), "max_position_embeddings": 256, "initializer_range": 0.3}
    model = tiny_model(config, **{**made, **FAMILIES[config], **settings})
    model.generation_config = GenerationConfig(eos_token_id=list(ENDS[1:]), pad_token_id=0)
    return model


def one_at_a_time(model: Any, prompts: list[list[int]], limits: list[int]) -> list[RowResult]:
    results = []
    for prompt, limit in zip(prompts, limits, strict=True):
        out = model.generate(
            torch.tensor([prompt]), do_sample=False, eos_token_id=list(ENDS), max_new_tokens=limit, use_cache=True
        )
        new = out[0, len(prompt) :].tolist()
        end = next((i for i, token in enumerate(new) if token in ENDS), None)
        text = TOKENIZER.decode(new[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
        results.append({"text": text, "tokens": len(new[:end]), "ended": end is not None})
    return results


def run(task: GenerationTask, model: Any) -> list[RowResult]:
    results: dict[int, RowResult] = {}
    for batch in task.batches:
        results.update(zip(batch.tolist(), task.run(model, batch), strict=True))
    assert sorted(results) == list(range(len(task.keys)))
    return [results[row] for row in range(len(results))]


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("config", FAMILIES)
def test_answers_are_those_of_generate_one_row_at_a_time(config: str, fused: bool) -> None:
    model = model_of(config)
    prompts = prompt_ids(TOKENIZER, QUESTIONS)
    expected = one_at_a_time(model, prompts, [40] * len(prompts))
    assert len({result["tokens"] for result in expected}) > 2  # they end at different lengths
    if fused:
        fuse(model)
    task = GenerationTask(TOKENIZER, QUESTIONS, max_new_tokens=40)
    assert len(task.batches) == 1
    assert run(task, model) == expected


@pytest.mark.parametrize("budget", [1, 200, 600])
def test_the_budget_cuts_batches_and_changes_no_answer(budget: int) -> None:
    model = model_of()
    whole = GenerationTask(TOKENIZER, QUESTIONS, max_new_tokens=40)
    cut = GenerationTask(TOKENIZER, QUESTIONS, max_new_tokens=40, token_budget=budget)
    assert run(cut, model) == run(whole, model)
    assert cut.keys == whole.keys
    lengths = [len(prompt) for prompt in prompt_ids(TOKENIZER, QUESTIONS)]
    assert sorted(row for batch in cut.batches for row in batch.tolist()) == list(range(len(QUESTIONS)))
    for batch in cut.batches:
        assert len(batch) == 1 or len(batch) * (max(lengths[row] for row in batch) + 40) <= budget
    in_order = [lengths[row] for batch in cut.batches for row in batch.tolist()]
    assert in_order == sorted(lengths, reverse=True)


def test_rows_that_stay_after_their_end_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the host checks only now and then which rows have ended."""
    model, task = model_of(), GenerationTask(TOKENIZER, QUESTIONS, max_new_tokens=40)
    expected = run(task, model)
    monkeypatch.setattr(decoding, "_check_every", lambda _: 7)
    assert run(task, model) == expected


def test_ended_rows_leave_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, task = model_of(), GenerationTask(TOKENIZER, QUESTIONS, max_new_tokens=40)
    rows: list[int] = []
    forward = type(model).forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        rows.append(len(kwargs["input_ids"]))
        return forward(self, *args, **kwargs)

    counted.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(type(model), "forward", counted)
    padding_of(model)  # measured before the first batch
    rows.clear()
    results = run(task, model)
    # A row is read once for its prompt, and once for each generated token except the last one at the limit.
    steps = [result["tokens"] + (1 if result["ended"] else 0) for result in results]
    assert sum(rows) == sum(steps)
    assert len(rows) == max(steps)


def test_max_length_counts_the_rows_own_prompt() -> None:
    model = model_of()
    prompts = prompt_ids(TOKENIZER, QUESTIONS)
    limit = max(map(len, prompts)) + 3
    limits = [limit - len(prompt) for prompt in prompts]
    assert run(GenerationTask(TOKENIZER, QUESTIONS, max_length=limit), model) == one_at_a_time(model, prompts, limits)
    with pytest.raises(
        ValueError, match=r"`max_length`: .* got 9, .* in 1 of 7 rows \(the prompt of row 6 has 98 tokens\)"
    ):
        GenerationTask(TOKENIZER, ["Aiko", *QUESTIONS[:5], QUESTIONS[6]], template="completion", max_length=9)


def test_max_length_counts_padding_where_a_protocol_does() -> None:
    """As in TOFU's evaluation, whose batches of 30 are padded to their longest prompt."""
    model, count = model_of(), 3
    prompts = prompt_ids(TOKENIZER, QUESTIONS)
    limit = max(map(len, prompts)) + 3
    firsts = [i - i % count for i in range(len(prompts))]
    limits = [limit - max(map(len, prompts[first : first + count])) for first in firsts]
    assert len({*limits}) > 1
    task = GenerationTask(TOKENIZER, QUESTIONS, max_length=limit, padded_rows=count)
    assert run(task, model) == one_at_a_time(model, prompts, limits)


@pytest.mark.parametrize("config", ["LlamaConfig", "GPT2Config"], ids=["rotary", "absolute"])
def test_no_token_attends_to_a_hidden_one(config: str) -> None:
    """As transformers generates with a mask that hides the token, and with positions that skip it."""
    model = model_of(config)
    prompts = prompt_ids(TOKENIZER, QUESTIONS)
    hidden = prompts[0][len(prompts[0]) // 2]
    assert sum(hidden in prompt for prompt in prompts) > 1
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        options = {"do_sample": False, "eos_token_id": list(ENDS), "max_new_tokens": 20}
        out = model.generate(ids, attention_mask=ids.ne(hidden).long(), **options)
        new = out[0, len(prompt) :].tolist()
        expected.append(new[: next((i for i, token in enumerate(new) if token in ENDS), None)])
    seen = decoding.decode(model, prompts, [20] * len(prompts), ENDS)
    for answers in (decoding.decode, decoding.generate):
        found = answers(model, prompts, [20] * len(prompts), ENDS, hidden=hidden)
        assert [answer.ids for answer in found] == expected
    assert [answer.ids for answer in seen] != expected
    task = GenerationTask(TOKENIZER, QUESTIONS, max_new_tokens=20, hidden=hidden)
    texts = [TOKENIZER.decode(ids, skip_special_tokens=True).strip() for ids in expected]
    assert [result["text"] for result in run(task, model)] == texts


def test_lora_answers_as_its_merged_model() -> None:
    pytest.importorskip("peft")
    from efface.hf.model.lora import add_lora, merged

    model = add_lora(model_of(), r=4)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    task = GenerationTask(TOKENIZER, QUESTIONS, max_new_tokens=40)
    results = run(task, model.train())
    assert model.training
    plain = merged(model)
    assert results == one_at_a_time(plain.eval(), prompt_ids(TOKENIZER, QUESTIONS), [40] * len(QUESTIONS))
    assert results != run(task, model_of())


def test_a_model_in_training_mode_answers_without_dropout_and_stays_in_it() -> None:
    task = GenerationTask(TOKENIZER, QUESTIONS, max_new_tokens=20)
    expected = run(task, model_of())
    model = model_of(attention_dropout=0.5, use_cache=False).train()
    model.model.layers[0].eval()
    model.gradient_checkpointing_enable()
    state = torch.random.get_rng_state()
    assert run(task, model) == expected
    assert model.training
    assert not model.model.layers[0].training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("selectable", [True, False], ids=["decode", "generate"])
def test_only_the_end_tokens_of_the_generation_config_count(selectable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    task = GenerationTask(TOKENIZER, QUESTIONS, max_new_tokens=40)
    model = model_of()
    expected = run(task, model)
    config = GenerationConfig(
        eos_token_id=list(ENDS[1:]), repetition_penalty=5.0, no_repeat_ngram_size=1, num_beams=2, min_new_tokens=9
    )
    model.generation_config = config
    if not selectable:
        monkeypatch.setattr(generation, "has_selectable_cache", lambda _: False)
        monkeypatch.setattr(generation, "decode", None)
    assert run(task, model) == expected
    assert model.generation_config is config


def test_models_with_a_state_are_known() -> None:
    assert decoding.has_selectable_cache(model_of())
    assert decoding.has_selectable_cache(model_of("Gemma2Config"))
    settings = {"hidden_size": 32, "num_hidden_layers": 1, "state_size": 4, "vocab_size": len(TOKENIZER)}
    mamba = MambaForCausalLM(MambaConfig(**settings, eos_token_id=0, pad_token_id=0, bos_token_id=0)).eval()
    assert not decoding.has_selectable_cache(mamba)
    with pytest.raises(ValueError, match="expected a model whose cache can be repeated"):
        run(GenerationTask(TOKENIZER, ["Who?"], max_new_tokens=4, sampling=Sampling()), mamba)


def test_the_tokenizers_end_ends_answers_that_the_models_do_not() -> None:
    model = model_of()
    model.generation_config.eos_token_id = None
    prompt = prompt_ids(TOKENIZER, QUESTIONS)[0]
    said = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=6)[0, len(prompt) :].tolist()
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(said[5])
    result = run(GenerationTask(tokenizer, QUESTIONS[:1], max_new_tokens=40), model)[0]
    assert (result["ended"], result["tokens"]) == (True, said.index(said[5]))
    endless = copy.deepcopy(TOKENIZER)
    endless.eos_token = None
    with pytest.raises(ValueError, match="answers would never end; set `tokenizer.eos_token`"):
        run(GenerationTask(endless, QUESTIONS[:1], max_new_tokens=4), model)


def test_an_answer_may_be_empty_one_token_or_absent() -> None:
    model = model_of()
    model.generation_config.eos_token_id = list(range(len(TOKENIZER)))
    task = GenerationTask(TOKENIZER, QUESTIONS, max_new_tokens=40)
    assert run(task, model) == [{"text": "", "tokens": 0, "ended": True}] * len(QUESTIONS)
    assert all(
        not r["ended"] and r["tokens"] == 1
        for r in run(GenerationTask(TOKENIZER, QUESTIONS[:3], max_new_tokens=1), no_end(model_of()))
    )
    none = GenerationTask(TOKENIZER, [], max_new_tokens=4)
    assert (list(none.batches), list(none.keys)) == ([], [])


def no_end(model: Any) -> Any:
    model.generation_config.eos_token_id = TOKENIZER.eos_token_id
    return model


def test_bad_input_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    with pytest.raises(ValueError, match="expected `max_new_tokens` or `max_length`, got both"):
        GenerationTask(TOKENIZER, QUESTIONS, max_new_tokens=4, max_length=100)
    with pytest.raises(ValueError, match="`max_new_tokens`: expected at least 1, got 0"):
        GenerationTask(TOKENIZER, QUESTIONS, max_new_tokens=0)
    with pytest.raises(ValueError, match=r"at most 256 tokens \(the model's positions\), got .* in row 6"):
        run(GenerationTask(TOKENIZER, QUESTIONS), model)
    with pytest.raises(ValueError, match="expected token ids below 50 .* use the model's own tokenizer"):
        run(GenerationTask(TOKENIZER, QUESTIONS, max_new_tokens=4), model_of(vocab_size=50))
    with torch.no_grad():
        model.lm_head.weight[5, 3] = float("nan")
    for sampling in (None, Sampling()):
        with pytest.raises(NotFiniteError, match="expected finite logits, got NaN or infinity in row 6"):
            run(GenerationTask(TOKENIZER, QUESTIONS, max_new_tokens=4, sampling=sampling), model)
    monkeypatch.setattr("efface.evaluate.generation.has_selectable_cache", lambda _: False)
    with pytest.raises(NotFiniteError, match="expected finite logits, got NaN or infinity in row 6"):
        run(GenerationTask(TOKENIZER, QUESTIONS, max_new_tokens=4), model)


def test_keys_tell_apart_what_changes_an_answer() -> None:
    tasks = [
        GenerationTask(TOKENIZER, ["Who?"]),
        GenerationTask(TOKENIZER, ["Who? "]),
        GenerationTask(TOKENIZER, ["Who?"], max_new_tokens=100),
        GenerationTask(TOKENIZER, ["Who?"], template="llama-2"),
        GenerationTask(TOKENIZER, ["Who?"], sampling=Sampling()),
        GenerationTask(TOKENIZER, ["Who?"], sampling=Sampling(seed=1)),
        GenerationTask(TOKENIZER, ["Who?"], sampling=Sampling(n=2)),
        GenerationTask(TOKENIZER, ["Who?"], hidden=5),
    ]
    assert len({task.keys[0] for task in tasks}) == len(tasks)
    length = len(prompt_ids(TOKENIZER, ["Who?"])[0])
    assert GenerationTask(TOKENIZER, ["Who?"], max_length=length + 200).keys == tasks[0].keys


SAMPLED = Sampling(n=3, temperature=1.5, top_p=0.9, seed=7)


def test_samples_depend_on_the_row_and_the_seed_alone() -> None:
    model = model_of()
    expected = run(GenerationTask(TOKENIZER, QUESTIONS, max_new_tokens=12, sampling=SAMPLED), model)
    assert all(len(result["texts"]) == len(result["tokens"]) == len(result["ended"]) == 3 for result in expected)
    assert len({text for result in expected for text in result["texts"]}) > 12
    torch.manual_seed(1)
    backwards = GenerationTask(TOKENIZER, QUESTIONS[::-1], max_new_tokens=12, sampling=SAMPLED, token_budget=1)
    assert run(backwards, model)[::-1] == expected
    more = GenerationTask(TOKENIZER, QUESTIONS, max_new_tokens=12, sampling=dataclasses.replace(SAMPLED, n=5))
    assert [result["texts"][:3] for result in run(more, model)] == [result["texts"] for result in expected]
    other = GenerationTask(TOKENIZER, QUESTIONS, max_new_tokens=12, sampling=dataclasses.replace(SAMPLED, seed=8))
    assert run(other, model) != expected


def test_a_cold_sample_is_the_greedy_answer() -> None:
    model = model_of()
    cold = GenerationTask(TOKENIZER, QUESTIONS, max_new_tokens=40, sampling=Sampling(temperature=1e-6))
    greedy = run(GenerationTask(TOKENIZER, QUESTIONS, max_new_tokens=40), model)
    assert [result["texts"][0] for result in run(cold, model)] == [result["text"] for result in greedy]
    narrow = GenerationTask(TOKENIZER, QUESTIONS, max_new_tokens=40, sampling=Sampling(top_p=1e-9))
    assert run(narrow, model) == run(cold, model)


def test_draws_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.1, 0.4, 0.2, 0.3])
    logits = (2 * probabilities.log()).expand(4, 4)  # temperature 2 restores the probabilities
    edges = torch.tensor([0.0, 0.39, 0.41, 0.69], dtype=torch.float64)
    assert draw(logits, edges, Sampling(temperature=2)).tolist() == [1, 1, 3, 3]
    edges = torch.tensor([0.71, 0.89, 0.91, 1 - 1e-12], dtype=torch.float64)
    assert draw(logits, edges, Sampling(temperature=2)).tolist() == [2, 2, 0, 0]
    # 0.4 + 0.3 reach 0.5 but not 0.7000001: two tokens, then three
    assert draw(logits, edges, Sampling(temperature=2, top_p=0.5)).tolist() == [3, 3, 3, 3]
    assert draw(logits, edges, Sampling(temperature=2, top_p=0.75)).tolist() == [3, 2, 2, 2]
    chances = torch.from_numpy(uniforms(Sampling(n=400), b"row", 50)).flatten()
    assert len({number for row in (b"row", b"other") for number in uniforms(SAMPLED, row, 9).flat}) == 2 * 3 * 9
    counts = draw(logits[:1].expand(20000, 4), chances, Sampling(temperature=2)).bincount(minlength=4) / 20000
    assert counts.tolist() == pytest.approx(probabilities.tolist(), abs=0.012)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 0}, "`n`: expected at least 1"),
        ({"temperature": 0.0}, "`temperature`: expected a positive number, got 0.0; for greedy"),
        ({"temperature": float("nan")}, "`temperature`"),
        ({"top_p": 0.0}, "`top_p`: expected more than 0"),
        ({"top_p": 1.5}, "`top_p`"),
    ],
)
def test_bad_sampling_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


def test_a_chat_continues_from_its_turns() -> None:
    history = [
        {"role": "user", "content": "Where was author Aiko born?"},
        {"role": "assistant", "content": "In Ghent."},
        {"role": "user", "content": "Who?"},
    ]
    task = GenerationTask(TOKENIZER, [history, "Who?"], max_new_tokens=20)
    prompts = prompt_ids(TOKENIZER, [history, "Who?"])
    assert run(task, model_of()) == one_at_a_time(model_of(), prompts, [20, 20])
    assert task.keys[0] != task.keys[1]


def test_the_stored_generations_have_the_stored_recall(tofu_eval_logs: Path) -> None:
    log = json.loads((tofu_eval_logs / "llama2-7b_full.json").read_text())
    checked = 0
    for split in log.values():
        rows = split["generated_text"]
        rows = list(rows.values()) if isinstance(rows, dict) else rows
        for i, (_, generated, truth) in enumerate(rows):
            scores = rouge_recall(generated, truth)
            assert scores["rougeL_recall"] == split["rougeL_recall"][str(i)]
            assert scores["rouge1_recall"] == split["rouge1_recall"][str(i)]
            checked += 1
    assert checked == 817


def test_closed_forms_of_rouge() -> None:
    scores = rouge_recall("Lisbon was home. She lived there!", "She lives in Lisbon")
    assert scores["rouge1_recall"] == 3 / 4  # she, live, lisbon
    assert scores["rougeL_recall"] == 2 / 4  # she live
    assert scores["rougeL_f1"] == pytest.approx(2 * 2 / (4 + 6))
    assert rouge_recall("the same", "the same") == {"rouge1_recall": 1.0, "rougeL_recall": 1.0, "rougeL_f1": 1.0}


@pytest.mark.parametrize("text", ["", "  \n", "...", "作家"])
def test_texts_without_words_score_0_and_are_counted(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rouge_recall(text, "an answer") == {"rouge1_recall": 0.0, "rougeL_recall": 0.0, "rougeL_f1": 0.0}
        assert rouge_recall("an answer", text)["rougeL_recall"] == 0
    assert empty_texts([text, "a", "7", "Ä b"]) == 1
