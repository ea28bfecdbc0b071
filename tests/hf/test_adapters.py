"""Tests of LoRA with peft: exact against the padded loop, on the head too; the base as reference; rejected adapters."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from efface import NPO, UnlearnTrainer
from efface.batching import StepTotals, TokenStore, pack
from efface.cli.main import main
from efface.hf.model.adapted_head import base_of
from efface.hf.model.head import fuse, head_of, packed_hidden, unfuse
from efface.hf.model.head_loss import HeadLoss
from efface.hf.model.lora import add_lora, check_mergeable
from efface.hf.reference.live import AdapterReference
from efface.hf.reference.score import store_logprobs
from efface_kernels.linear_loss import fused_loss
from support.helpers import (
    VOCABULARY,
    arguments,
    padded,
    random_store,
    saved_llama,
    tiny_llama,
    tiny_model,
    written_rows,
)
from support.padded_loop import batch_nll, exact_losses

peft = pytest.importorskip("peft", reason="needs peft: pip install 'efface[lora]'")

ONE = StepTotals(retain_tokens=1)  # means over one token, that is, sums
BODY = ["q_proj", "v_proj", "down_proj"]


def adapted(seed: int = 3, *, model: Any = None, **settings: Any) -> Any:
    """Return a tiny model with an adapter that is not zero."""
    model = tiny_llama(tie_word_embeddings=False) if model is None else model
    torch.manual_seed(seed)
    config = peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": BODY, **settings})
    made = peft.get_peft_model(model, config)
    for weight in made.parameters():
        if not weight.any():
            nn.init.normal_(weight, std=0.05)
    return made


def pack_of(store: TokenStore) -> Any:
    return pack(TokenStore.empty(), store, [], list(range(len(store))))


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}


# ---- the same numbers as a padded forward pass of the PeftModel ----


HEADS: dict[str, dict[str, Any]] = {
    "a frozen head": {},
    "LoRA on the head": {"target_modules": [*BODY, "lm_head"], "lora_alpha": 8},
    "rank-stabilised LoRA on the head": {"target_modules": [*BODY, "lm_head"], "use_rslora": True},
    "the head in modules_to_save": {"modules_to_save": ["lm_head"]},
    "LoRA on the embeddings": {"target_modules": [*BODY, "embed_tokens"]},
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("chunk_rows", [None, 7])
def test_every_gradient_equals_the_eager_models(head: str, chunk_rows: int | None) -> None:
    model = adapted(**HEADS[head])
    twin = copy.deepcopy(model)
    store = random_store(5, low=3, high=16)
    expected = batch_nll(twin, padded(store, list(range(5)))).sum()
    expected.backward()
    out = fuse(model)(batch=pack_of(store), loss=HeadLoss(None, ONE, chunk_rows=chunk_rows))
    out.loss.backward()
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-5)
    truth = gradients(twin)
    assert list(gradients(model)) == list(truth)
    assert any("lm_head" in name for name in truth) == ("head" in head and "frozen" not in head)
    for name, gradient in gradients(model).items():
        assert truth[name] is not None
        assert truth[name].abs().max() > 0, name  # type: ignore[union-attr]
        torch.testing.assert_close(gradient, truth[name], rtol=1e-4, atol=2e-5, msg=name)


def test_two_active_adapters_on_the_head_add_up() -> None:
    model = adapted(target_modules=["lm_head"])
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    store = random_store(5, low=3, high=16)
    expected = batch_nll(model, padded(store, list(range(5)))).sum()
    got = fuse(model)(batch=pack_of(store), loss=HeadLoss(None, ONE)).loss
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        base = fuse(model)(batch=pack_of(store), loss=HeadLoss(None, ONE)).loss
        expected = batch_nll(model, padded(store, list(range(5)))).sum()
    torch.testing.assert_close(base, expected, rtol=1e-5, atol=1e-5)
    assert abs(base - got) > 1e-3


def test_a_young_adapter_on_a_bf16_head_counts() -> None:
    """s B A is far below the bf16 rounding of W, so W + s B A computed in bf16 would equal W."""
    model = adapted(model=tiny_llama(tie_word_embeddings=False).bfloat16(), target_modules=["lm_head"])
    layer = model.base_model.model.lm_head
    with torch.no_grad():
        layer.base_layer.weight.fill_(1.0)  # all logits are equal, so the differences come from the adapter
        layer.lora_B["default"].weight.mul_(1e-4)
    change = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight) * layer.scaling["default"]
    assert torch.equal(layer.base_layer.weight + change.bfloat16(), layer.base_layer.weight)
    head, batch = head_of(model), pack_of(random_store(3))
    hidden = packed_hidden(fuse(model), batch)
    width = layer.base_layer.weight.shape[1]
    got = hidden[:, width:].float() @ head.weight[:, width:].float().t()
    torch.testing.assert_close(
        got, hidden[:, :width].float() @ change.t(), rtol=0.02, atol=0.02 * got.abs().max().item()
    )
    assert got.abs().max() > 0


def test_a_frozen_head_gets_no_gradient_and_costs_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    run_loop = fused_loss.run_loop

    def watched(*args: Any, **kwargs: Any) -> Any:
        result = run_loop(*args, **kwargs)
        seen.append((kwargs["wanted"], result[1].weight))
        return result

    monkeypatch.setattr(fused_loss, "run_loop", watched)
    UnlearnTrainer(
        adapted(model=tiny_llama()),
        arguments(tmp_path, max_steps=2),
        forget=random_store(8, seed=1),
        retain=random_store(8, seed=2),
        objective=NPO(),
    ).train()
    assert len(seen) == 2
    for wanted, weight in seen:
        assert wanted.hidden
        assert not wanted.weight
        assert weight is None


# ---- the base model as the reference ----


def test_the_adapter_reference_is_the_base_model() -> None:
    base = tiny_llama(tie_word_embeddings=False)
    for settings in HEADS.values():
        model = fuse(adapted(model=copy.deepcopy(base), lora_dropout=0.0, **settings))
        batch = pack_of(random_store(5))
        rows = AdapterReference(model).rows(batch)
        twin = fuse(copy.deepcopy(base).eval())
        torch.testing.assert_close(rows.hidden, packed_hidden(twin, batch))
        assert torch.equal(rows.head.weight, twin.lm_head.weight)
        assert not rows.hidden.requires_grad


def test_the_adapter_reference_leaves_no_trace() -> None:
    """Modes, dropout's random numbers and trainable parameters stay the same; peft alone would make a frozen A
    trainable.
    """
    model = fuse(adapted(lora_dropout=0.5)).train()
    model.base_model.model.model.layers[0].eval()
    for name, weight in model.named_parameters():
        if "lora_A" in name:
            weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    trained = [weight.requires_grad for weight in model.parameters()]
    state = torch.get_rng_state()
    reference, batch = AdapterReference(model), pack_of(random_store(5))
    first, second = (reference.rows(batch).hidden for _ in range(2))
    assert torch.equal(first, second)
    assert modes == [module.training for module in model.modules()]
    assert trained == [weight.requires_grad for weight in model.parameters()]
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(packed_hidden(model, batch), first)


def test_an_adapter_reference_needs_adapters_on_a_frozen_base(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a peft.PeftModel, got LlamaForCausalLM; add LoRA"):
        AdapterReference(tiny_llama())
    model = adapted()
    model.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"frozen base model, got one whose tensor 'base_model.model.model.norm.weight'"
    ):
        AdapterReference(model)
    with pytest.raises(ValueError, match="expected no `reference_model`, got one"):
        UnlearnTrainer(
            adapted(),
            arguments(tmp_path),
            forget=random_store(4),
            retain=random_store(4),
            objective=NPO(),
            reference="adapter",
            reference_model=tiny_llama(),
        )


def test_scores_of_a_model_with_adapters_are_those_it_computes_now() -> None:
    model, store = adapted(target_modules=[*BODY, "lm_head"]), random_store(6)
    with torch.no_grad():
        expected = -batch_nll(model.eval(), padded(store, list(range(6))))
    torch.testing.assert_close(store_logprobs(model, store), expected, rtol=1e-5, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(store_logprobs(model, store), expected, rtol=1e-4, atol=1e-4)
    with model.disable_adapter(), torch.no_grad():  # peft unmerges the merged adapter
        base = store_logprobs(model, store)
        torch.testing.assert_close(base, -batch_nll(model, padded(store, list(range(6)))), rtol=1e-4, atol=1e-4)
    assert (base - expected).abs().max() > 1e-3


# ---- saved adapters ----


def test_fusing_keeps_the_state_dict_and_unfusing_the_classes() -> None:
    for settings in HEADS.values():
        model = adapted(**settings)
        names, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
        fused = fuse(fuse(model))
        assert fused is model
        assert list(model.state_dict()) == names
        unfuse(model)
        assert [type(module) for module in model.modules()] == kinds


def test_the_saved_adapter_is_an_ordinary_one(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    model = add_lora(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), r=4)
    trainer = UnlearnTrainer(
        model,
        arguments(tmp_path, max_steps=3),
        forget=random_store(8, seed=1),
        retain=random_store(8, seed=2),
        objective=NPO(),
        reference="adapter",
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    assert not list((tmp_path / "adapter").glob("model*.safetensors"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_resuming_a_run_with_adapters_continues_the_curve(tmp_path: Path) -> None:
    def trainer(folder: str, **changes: Any) -> tuple[UnlearnTrainer, list[float]]:
        torch.manual_seed(3)
        made = UnlearnTrainer(
            add_lora(tiny_llama(), r=4),
            arguments(tmp_path / folder, max_steps=6, **changes),
            forget=random_store(10, seed=1),
            retain=random_store(20, seed=2),
            objective=NPO(),
            reference="adapter",
        )
        return made, exact_losses(made)

    whole, expected = trainer("whole", save_strategy="steps", save_steps=3)
    whole.train()
    resumed, losses = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses == expected[3:]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_merging_is_refused_where_it_would_change_another_layer() -> None:
    check_mergeable(adapted(target_modules=[*BODY, "lm_head"]))
    check_mergeable(adapted(model=tiny_llama()))
    for target in ("lm_head", "embed_tokens"):
        with pytest.raises(ValueError, match="share one weight, so merging an adapter on one"):
            check_mergeable(adapted(model=tiny_llama(), target_modules=[*BODY, target]))
    with pytest.raises(ValueError, match="expected a model with adapters"):
        check_mergeable(tiny_llama())


# ---- rejected adapters ----

_ON_HEAD = {"target_modules": ["lm_head"]}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: peft.LoraConfig(use_dora=True, **_ON_HEAD), "a variant of LoRA"),
        (lambda: peft.LoraConfig(lora_dropout=0.1, **_ON_HEAD), "dropout, which changes the weight for each row"),
        (lambda: peft.LoHaConfig(**_ON_HEAD), "lm_head: expected a torch.nn.Linear, got peft.*loha"),
        (
            lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
            "got PROMPT_TUNING, whose virtual tokens do not work",
        ),
        (lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "got PREFIX_TUNING"),
        (lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "got P_TUNING"),
    ],
)
def test_unsupported_adapters_are_refused_with_the_reason(config: Any, message: str) -> None:
    model = peft.get_peft_model(tiny_llama(tie_word_embeddings=False), config())
    with pytest.raises(ValueError, match=message):
        fuse(model)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_a_head_whose_adapter_has_a_bias_is_refused() -> None:
    model = peft.get_peft_model(tiny_llama(tie_word_embeddings=False), peft.LoraConfig(lora_bias=True, **_ON_HEAD))
    with pytest.raises(ValueError, match=r"a bias \(lora_bias\)"):
        fuse(model)


@pytest.mark.skipif(not hasattr(peft.LoraConfig, "alora_invocation_tokens"), reason="needs peft >= 0.18")
def test_an_activated_lora_is_refused() -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=BODY, alora_invocation_tokens=[1, 2])
    with pytest.raises(ValueError, match="expected plain LoRA, got an activated LoRA"):
        fuse(peft.get_peft_model(tiny_llama(), config))


def test_a_quantised_head_is_refused_and_a_quantised_body_is_not() -> None:
    class Linear4bit(nn.Linear):
        """A stand-in for bitsandbytes' class, which is a subclass of Linear."""

    model = tiny_llama(tie_word_embeddings=False)
    model.model.layers[0].mlp.up_proj.__class__ = Linear4bit
    fuse(model)
    unfuse(model)
    model.lm_head.__class__ = Linear4bit
    with pytest.raises(ValueError, match=r"Linear4bit; .* exclude it from quantisation"):
        fuse(model)


