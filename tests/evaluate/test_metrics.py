"""Tests of metrics against naive versions: one row at a time, the model's own logits in fp64, Python loops."""

import itertools
import json
import math
import zlib
from typing import Any

import numpy as np
import pytest
import torch

from efface.batching import TokenStore
from efface.evaluate import evaluate_metrics, get_metric, known_metrics, qa_rouge, register_metric
from efface.evaluate.metrics import (
    Attack,
    ExtractionStrength,
    MiaMinK,
    MiaMinKPlusPlus,
    MiaReference,
    Perplexity,
    PrivLeak,
    Reading,
    Rouge,
    TokenTask,
    auc,
    token_statistics,
)
from efface.evaluate.metrics.memorization import ExtractionStrength as Renamed
from efface.evaluate.runner import run_tasks
from efface.hf.text.templates import encode
from efface_kernels import Head
from support.helpers import FAMILIES, TEXTS, random_store, sequence, tiny_llama, tiny_model, tiny_tokenizer

WIDE = {"max_position_embeddings": 256, "vocab_size": 300, "initializer_range": 0.3}
MEMBERS, OTHERS = TEXTS[:3], TEXTS[3:]
NAMES = [name for name in known_metrics() if name not in ("perplexity", "rouge", "privleak", "mia_reference")]


def llama(seed: int = 0) -> Any:
    return tiny_llama(seed=seed, **WIDE)


