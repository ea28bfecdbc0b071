"""Tests of log-likelihoods of answers that share their question: against each answer alone, for common families."""

import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from efface.batching import PackedBatch, TokenStore, pack_store
from efface.evaluate import AnswerTask, mean_logprobs, sum_logprobs
from efface.evaluate.likelihood import ScoredLabels, fill, token_logprobs, tree_tokens
from efface.hf.model.attention import packed_arguments
from efface.hf.model.head import fuse, use_packed_attention
from support.helpers import FAMILIES, TEXTS, VOCABULARY, sequence, tiny_llama, tiny_model, tiny_tokenizer
from support.trees import check_batch, chosen_from, naive_tree

WEIGHTS = 0.3  # large weights: with the default of 0.02 a wrong mask has no visible effect


def build(family: str, **changes: Any) -> Any:
    name, settings = FAMILIES[family]
    return tiny_model(name, **{"initializer_range": WEIGHTS, **settings, **changes})


def alone(model: Any, store: TokenStore, index: int) -> np.ndarray:
    """Return the log-probabilities of one sequence's labels, from the model's own logits."""
    ids, labels = sequence(store, index)
    with torch.no_grad():
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].double()
    chosen = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    return chosen[labels[1:] != -100].numpy()


def check(model: Any, store: TokenStore, tolerance: float = 1e-5) -> None:
    sequences = np.arange(len(store))
    gold = [alone(model, store, i) for i in sequences]
    got = token_logprobs(model, store, sequences, token_budget=30)
    assert [len(values) for values in got] == store.label_counts.tolist()
    for ours, truth in zip(got, gold, strict=True):
        np.testing.assert_allclose(ours, truth, rtol=tolerance, atol=tolerance)