def test_a_routers_auxiliary_loss_is_refused() -> None:
    settings = {"num_local_experts": 2, "num_experts_per_tok": 1}
    model = tiny_model("MixtralConfig", output_router_logits=True, router_aux_loss_coef=0.02, **settings)
    with pytest.raises(ValueError, match=r"router's auxiliary loss.* got output_router_logits=True"):
        fuse(model)
    model.config.output_router_logits = False
    fuse(model)


# ---- creating an adapter; running without peft ----


def test_add_lora_starts_as_the_model_and_leaves_the_head_alone() -> None:
    model = tiny_llama(tie_word_embeddings=False)
    ids = torch.randint(VOCABULARY, (1, 9))
    expected = model(input_ids=ids).logits
    made = add_lora(model, r=4)
    assert torch.equal(made(input_ids=ids).logits, expected)
    assert made.peft_config["default"].lora_alpha == 8
    trained = [name for name, weight in made.named_parameters() if weight.requires_grad]
    assert len(trained) == 2 * 2 * 7  # A and B of 7 layers in each of 2 blocks
    assert not any("lm_head" in name for name in trained)
    assert base_of(made) is model
    only = add_lora(tiny_llama(), r=1, target=["q_proj"])
    assert sum(weight.requires_grad for weight in only.parameters()) == 4
    for wrong, message in (({"r": 0}, "`lora_r`: expected at least 1"), ({"r": 2, "dropout": 1.0}, "`lora_dropout`")):
        with pytest.raises(ValueError, match=message):
            add_lora(tiny_llama(), **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nowhere"):
        add_lora(tiny_llama(), r=2, target=["nowhere"])


# ---- the command ----


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    saved_llama(tmp_path / "model")
    data = written_rows(tmp_path / "rows.json")
    words = ["unlearn", "--model", str(tmp_path / "model"), "--forget", str(data), "--retain", str(data)]
    return [*words, "--use_cpu", "True", "--max_steps", "3", "--save_strategy", "no", "--learning_rate", "1e-2"]


def test_the_command_writes_an_adapter_or_the_merged_model(command: list[str], tmp_path: Path) -> None:
    words = [*command, "--lora_r", "2", "--lora_target", "q_proj", "v_proj", "--reference", "adapter", "--output_dir"]
    for folder in ("adapter", "again"):
        assert main([*words, str(tmp_path / folder)]) == 0
    assert main([*words, str(tmp_path / "merged"), "--merge_adapter"]) == 0
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model, again = (peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / n) for n in ("adapter", "again"))
    for name, tensor in model.state_dict().items():
        # the seed also determines the adapter's initial weights
        assert torch.equal(tensor, again.state_dict()[name]), name
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.randint(90, (1, 9))
    torch.testing.assert_close(merged(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    assert not torch.equal(merged(input_ids=ids).logits, base(input_ids=ids).logits)
    assert (tmp_path / "merged" / "tokenizer_config.json").is_file()
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


def test_flags_of_an_adapter_without_its_rank(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*command, "--output_dir", str(tmp_path / "out")]
    assert main([*words, "--lora_alpha", "4", "--merge_adapter"]) == 2
    assert "--lora-alpha, --merge-adapter: expected --lora-r" in capsys.readouterr().err
    assert main([*words, "--reference", "adapter"]) == 2
    assert "expected a peft.PeftModel" in capsys.readouterr().err
