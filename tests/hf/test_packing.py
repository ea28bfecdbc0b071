"""Tests of reading packs: for every model, a pack gives the same as separate passes, or the model is rejected."""

import contextlib
import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from efface import NPO, RMU, GradDiff, UnlearnTrainer
from efface.batching import StepTotals, TokenStore, pack, pack_store
from efface.evaluate.decoding import decode, generate, has_selectable_cache, padding_of
from efface.evaluate.likelihood import token_logprobs
from efface.hf.model import packing
from efface.hf.model.attention import NAME
from efface.hf.model.head import fuse, unfuse, use_packed_attention
from efface.hf.model.head_loss import HeadLoss
from efface.hf.model.packing import MEMORY, PackReading, reading_of
from efface.hf.reference.live import LiveReference
from efface.hf.reference.score import store_logprobs
from support.helpers import LONG, NOT_BUILT, arguments, perturbed, random_store, sequence, tiny_decoder, tiny_llama

ALONE = "one sequence per pass"
SAID = "runs one sequence per pass, which is slower than packed batches and gives the results of separate passes"
OLD = transformers.__version__.startswith("4.")
ONE = StepTotals(retain_tokens=1)  # means over one token, that is, sums


def rows_of(*lengths: int) -> TokenStore:
    """Return sequences whose first thirds, the prompts, begin with the same tokens."""
    rng = np.random.default_rng(0)
    common = rng.integers(3, 90, max(lengths) // 3).tolist()
    rows = [[*common[: n // 3], *rng.integers(3, 90, n - n // 3).tolist()] for n in lengths]
    return TokenStore.from_sequences(rows, [n // 3 for n in lengths])


STORE = rows_of(7, 20, 2, 13)


def way(model: Any) -> str:
    reading = reading_of(model)
    assert reading is not None
    return ALONE if reading.alone else reading.attention


def quietly(model: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f".*{SAID}")
        return fuse(model, **options)


def separate_losses(model: Any, store: TokenStore) -> Tensor:
    """Return each sequence's summed NLL from a separate pass, in a copy that has processed no other sequence."""
    losses = []
    for index in range(len(store)):
        ids, labels = sequence(store, index)
        for module in model.modules():  # dynamic NTK remembers longer sequences
            if getattr(module, "rope_type", None) == "dynamic":
                module.inv_freq = module.original_inv_freq
                module.max_seq_len_cached = module.original_max_seq_len
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum"))
    return torch.stack(losses)


def check_scores(model: Any, store: TokenStore = STORE) -> None:
    """Assert that log-probabilities of a pack and of a tree are those of separate passes. The model is changed."""
    with torch.no_grad():
        expected = -separate_losses(model, store)
    quietly(model)
    torch.testing.assert_close(store_logprobs(model, store), expected, rtol=1e-5, atol=2e-4)
    trees = token_logprobs(model, store, np.arange(len(store)), token_budget=1000)
    torch.testing.assert_close(torch.tensor([row.sum() for row in trees]), expected, rtol=1e-5, atol=2e-4)


def check_training(model: Any, store: TokenStore = STORE) -> None:
    """Assert that the loss and every gradient, of a pack and of a tree, are those of separate passes.

    The model is changed.
    """
    twin = copy.deepcopy(model)
    expected = separate_losses(twin, store).sum()
    expected.backward()
    gradients = dict(twin.named_parameters())
    quietly(model)
    for share in (False, True):
        batch = pack_store(store, np.arange(len(store)), share=share, last_tokens=not share)
        assert batch.shared == share
        model.zero_grad(set_to_none=True)
        out = model(batch=batch, loss=HeadLoss(None, ONE))
        out.loss.backward()
        torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-4)
        for name, parameter in model.named_parameters():
            expected_grad = gradients[name].grad
            if expected_grad is not None:
                torch.testing.assert_close(parameter.grad, expected_grad, rtol=1e-3, atol=1e-3, msg=name)


# ---- every class ----

WAYS = {
    "llama": NAME,
    "gpt2": NAME,
    "opt": NAME,
    "gemma2": NAME,
    "xglm": ALONE,  # its attention takes no packed arguments
    "bart": ALONE,
    "bloom": ALONE,
    "falcon": ALONE,
    "openai-gpt": ALONE,
    "gpt_oss": ALONE,  # attention sinks
    "mamba": ALONE,
    "jamba": ALONE,
    "recurrent_gemma": ALONE,
    "stablelm": "eager",
    "nemotron": "eager",
    "llama4_text": "eager",  # attends to chunks
}


@pytest.mark.parametrize(("kind", "expected"), WAYS.items(), ids=WAYS)
def test_packs_equal_separate_passes(kind: str, expected: str) -> None:
    model = tiny_decoder(kind)
    check_training(copy.deepcopy(model))
    check_scores(model)
    # transformers 4 does not pass packs to the own attention of some models, which the measurement detects.
    assert way(model) == expected or (OLD and way(model) == ALONE)
    reading = reading_of(model)
    assert reading is not None
    assert reading.shares == (way(model) == NAME)


@pytest.mark.parametrize("kind", ["bert", "modernbert-decoder", "xlnet", "electra"])
def test_models_without_a_causal_head_are_refused(kind: str) -> None:
    model = tiny_decoder(kind)
    with pytest.raises(ValueError, match="logits are not those of its head|causal language model|expected a head for"):
        fuse(model)
    with pytest.raises(ValueError, match="logits are not those of its head|causal language model|expected a head for"):
        store_logprobs(model, STORE)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "xglm", "bart", "stablelm", "gpt_oss", "mixtral", "bloom"])
def test_half_precision_sees_the_same(kind: str) -> None:
    model = tiny_decoder(kind)
    half = quietly(copy.deepcopy(model).bfloat16())
    assert way(half) == way(quietly(model))


SERVED = 139  # model types of transformers 5.23; other versions can have more


@LONG
def test_every_causal_class(capsys: pytest.CaptureFixture[str]) -> None:
    outcomes: dict[str, str] = {}
    for kind in sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(NOT_BUILT)):
        outcomes[kind] = outcome(kind)
        with capsys.disabled():
            print(f"{kind:28} {outcomes[kind]}", flush=True)
    with capsys.disabled():
        print(*(f"{kind:28} not built: {reason}" for kind, reason in NOT_BUILT.items()), sep="\n")
    wrong = {kind: found for kind, found in outcomes.items() if found.startswith("WRONG")}
    assert not wrong
    assert sum(not found.startswith("refused") for found in outcomes.values()) >= SERVED


def outcome(kind: str) -> str:
    """Return how a model type reads packs, or why it is rejected; "WRONG: ..." for a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = tiny_decoder(kind)
        except Exception as error:  # noqa: BLE001 - reported in the table
            return f"WRONG: does not build: {type(error).__name__}: {error}"
        expected = packing._expected(model, None, PackReading("", "eager"))
        try:
            check_scores(model)
            found = way(model)
            half = way(fuse(tiny_decoder(kind).bfloat16()))
            assert half in {found, ALONE}, f"half precision: {half}"
            careful = [ALONE, "eager", NAME]
            unmeasured = ALONE if expected.alone else expected.attention
            assert careful.index(unmeasured) <= careful.index(found), f"without weights: {unmeasured}"
        except ValueError as error:
            return f"refused: {error}"
        except Exception as error:  # noqa: BLE001 - reported in the table
            return f"WRONG: {type(error).__name__}: {error}"
    return found


def test_a_pack_may_be_longer_than_a_models_own_mask() -> None:
    """GPT-Neo keeps a causal mask for as many tokens as it has positions, here 64."""
    check_scores(tiny_decoder("gpt_neo"), rows_of(20, 20, 20, 20))
    check_training(tiny_decoder("gpt_neo"), rows_of(20, 20, 20, 20))


# ---- rotary scalings ----

LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0, 5.0, 9.0, 17.0], "factor": 8.0}
SCALINGS: dict[str, tuple[dict[str, Any], int | None]] = {
    "none": ({"rope_type": "default"}, None),
    "linear": ({"rope_type": "linear", "factor": 4.0}, None),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        None,
    ),
    "yarn": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, None),
    "dynamic": ({"rope_type": "dynamic", "factor": 4.0}, 32),
    "longrope": ({**LONGROPE, "original_max_position_embeddings": 32}, 32),
}
PAST = rows_of(9, 40, 7, 36, 32, 33, 31)  # lengths above, below and at 32 tokens


def scaled(scaling: str, **changes: Any) -> Any:
    # dynamic NTK scales beyond max_position_embeddings, here 32; longrope has a separate setting for it.
    positions = 32 if scaling == "dynamic" else 256
    rope = {"rope_theta": 100.0, **SCALINGS[scaling][0]}
    if scaling == "longrope":  # transformers 4 reads it from here
        changes["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    model = tiny_llama(
        max_position_embeddings=positions, rope_theta=100.0, rope_scaling=rope, initializer_range=0.3, **changes
    )
    return model.eval()


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_long_sequence_does_not_change_its_neighbours(scaling: str) -> None:
    model = scaled(scaling)
    check_training(model, PAST)
    reading = reading_of(model)
    assert reading is not None
    assert (reading.attention, reading.alone, reading.limit) == (NAME, None, SCALINGS[scaling][1])
    if scaling == "dynamic":
        return  # scoring rejects sequences longer than the model's positions
    check_scores(scaled(scaling), PAST)


@pytest.mark.parametrize("scaling", ["dynamic", "longrope"])
def test_short_packs_are_still_one_pass(scaling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fuse(scaled(scaling))
    with passes(model) as count:
        model(batch=pack(TokenStore.empty(), STORE, [], range(4)))
        assert len(count) == 1
        model(batch=pack(TokenStore.empty(), PAST, [], range(7)))
        assert len(count) == 8
    rows = TokenStore.from_sequences([[3, 4, 5, 6, 7], [3, 4, 5, 8, 9]], [1, 1])
    tree = pack_store(rows, np.arange(2), share=True)
    assert tree.shared
    with passes(model) as count:
        together = model(batch=tree)
        assert len(count) == 1
    monkeypatch.setitem(vars(model), MEMORY, PackReading(NAME, "sdpa", limit=3))
    with passes(model) as count:
        torch.testing.assert_close(model(batch=tree), together)  # without shared tokens
        assert len(count) == 2
    with pytest.raises(ValueError, match="runs one sequence per pass"):
        packing.packed_states(model, tree)


# ---- costs and side effects ----


@contextlib.contextmanager
def passes(model: Any) -> Any:
    """Count the forward passes of the decoder."""
    count: list[int] = []
    handle = packing.decoder_of(model).register_forward_hook(lambda *_: count.append(1))
    try:
        yield count
    finally:
        handle.remove()


def test_three_tiny_passes_once() -> None:
    model = tiny_llama()
    with passes(model) as count:
        fuse(fuse(model))
        store_logprobs(model, STORE, token_budget=10**6)
        assert len(count) == 4  # the last one is the scoring itself
        LiveReference(copy.deepcopy(model), torch.device("cpu"))
        assert len(count) == 4


def state(model: Any) -> dict[str, Any]:
    """Return everything that a pass could change."""
    found: dict[str, Any] = {"config": model.config.to_dict(), "noise": torch.get_rng_state()}
    for name, module in model.named_modules():
        plain = {
            key: value.clone() if isinstance(value, Tensor) else value
            for key, value in vars(module).items()
            if key != MEMORY and not isinstance(value, dict)
        }
        found[name] = {**plain, **{key: buffer.clone() for key, buffer in module.named_buffers(recurse=False)}}
        found[name]["flags"] = [weight.requires_grad for weight in module.parameters(recurse=False)]
    return found


def assert_same(one: Any, two: Any) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        if isinstance(value, dict):
            assert_same(value, two[name])
        elif isinstance(value, Tensor):
            assert torch.equal(value, two[name]), name
        else:
            assert value == two[name], name


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "mistral", "xglm", "recurrent_gemma", "refused"])
def test_the_measurement_leaves_no_trace(kind: str) -> None:
    if kind in SCALINGS:
        model: Any = scaled(kind, attention_dropout=0.5)
        model(torch.arange(3, 43)[None])  # the rotary encoding is now that for 40 tokens
    else:
        model = tiny_decoder("xlnet" if kind == "refused" else kind)
    model.train()
    next(iter(model.children())).eval()
    next(model.parameters()).requires_grad_(False)
    places = {name: buffer.data_ptr() for name, buffer in model.named_buffers()}
    before = state(model)
    with warnings.catch_warnings(), contextlib.suppress(ValueError):
        warnings.simplefilter("ignore")
        use_packed_attention(model)
    model.set_attn_implementation(before["config"].get("_attn_implementation") or "eager")
    after = state(model)
    for found in (before, after):
        found["config"].pop("_attn_implementation", None)
    assert_same(after, before)
    assert {name: buffer.data_ptr() for name, buffer in model.named_buffers()} == places


def test_the_warning_is_given_once_and_the_reading_remembered() -> None:
    model = tiny_decoder("xglm")
    with pytest.warns(UserWarning, match=rf"XGLMForCausalLM: {SAID}: with 'efface_varlen' attention"):
        fuse(model)
    expected = store_logprobs(model, STORE)  # warnings are errors
    for twin in (copy.deepcopy(model), unfuse(copy.deepcopy(model), attention="eager"), fuse(model)):
        assert torch.equal(store_logprobs(twin, STORE), expected)
    LiveReference(copy.deepcopy(model), torch.device("cpu"))
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(unfuse(copy.deepcopy(model), attention="eager"), config)
    fuse(adapted)
    torch.testing.assert_close(store_logprobs(adapted, STORE), expected)


def test_a_chosen_attention_stays_until_another_is_chosen() -> None:
    model = fuse(tiny_llama(), attention="eager")
    store_logprobs(model, STORE)
    assert (way(model), model.config._attn_implementation) == ("eager", "eager")
    fuse(model)
    assert (way(model), model.config._attn_implementation) == (NAME, NAME)


@pytest.mark.parametrize(("kind", "expected"), [("llama", NAME), ("mamba", ALONE), ("gpt_oss", ALONE), ("xglm", ALONE)])
def test_without_weights_a_model_is_taken_by_its_description(kind: str, expected: str) -> None:
    model = tiny_decoder(kind)
    model.get_input_embeddings().weight = nn.Parameter(torch.empty(0, 32))  # as under ZeRO-3
    if expected == ALONE:
        with pytest.warns(UserWarning, match="its weights are not in this process to be measured"):
            use_packed_attention(model)
    else:
        use_packed_attention(model)
    assert way(model) == expected


# ---- one sequence per pass in training, references and generation ----


@pytest.mark.parametrize(
    "objective",
    [NPO(), GradDiff(retain_loss_type="KL"), RMU(module_regex=r"model\.layers\.1", trainable_params_regex=(".*",))],
    ids=["NPO, cached", "KL, live", "RMU"],
)
def test_a_run_of_one_sequence_a_pass_is_the_run_of_packs(objective: Any, tmp_path: Any) -> None:
    weights, losses = [], []
    for alone in (None, "a test"):
        model = tiny_llama(num_hidden_layers=3)
        use_packed_attention(model)
        own = "sdpa" if alone else NAME
        setattr(model, MEMORY, PackReading(own, "sdpa", alone=alone))
        trainer = UnlearnTrainer(
            model,
            arguments(tmp_path, max_steps=3, reference_cache="none"),
            forget=random_store(8, seed=1),
            retain=random_store(8, seed=2),
            objective=objective,
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        weights.append(torch.cat([weight.detach().flatten() for weight in model.parameters()]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4, abs=1e-5)
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-4)


def test_a_recurrent_model_trains(tmp_path: Any) -> None:
    with pytest.warns(UserWarning, match=SAID):
        trainer = UnlearnTrainer(
            tiny_decoder("mamba"),
            arguments(tmp_path, max_steps=2, reference_cache="none"),
            forget=random_store(8, seed=1, vocabulary=90),
            retain=random_store(8, seed=2, vocabulary=90),
            objective=NPO(),
        )
    assert trainer.train().training_loss > 0


PROMPTS = [[5, 9, 11, 40], [7, 8], [30, 31, 32, 33, 34, 35, 36, 37, 38], [66]]
PADDING = {"llama": True, "gpt2": True, "bloom": True, "bart": False, "rwkv": False}


@pytest.mark.parametrize(("kind", "exact"), PADDING.items(), ids=PADDING)
def test_answers_do_not_depend_on_the_batch(kind: str, exact: bool) -> None:
    model = tiny_decoder(kind)
    model.generation_config.forced_eos_token_id = None  # BART's, which ends every answer at the limit
    expected = [alone(model, prompt, 6) for prompt in PROMPTS]
    run = decode if has_selectable_cache(model) else generate
    got = [answer.ids for answer in run(model, PROMPTS, [6] * 4, [95])]
    assert got == expected
    assert padding_of(model).exact == exact


@pytest.mark.parametrize("scaling", ["dynamic", "longrope"])
def test_answers_past_a_switch_of_the_encoding_do_not_depend_on_the_batch(scaling: str) -> None:
    prompts = [[5, 9, 11, 40], list(range(3, 43)), [7, 8, 9, 10], list(range(50, 85))]
    fresh = perturbed(scaled(scaling))
    expected = [alone(copy.deepcopy(fresh), prompt, 6) for prompt in prompts]
    got = [answer.ids for answer in decode(fresh, prompts, [6] * 4, [95])]
    assert got == expected


def alone(model: Any, prompt: list[int], count: int) -> list[int]:
    """Return the tokens that ``generate`` adds to one prompt, without the end token, 95."""
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=95,
        pad_token_id=95,
    )[0, len(prompt) :].tolist()
    return out[: out.index(95)] if 95 in out else out