def branching(*, seed: int = 0) -> TokenStore:
    """Return sequences with two prompts and a small vocabulary, so that they branch often; some sequences are equal."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(3, VOCABULARY, n).tolist() for n in (9, 4)]
    prompts[1][:2] = prompts[0][:2]
    rows, starts = [], []
    for _ in range(14):
        prompt = prompts[rng.integers(2)]
        rows.append(prompt + rng.integers(3, 5, rng.integers(1, 9)).tolist())
        starts.append(len(prompt) - int(rng.integers(2)))  # a token that belongs to prompt and answer is a label
    return TokenStore.from_sequences([*rows, rows[0]], [*starts, starts[0]])


def tree_of(store: TokenStore, sequences: Sequence[int]) -> PackedBatch:
    """Return the sequences as evaluation packs them: shared tokens are stored once, last tokens are left out."""
    return pack_store(store, np.array(sequences), share=True, last_tokens=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_tokens_change_no_logprob(family: str) -> None:
    store = branching()
    assert tree_of(store, range(len(store))).shared
    check(build(family), store)


ODD: dict[str, tuple[list[list[int]], list[int]]] = {
    "one sequence": ([[5, 6, 7, 8]], [2]),
    "identical": ([[5, 6, 7], [5, 6, 7], [5, 6, 7]], [1, 1, 1]),
    "identical, other labels": ([[5, 6, 7], [5, 6, 7]], [1, 2]),
    "one the beginning of another": ([[5, 6, 7, 8, 9], [5, 6, 7], [5, 6, 7, 8]], [2, 2, 2]),
    "one-token answers": ([[5, 6, 7], [5, 6, 8], [5, 6, 9]], [2, 2, 2]),
    "two tokens": ([[5, 6], [5, 7], [8, 5]], [1, 1, 1]),
    "no prompt": ([[5, 6, 7], [8, 6, 7], [5, 7]], [0, 0, 0]),
    "nothing in common": ([[5, 6, 7], [8, 6, 7], [9, 5, 5, 5]], [1, 2, 1]),
    "branches of branches": ([[5, 6, 7, 8], [5, 6, 7, 9, 4], [5, 6, 3, 3], [5, 4, 4], [3, 4, 4, 4]], [1, 1, 1, 1, 1]),
    "a prompt longer than the window": ([[*range(3, 30), 5], [*range(3, 30), 6, 7], [*range(3, 26), 3]], [27, 26, 2]),
}


@pytest.mark.parametrize("case", ODD)
@pytest.mark.parametrize("family", ["Llama-3.2, tied", "Mistral, sliding window", "Gemma-2, soft-capped scores"])
def test_odd_trees(family: str, case: str) -> None:
    check(build(family), TokenStore.from_sequences(*ODD[case]))


def labels_of(batch: PackedBatch, monkeypatch: pytest.MonkeyPatch) -> tuple[ScoredLabels, list[list[tuple[int, int]]]]:
    """Return the scored labels and, for each sequence, its labels as (stored token, target).

    The model is replaced by one whose hidden states are the numbers of the tokens.
    """
    stored = "efface.evaluate.likelihood.packed_hidden"
    monkeypatch.setattr(stored, lambda _, batch: batch.label_rows[:, None].double())
    scored = ScoredLabels.of(SimpleNamespace(device=torch.device("cpu")), batch)  # type: ignore[arg-type]
    pairs = list(zip(scored.hidden[:, 0].long().tolist(), scored.targets.tolist(), strict=True))
    places = scored.by_sequence(torch.arange(len(pairs)))
    return scored, [[pairs[place] for place in own] for own in places]


def test_a_tree_holds_every_beginning_once(monkeypatch: pytest.MonkeyPatch) -> None:
    store = TokenStore.from_sequences([[1, 2, 3, 4], [1, 2, 3, 5, 6], [1, 2, 7, 3], [1, 2, 3, 4]], [2, 2, 2, 2])
    tree = tree_of(store, [2, 0, 1, 3])
    assert tree.input_ids.tolist() == [1, 2, 7, 3, 5, 3]  # last tokens predict nothing; no sequence is without a token
    assert tree.position_ids.tolist() == [0, 1, 2, 2, 3, 2]
    assert tree.segment_lengths == (3, 1, 1, 1)
    assert tree.path_lengths == (3, 3, 4, 3)
    assert tree.paths.tolist() == [0, 1, 2, 0, 1, 3, 0, 1, 3, 4, 0, 1, 5]
    assert tree.cu_seqlens.tolist() == [0, 3, 4, 5, 6]
    assert tree.cu_paths.tolist() == [0, 3, 6, 10, 13]
    scored, own = labels_of(tree, monkeypatch)
    assert own == [[(1, 7), (2, 3)], [(1, 3), (3, 4)], [(1, 3), (3, 5), (4, 6)], [(1, 3), (5, 4)]]
    assert len(scored.targets) == 7  # (1, 3) once
    assert tree_tokens(store, np.array([2, 0, 1, 3])) == 6
    apart = pack_store(store, np.arange(4), last_tokens=False)
    assert not apart.shared
    assert apart.input_ids.tolist() == [1, 2, 3, 1, 2, 3, 5, 1, 2, 7, 1, 2, 3]


@pytest.mark.parametrize("seed", range(20))
def test_trees_of_random_sequences(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths spell out their sequences, labels follow them, and a prefix occurs twice only where a sequence ends."""
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, 3, rng.integers(2, 8)).tolist() for _ in range(rng.integers(1, 30))]
    starts = [int(rng.integers(0, len(row))) for row in rows]
    store = TokenStore.from_sequences(rows, starts)
    order = rng.permutation(len(rows)).tolist()
    tree, chosen = tree_of(store, order), chosen_from(store, order)
    check_batch(tree, chosen, share=True, last_tokens=False)
    assert tree.tokens == tree_tokens(store, np.array(order))
    beginnings = {tuple(row[:n]) for row in rows for n in range(1, len(row))}
    contained = [
        n for n, at in enumerate(order) if any(rows[at][:-1] == rows[o][: len(rows[at]) - 1] for o in order[:n])
    ]
    assert tree.tokens <= len(beginnings) + len(contained)
    scored, own = labels_of(tree, monkeypatch)
    pairs = {pair for part in own for pair in part}
    assert len(scored.targets) == len(pairs)  # no label is scored twice
    paths = np.split((tree.paths if tree.shared else torch.arange(tree.tokens)).numpy(), np.cumsum(tree.path_lengths))
    for at, labels, path in zip(order, own, paths, strict=False):
        first = max(starts[at], 1)
        assert [target for _, target in labels] == rows[at][first:]
        assert [token for token, _ in labels] == path[first - 1 :].tolist()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_other_attention_implementations_get_whole_sequences(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, store = build("Llama-3.2, tied"), branching()
    model.set_attn_implementation(attention)
    with pytest.raises(ValueError, match="expected 'efface_varlen' attention for sequences that share tokens, got"):
        packed_arguments(model, tree_of(store, range(len(store))))
    monkeypatch.setattr("efface.hf.reference.score.use_packed_attention", lambda _: None)
    check(model, store)


def test_lora_on_every_layer_and_the_head() -> None:
    peft = pytest.importorskip("peft")
    model = tiny_llama(initializer_range=WEIGHTS, tie_word_embeddings=False)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj", "lm_head"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    check(adapted, branching())


def test_fused_and_training_models_are_left_as_they_were() -> None:
    model, store = fuse(tiny_llama(initializer_range=WEIGHTS, attention_dropout=0.5)).train(), branching()
    attention = model.config._attn_implementation
    twice = [token_logprobs(model, store, np.arange(len(store)), token_budget=99) for _ in range(2)]
    assert all(np.array_equal(a, b) for a, b in zip(*twice, strict=True))  # without dropout
    assert model.training
    model.model.norm.eval()
    token_logprobs(model, store, np.arange(len(store)), token_budget=99)
    assert [module for module in model.modules() if not module.training] == [model.model.norm]
    assert model.config._attn_implementation == attention
    assert all(parameter.grad is None for parameter in model.parameters())


QUESTIONS = [row["question"] for row in TEXTS]
ANSWERS = [
    ["Aiko was born in Ghent.", "In Ghent, Aiko was born.", "Aiko was born in Oslo."],
    ["Bram was born in Porto."],
    ["Dagny was born in Cusco.", "Dagny was born in Cusco."],
    ["Emre", "Emre was", "Emre was born"],
    ["x", "y", "z", "x"],
]


def run_all(model: Any, task: AnswerTask) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = [{}] * len(task.keys)
    for batch in task.batches:
        for row, result in zip(batch, task.run(model, batch), strict=True):
            results[row] = result
    return results


def test_a_task_scores_rows_of_any_number_of_answers() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=256, initializer_range=WEIGHTS).eval()
    task = AnswerTask(tokenizer, QUESTIONS, ANSWERS)
    results = run_all(model, task)
    assert json.loads(json.dumps(results)) == results
    assert [len(row["logprobs"]) for row in results] == [len(answers) for answers in ANSWERS]
    for question, answers, row in zip(QUESTIONS, ANSWERS, results, strict=True):
        for answer, logprobs in zip(answers, row["logprobs"], strict=True):
            prompt = f"Question: {question}\nAnswer: "
            encoded = tokenizer(prompt + answer + tokenizer.eos_token, return_offsets_mapping=True)
            start = next(i for i, (_, end) in enumerate(encoded["offset_mapping"]) if end > len(prompt.rstrip()))
            store = TokenStore.from_sequences([encoded["input_ids"]], [start])
            np.testing.assert_allclose(logprobs, alone(model, store, 0), rtol=1e-5, atol=1e-5)
    means, sums = mean_logprobs(results), sum_logprobs(results)
    assert means[1][0] == pytest.approx(np.mean(results[1]["logprobs"][0]))
    assert sums[4][2] == pytest.approx(np.sum(results[4]["logprobs"][2]))
    equal = results[2]["logprobs"][:2]
    assert equal[0][:-1] == equal[1][:-1]
    assert equal[0][-1] == pytest.approx(equal[1][-1], abs=1e-5)  # from a token of its own, so equal up to rounding