@pytest.fixture(scope="module")
def taught() -> Any:
    """A model that has learnt some of the answers. With random answers alone, no label would be a first choice."""
    model, store = tiny_llama(**{**WIDE, "initializer_range": 0.02}), encode(tiny_tokenizer(), *columns(TEXTS))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for row in [0, 1, 2, 3, 0, 1, 0] * 12:
        ids, labels = sequence(store, row)
        model(input_ids=ids[None], labels=labels[None]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def columns(rows: list[dict[str, str]]) -> tuple[list[str], list[str]]:
    return [row["question"] for row in rows], [row["answer"] for row in rows]


def distributions(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return (T − 1, V) log-probabilities of all next tokens, in fp64."""
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids[None], use_cache=False).logits[0, :-1].double()
    return logits.log_softmax(-1)


def naive_labels(model: Any, store: TokenStore, row: int) -> list[tuple[float, bool, float, float]]:
    """Return (log p, first choice, mean, std) of every label."""
    ids, labels = sequence(store, row)
    found = []
    for logp, label in zip(distributions(model, ids), labels[1:].tolist(), strict=True):
        if label == -100:
            continue
        p = logp.exp()
        mean = sum(a * b for a, b in zip(p.tolist(), logp.tolist(), strict=True))
        variance = sum(a * (b - mean) ** 2 for a, b in zip(p.tolist(), logp.tolist(), strict=True))
        found.append((logp[label].item(), logp.argmax().item() == label, mean, math.sqrt(variance)))
    return found


def check_statistics(model: Any, store: TokenStore, results: list[dict[str, Any]]) -> None:
    for row, result in enumerate(results):
        truth = list(zip(*naive_labels(model, store, row), strict=True))
        for name, values in zip(("logprobs", "first", "mean", "std"), truth, strict=True):
            np.testing.assert_allclose(result[name], values, rtol=2e-5, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_of_every_family(family: str) -> None:
    """Tied and biased heads, soft-caps and scaled logits."""
    name, settings = FAMILIES[family]
    model = tiny_model(name, **{"initializer_range": 0.3, **settings})
    store = random_store(4, high=12)
    [results] = run_tasks(model, [TokenTask(store, token_budget=25)])
    check_statistics(model, store, results)


def test_the_token_budget_changes_nothing() -> None:
    store, model = random_store(9, vocabulary=300), llama()
    tasks = [TokenTask(store, token_budget=budget) for budget in (1, 30, 10_000)]
    assert [len(task.batches) for task in tasks][::2] == [9, 1]
    assert tasks[0].keys == tasks[2].keys
    alone, *others = run_tasks(model, tasks)
    for result in others:
        for ours, theirs in zip(result, alone, strict=True):
            assert ours["first"] == theirs["first"]
            for name in ("logprobs", "mean", "std"):
                np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk_rows", [1, 3, 7, 100])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_chunks_of_logits(chunk_rows: int, softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((7, 8), (50, 8), (50,)))
    targets = torch.randint(50, (7,), generator=generator)
    found = token_statistics(hidden, Head(weight, bias, softcap), targets, chunk_rows=chunk_rows)
    z = hidden.double() @ weight.double().t() + bias.double()
    logp = (z if softcap is None else softcap * torch.tanh(z / softcap)).log_softmax(-1)
    mean = (logp.exp() * logp).sum(-1)
    torch.testing.assert_close(found.logprobs.double(), logp.gather(1, targets[:, None])[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.mean.double(), mean, atol=1e-5, rtol=1e-5)
    std = (logp.exp() * (logp - mean[:, None]) ** 2).sum(-1).sqrt()
    torch.testing.assert_close(found.std.double(), std, atol=1e-5, rtol=1e-5)
    assert found.first.tolist() == (logp.argmax(-1) == targets).tolist()


def test_closed_forms() -> None:
    """A uniform distribution: log V, no deviation, the lowest id as first choice; and one token of probability 1."""
    hidden, targets = torch.ones(2, 1), torch.tensor([0, 1])
    flat = token_statistics(hidden, Head(torch.zeros(11, 1)), targets)
    assert flat.first.tolist() == [True, False]
    torch.testing.assert_close(flat.logprobs, torch.full((2,), -math.log(11)))
    torch.testing.assert_close(flat.mean, torch.full((2,), -math.log(11)))
    assert flat.std.max() < 1e-3
    sure = token_statistics(hidden, Head(torch.tensor([[0.0], [-torch.inf], [-torch.inf]])), torch.tensor([0, 0]))
    assert sure.logprobs.tolist() == sure.mean.tolist() == sure.std.tolist() == [0, 0]
    nothing = token_statistics(torch.empty(0, 1), Head(torch.zeros(11, 1)), torch.empty(0, dtype=torch.int64))
    assert nothing.logprobs.shape == (0,)


@pytest.mark.parametrize("scale", [1e-3, 14.0])
def test_deviations_far_below_and_above_the_mean(scale: float) -> None:
    """Nearly uniform, where E[x²] − E[x]² in fp32 is rounding noise; and one token of nearly all probability."""
    z = scale * torch.randn(1000, 1, generator=torch.Generator().manual_seed(0))
    found = token_statistics(torch.ones(1, 1), Head(z), torch.tensor([0]))
    logp = z[:, 0].double().log_softmax(0)
    truth = (logp.exp() * (logp - (logp.exp() * logp).sum()) ** 2).sum().sqrt()
    assert found.std.item() == pytest.approx(truth.item(), rel=2e-3)


def naive_auc(members: list[float], others: list[float]) -> float:
    pairs = list(itertools.product(members, others))
    return sum((a < b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)


@pytest.mark.parametrize("seed", range(10))
def test_auc(seed: int) -> None:
    rng = np.random.default_rng(seed)
    members = rng.integers(0, 5, rng.integers(1, 9)).tolist()  # with ties
    others = rng.integers(0, 7, rng.integers(1, 9)).tolist()
    assert auc(members, others) == pytest.approx(naive_auc(members, others), abs=1e-12)
    assert auc([1.0] * 3, [1.0] * 2) == 0.5
    assert auc([0.0], [1.0]) == 1
    assert auc([1.0], [0.0]) == 0


def naive_scores(name: str, model: Any, rows: list[dict[str, str]], reference: Any = None) -> list[float]:
    """Compute the metric row by row, as written in the papers and with open-unlearning's conventions."""
    tokenizer = tiny_tokenizer()
    store = encode(tokenizer, *columns(rows))
    scores = []
    for row in range(len(store)):
        labels = naive_labels(model, store, row)
        loss = -sum(label[0] for label in labels) / len(labels)
        words = labels[:-1]  # without the end of sequence
        n = len(words)
        if name == "probability":
            scores.append(math.exp(-loss))
        elif name == "exact_memorization":
            scores.append(sum(label[1] for label in words) / n)
        elif name == "extraction_strength":
            k = next((k for k in range(n) if all(label[1] for label in words[k:])), n - 1)
            scores.append(1 - k / n)
        elif name == "mia_loss":
            scores.append(loss)
        elif name == "mia_zlib":
            ids, marks = sequence(store, row)
            text = tokenizer.decode(ids[marks != -100], skip_special_tokens=True)
            scores.append(loss / len(zlib.compress(bytes(text, "utf-8"))))
        elif name == "mia_min_k":
            least = sorted(label[0] for label in words)[: max(1, int(0.4 * n))]
            scores.append(-sum(least) / len(least))
        elif name == "mia_min_k_plus_plus":
            ratios = sorted((label[0] - label[2]) / math.sqrt(max(label[3] ** 2, 1e-6)) for label in words)
            least = ratios[: max(1, int(0.4 * n))]
            scores.append(-sum(least) / len(least))
        else:
            other = [label[0] for label in naive_labels(reference, store, row)]
            scores.append(loss + sum(other) / len(other))
    return scores


def scores(result: dict[str, Any]) -> list[float]:
    return [row["score"] for row in result["value_by_index"].values()]


def test_every_metric_against_a_naive_one(taught: Any) -> None:
    reference = llama(1)
    found = evaluate_metrics(
        taught, tiny_tokenizer(), MEMBERS, [*NAMES, "mia_reference"], holdout=OTHERS, reference_model=reference
    )
    assert list(found) == [*NAMES, "mia_reference"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    for name, result in found.items():
        members = naive_scores(name, taught, MEMBERS, reference)
        if not issubclass(known_metrics()[name], Attack):
            np.testing.assert_allclose(scores(result), members, rtol=2e-4, err_msg=name)
            assert result["agg_value"] == pytest.approx(sum(members) / len(members), rel=2e-4)
            continue
        others = naive_scores(name, taught, OTHERS, reference)
        np.testing.assert_allclose(scores(result["forget"]), members, rtol=2e-4, err_msg=name)
        np.testing.assert_allclose(scores(result["holdout"]), others, rtol=2e-4, err_msg=name)
        assert result["agg_value"] == result["auc"] == pytest.approx(naive_auc(members, others))
        assert result["forget"]["agg_value"] == pytest.approx(sum(members) / len(members), rel=2e-4)
    # the model has learnt something, otherwise zeros would be compared
    assert found["exact_memorization"]["agg_value"] > 0.3
    assert len(set(scores(found["extraction_strength"]))) > 1


def stub(first: list[bool]) -> dict[str, Any]:
    zeros = [0.0] * len(first)
    return {"logprobs": zeros, "first": first, "mean": zeros, "std": zeros}


@pytest.mark.parametrize(
    ("first", "floored", "strict"),
    [
        ([True], 1.0, 1.0),
        ([False], 1.0, 0.0),  # open-unlearning's search ends at the last token
        ([True, True, True, True], 1.0, 1.0),
        ([False, True, True, True], 0.75, 0.75),
        ([True, False, True, True], 0.5, 0.5),
        ([True, True, True, False], 0.25, 0.0),
    ],
)
@pytest.mark.parametrize("end", [True, False])
def test_extraction_strength_by_hand(
    first: list[bool], floored: float, strict: float, end: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not matter whether the end of sequence is predicted."""
    monkeypatch.setattr(TokenTask, "run", lambda _, __, rows: [stub([*first, end]) for _ in rows])
    tokenizer = tiny_tokenizer()
    answer = tokenizer.decode(tokenizer("Ghent Porto Cusco Tartu Galway").input_ids[: len(first)])
    rows = [{"question": "?", "answer": answer}]
    if encode(tokenizer, *columns(rows)).label_counts[0] != len(first) + 1:
        pytest.skip("the tokenizer merges the answer with the text before it")
    for floor, score in ((True, floored), (False, strict)):
        found = evaluate_metrics(llama(), tokenizer, rows, [ExtractionStrength(floor=floor)])
        assert found["extraction_strength"]["agg_value"] == score


@pytest.mark.parametrize("metric", [MiaMinK(k=0.01), MiaMinKPlusPlus(k=0.01)])
def test_a_share_of_no_token_is_one_token(metric: Attack) -> None:
    """For answers of one token; and with all scores equal, where the AUC is 0.5."""
    rows = [{"question": "Where?", "answer": "x"}] * 3
    found = evaluate_metrics(llama(), tiny_tokenizer(), rows, [metric], holdout=rows[:2])[metric.name]
    assert found["auc"] == 0.5
    assert math.isfinite(found["forget"]["agg_value"])


def test_a_model_that_knows_nothing_scores_zero_in_min_k_plus_plus() -> None:
    model = llama()
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    found = evaluate_metrics(model, tiny_tokenizer(), MEMBERS, ["mia_min_k_plus_plus"], holdout=OTHERS)
    assert scores(found["mia_min_k_plus_plus"]["forget"]) == pytest.approx([0, 0, 0], abs=1e-2)


def test_privleak() -> None:
    tokenizer, model = tiny_tokenizer(), llama()
    tell = {"holdout": OTHERS}
    value = evaluate_metrics(model, tokenizer, MEMBERS, ["mia_min_k"], **tell)["mia_min_k"]["agg_value"]
    for retain in (0.0, 0.25, 0.5, value):
        leak = evaluate_metrics(model, tokenizer, MEMBERS, ["privleak"], retain_values={"mia_min_k": retain}, **tell)[
            "privleak"
        ]
        assert leak["agg_value"] == pytest.approx(100 * (retain - value) / (1 - retain), abs=1e-6)
    of_loss = PrivLeak(attack=get_metric("mia_loss"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="privleak: expected 'mia_loss' of a model trained only on the retain set"):
        evaluate_metrics(model, tokenizer, MEMBERS, [of_loss], retain_values={"mia_min_k": 0.5}, **tell)
    with pytest.raises(ValueError, match="mia_reference: expected a reference model|privleak: expected a reference"):
        evaluate_metrics(model, tokenizer, MEMBERS, [PrivLeak(attack=MiaReference())], **tell)
    for bad in (1.5, math.nan, -0.1):
        with pytest.raises(ValueError, match="between 0 and 1"):
            evaluate_metrics(model, tokenizer, MEMBERS, ["privleak"], retain_values={"mia_min_k": bad}, **tell)


def test_rouge_of_any_questions(taught: Any) -> None:
    tokenizer = tiny_tokenizer()
    rows = [{"ask": row["question"], "say": row["answer"]} for row in TEXTS]
    reading = Reading(question_column="ask", answer_column="say", max_new_tokens=12)
    found = qa_rouge(taught, tokenizer, rows, reading=reading)
    row = found["value_by_index"]["0"]
    assert row["score"] == row["rougeL_recall"]
    assert found["agg_value"] == pytest.approx(np.mean(scores(found)))
    first = evaluate_metrics(taught, tokenizer, rows, [Rouge(rouge_type="rouge1_recall")], reading=reading)["rouge"]
    assert scores(first) == [row["rouge1_recall"] for row in found["value_by_index"].values()]
    with pytest.raises(ValueError, match="`rouge_type`: expected one of rouge1_recall, rougeL_recall, rougeL_f1, got"):
        Rouge(rouge_type="rouge9")
    with pytest.raises(ValueError, match="expected a column of questions to generate answers to"):
        qa_rouge(taught, tokenizer, rows, reading=Reading(question_column=None, answer_column="say"))


LONG = [" ".join(row["answer"] for row in TEXTS), TEXTS[0]["answer"], TEXTS[1]["question"] * 3]


@pytest.mark.parametrize(("window", "stride"), [(2, 1), (8, 1), (8, 3), (8, 7), (10_000, 5)])
def test_perplexity_against_a_loop_over_tokens(window: int, stride: int) -> None:
    """Each token is scored once, in the first window that contains it. A single window gives the model's own loss."""
    tokenizer, model = tiny_tokenizer(), llama()
    total, tokens = 0.0, 0
    truth = []
    for text in LONG:
        ids = tokenizer(text, return_tensors="pt").input_ids[0]
        logprobs = []
        for at in range(1, len(ids)):
            begin = next(b for b in range(0, len(ids), stride) if b + window > at)
            logprobs.append(distributions(model, ids[begin : at + 1])[-1][ids[at]].item())
        truth.append(math.exp(-sum(logprobs) / len(logprobs)))
        total, tokens = total + sum(logprobs), tokens + len(logprobs)
    metric = Perplexity(window=window, stride=stride)
    reading = Reading(question_column=None, answer_column="text", token_budget=50)
    found = evaluate_metrics(model, tokenizer, [{"text": text} for text in LONG], [metric], reading=reading)
    assert scores(found["perplexity"]) == pytest.approx(truth, rel=1e-3)
    assert found["perplexity"]["agg_value"] == pytest.approx(math.exp(-total / tokens), rel=1e-3)
    assert found["perplexity"]["tokens"] == tokens


def test_windows_that_do_not_fit() -> None:
    for window, stride in ((8, 8), (8, 0), (1, 1)):
        with pytest.raises(ValueError, match="`stride`: expected at least 1 and less than the window"):
            Perplexity(window=window, stride=stride)
    with pytest.raises(ValueError, match=r"forget, row 1: expected a text of at least 2 tokens, got 'x'"):
        evaluate_metrics(
            llama(),
            tiny_tokenizer(),
            [{"answer": "x y z"}, {"answer": "x"}],
            ["perplexity"],
            reading=Reading(question_column=None),
        )
    with pytest.raises(ValueError, match="expected sequences of at most 256 tokens"):
        evaluate_metrics(llama(), tiny_tokenizer(), [{"question": "", "answer": "x y " * 500}], ["perplexity"])


def test_missing_arguments_are_reported_before_anything_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TokenTask, "run", None)
    tokenizer, model = tiny_tokenizer(), llama()

    def refused(message: str, *arguments: Any, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            evaluate_metrics(model, tokenizer, *arguments, **options)

    refused(
        "metric: expected one of exact_memorization, extraction_strength, .*privleak.*, got 'mia_'", MEMBERS, ["mia_"]
    )
    refused("`metrics`: expected at least one, each only once, got none", MEMBERS, [])
    refused("each only once, got mia_loss, mia_loss", MEMBERS, ["mia_loss", "mia_loss"])
    refused("mia_loss: expected a holdout", MEMBERS, ["mia_loss"])
    refused("holdout: expected at least one row, got none", MEMBERS, ["mia_loss"], holdout=[])
    refused("forget: expected at least one row, got none", [], ["probability"])
    refused("mia_reference: expected a reference model", MEMBERS, ["mia_reference"], holdout=OTHERS)
    refused("expected a column 'ask'", MEMBERS, ["probability"], reading=Reading(question_column="ask"))
    refused(
        "forget, row 1: expected a question and an answer with text, got 'q', ' '",
        [MEMBERS[0], {"question": "q", "answer": " "}],
        ["probability"],
    )
    for bad in (0, 1.1, -0.5):
        with pytest.raises(ValueError, match="`k`: expected a share of the tokens"):
            MiaMinK(k=bad)
    with pytest.raises(ValueError, match=r"metric 'mia_min_k': expected parameters from \(k\), got share"):
        get_metric("mia_min_k", share=0.1)
    with pytest.raises(ValueError, match=r"metric 'mia_loss': expected parameters from \(none\), got k"):
        get_metric("mia_loss", k=0.1)


@pytest.mark.parametrize("name", [*NAMES, "perplexity"])
def test_a_broken_model_gets_no_score(name: str) -> None:
    """Not even if a first choice can be computed from NaN."""
    model = llama()
    with torch.no_grad():
        model.get_input_embeddings().weight[tiny_tokenizer()("Bram").input_ids[0]] = math.nan
    rows = [{"question": "?", "answer": "x y z"}, MEMBERS[1]]
    with pytest.raises(
        FloatingPointError, match=r"(forget|holdout), row \d+: expected finite log-prob.* of '.*', got nan"
    ):
        evaluate_metrics(model, tiny_tokenizer(), rows, [name], holdout=OTHERS)


def test_a_name_is_taken_once() -> None:
    assert register_metric(Renamed) is ExtractionStrength

    class Other(Renamed):
        pass

    with pytest.raises(ValueError, match="metric 'extraction_strength': already registered by"):
        register_metric(Other)


def test_results_are_kept_by_model(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second metric needs the same tokens again, but a reference model must not reuse the first model's results."""
    tokenizer, store = tiny_tokenizer(), tmp_path / "rows.db"
    one = evaluate_metrics(llama(), tokenizer, MEMBERS, ["mia_loss"], holdout=OTHERS, store=store)
    both = evaluate_metrics(
        llama(), tokenizer, MEMBERS, ["mia_reference"], holdout=OTHERS, store=store, reference_model=llama(1)
    )
    row = both["mia_reference"]["forget"]["value_by_index"]["0"]
    assert row["target_loss"] == one["mia_loss"]["forget"]["value_by_index"]["0"]["score"]
    assert row["ref_loss"] != row["target_loss"]
    monkeypatch.setattr(TokenTask, "run", None)
    again = evaluate_metrics(
        llama(), tokenizer, MEMBERS, ["mia_reference"], holdout=OTHERS, store=store, reference_model=llama(1)
    )
    assert again == both