@pytest.mark.parametrize("budget", [1, 40, 100])
def test_results_do_not_depend_on_the_token_budget(budget: int) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=256, initializer_range=WEIGHTS).eval()
    whole = AnswerTask(tokenizer, QUESTIONS, ANSWERS)
    task = AnswerTask(tokenizer, QUESTIONS, ANSWERS, token_budget=budget)
    assert len(whole.batches) == 1 < len(task.batches)
    assert task.keys == whole.keys
    for ours, theirs in zip(run_all(model, task), run_all(model, whole), strict=True):
        for a, b in zip(ours["logprobs"], theirs["logprobs"], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_keys_tell_what_a_result_depends_on() -> None:
    tokenizer = tiny_tokenizer()
    keys = AnswerTask(tokenizer, ["a", "a", "a", "b", "a"], [["x"], ["x", "y"], ["y", "x"], ["x"], ["x"]]).keys
    assert len(set(keys)) == 4
    assert keys[0] == keys[4]
    assert AnswerTask(tokenizer, ["a"], [["x"]], template="completion").keys[0] != keys[0]


def test_batches_fill_the_budget_from_the_largest_row_on() -> None:
    assert [batch.tolist() for batch in fill([3, 50, 7, 3, 10, 4], 14)] == [[1], [4], [2, 5, 0], [3]]
    assert fill([], 14) == []
    sizes = np.random.default_rng(0).integers(1, 20, 200).tolist()
    batches = fill(sizes, 100)
    assert sorted(np.concatenate(batches).tolist()) == list(range(200))
    assert max(sum(sizes[i] for i in batch) for batch in batches) <= 100
    assert len(batches) <= 1.2 * sum(sizes) / 100 + 1


def test_a_batch_is_one_forward_pass_and_shared_tokens_are_in_it_once() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=256)
    task = AnswerTask(tokenizer, QUESTIONS * 2, ANSWERS * 2)
    use_packed_attention(model)  # measured before the first batch
    seen = []
    model.model.embed_tokens.register_forward_hook(lambda _m, _a, out: seen.append(out.shape[1]))
    run_all(model, task)
    store = task._store
    (batch,) = task.batches
    order = np.concatenate([np.arange(*span) for span in task._spans(batch.tolist())])
    tree = naive_tree(chosen_from(store, order), share=True, last_tokens=False)
    assert seen == [len(tree["input_ids"])]
    assert seen[0] < 0.4 * len(tree["paths"])


def test_documents_are_not_split_and_prompts_may_be_empty() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=256)
    texts = [["Aiko was born in Ghent and lives there.", "Bram"], ["Bram"]]
    results = run_all(model, AnswerTask(tokenizer, ["", ""], texts, template="completion", max_length=4))
    assert len(results) == 2
    assert len(results[0]["logprobs"][0]) == 3
    np.testing.assert_allclose(results[0]["logprobs"][1], results[1]["logprobs"][0], rtol=1e-5)


def test_values_that_are_not_finite_are_handed_through() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=256)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    results = run_all(model, AnswerTask(tokenizer, QUESTIONS, ANSWERS))
    assert np.isnan(results[0]["logprobs"][0]).all()
    assert np.isnan(mean_logprobs(results)[0]).all()


def test_bad_input_is_explained() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="row 1: expected a list of at least one answer, got \\[\\]; drop the row"):
        AnswerTask(tokenizer, ["a", "b"], [["x"], []])
    with pytest.raises(ValueError, match="row 0: expected a list of at least one answer, got 'x'"):
        AnswerTask(tokenizer, ["a"], ["x"])
    with pytest.raises(ValueError, match="expected equal lengths, got 2, 1"):
        AnswerTask(tokenizer, ["a", "b"], [["x"]])
    with pytest.raises(ValueError, match="row 1: expected an answer, got ' '"):
        AnswerTask(tokenizer, ["a", "b"], [["x", "y"], ["z", " "]])
    small = tiny_llama(vocab_size=10)
    with pytest.raises(ValueError, match="`answers`: expected token ids in 0 .. 9"):
        run_all(small, AnswerTask(tokenizer, ["a"], [["x"]]))
    short = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=8)
    with pytest.raises(ValueError, match="expected sequences of at most 8 tokens"):
        run_all(short, AnswerTask(tokenizer, QUESTIONS, ANSWERS))
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="expected an end-of-sequence token"):
        AnswerTask(tokenizer, ["a"], [["x"]])


def test_no_rows() -> None:
    task = AnswerTask(tiny_tokenizer(), [], [])
    assert task.keys == []
    assert task.batches == []
    assert task.run(tiny_llama(vocab_size=300), np.empty(0, np.int64)) == []
