"""Tests of runs that begin with an adapter: a second one on it, or the same one trained further; saved and loaded."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from efface import NPO, UnlearnTrainer
from efface.cli.main import main
from efface.evaluate.audit.relearn import Relearn, unchanged
from efface.evaluate.audit.rows import audit_rows
from efface.evaluate.audit.view import Exam
from efface.hf.model.adapted_head import base_of
from efface.hf.model.loading import load_model, load_tokenizer
from efface.hf.model.lora import SECOND, add_lora, merged, with_fresh_lora
from efface.hf.reference.live import AdapterReference
from support.helpers import (
    LONG,
    TEXTS,
    TINY,
    arguments,
    random_store,
    saved_llama,
    tiny_llama,
    tiny_model,
    written_rows,
)
from support.padded_loop import exact_losses

peft = pytest.importorskip("peft", reason="needs peft: pip install 'efface[lora]'")

BODY = ["q_proj", "v_proj", "down_proj"]
IDS = torch.arange(3, 23)[None]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    out: Tensor = model.eval()(input_ids=IDS).logits
    return out


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(tie_word_embeddings=False).save_pretrained(folder)
    return folder


def first_round(folder: Path, base: Path, config: Any) -> Path:
    """Save an adapter that is not zero."""
    torch.manual_seed(1)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, weight in model.named_parameters():
        if weight.requires_grad and "layernorm" not in name:
            nn.init.normal_(weight, std=0.1)
    model.save_pretrained(folder)
    return folder


def lora(**settings: Any) -> Any:
    return peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": BODY, **settings})


# ---- a second adapter: every kind of first one is kept bitwise, or rejected ----

STACKED: dict[str, Callable[[], Any]] = {
    "plain": lora,
    "other layers than the second's": lambda: lora(target_modules=["o_proj", "gate_proj"]),
    "rank-stabilised": lambda: lora(use_rslora=True),
    "another scaling": lambda: lora(lora_alpha=3),
    "ranks and scalings by layer": lambda: lora(rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 5}),
    "dropout": lambda: lora(lora_dropout=0.5),
    "on the head": lambda: lora(target_modules=[*BODY, "lm_head"]),
    "on the embeddings": lambda: lora(target_modules=[*BODY, "embed_tokens"]),
    "one layer alone": lambda: lora(target_modules=["layers.1.self_attn.q_proj"]),
}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "DoRA": (lambda: lora(use_dora=True), "a variant of LoRA"),
    "modules_to_save": (lambda: lora(modules_to_save=["lm_head"]), "whole layers"),
    "trainable tokens": (lambda: lora(trainable_token_indices=[3]), "trained tokens"),
    "bias": (lambda: lora(bias="lora_only"), "biases"),
    "bias of LoRA": (lambda: lora(lora_bias=True), "biases"),
    "PiSSA": (lambda: lora(init_lora_weights="pissa"), "changed the base model"),
    "OLoRA": (lambda: lora(init_lora_weights="olora"), "changed the base model"),
    "LoHa": (lambda: peft.LoHaConfig(task_type="CAUSAL_LM", target_modules=BODY), "LOHA"),
    "LoKr": (lambda: peft.LoKrConfig(task_type="CAUSAL_LM", target_modules=BODY), "LOKR"),
    "IA3": (
        lambda: peft.IA3Config(task_type="CAUSAL_LM", target_modules=BODY, feedforward_modules=["down_proj"]),
        "IA3",
    ),
    "OFT": (lambda: peft.OFTConfig(task_type="CAUSAL_LM", target_modules=BODY, oft_block_size=4), "OFT"),
    "VeRA": (lambda: peft.VeraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4), "VERA"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", STACKED)
def test_a_second_adapter_begins_with_the_first_and_one_adapter_holds_both(
    kind: str, base: Path, tmp_path: Path
) -> None:
    folder = first_round(tmp_path / "first", base, STACKED[kind]())
    start = logits(load_model(str(folder)))
    model = add_lora(load_model(str(folder), trainable=True), r=2, alpha=6, dropout=0.1)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert len(trained) == 2 * 2 * 7  # A and B of 7 layers in each of 2 blocks
    assert all(SECOND in name for name in trained)
    assert torch.equal(logits(model), start)
    model.train()  # the first adapter's dropout is off in all later runs
    drops = [m for name, m in model.named_modules() if isinstance(m, nn.Dropout) and SECOND not in name]
    assert all(drop.p == 0 for drop in drops)
    for name, weight in model.named_parameters():
        if name in trained:
            nn.init.normal_(weight, std=0.1)
    assert (logits(model) - start).abs().max() > 1e-2
    model.save_pretrained(tmp_path / "both")
    for read in (AutoModelForCausalLM.from_pretrained, lambda place: load_model(str(place))):
        torch.testing.assert_close(logits(read(tmp_path / "both")), logits(model), rtol=1e-5, atol=2e-6)
    third = add_lora(load_model(str(tmp_path / "both"), trainable=True), r=1)  # a third adapter
    assert torch.equal(logits(third), logits(load_model(str(tmp_path / "both"))))
    torch.testing.assert_close(logits(merged(model)), logits(load_model(str(tmp_path / "both"))), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_a_first_adapter_that_cannot_be_combined_is_refused(kind: str, base: Path, tmp_path: Path) -> None:
    config, message = REFUSED[kind]
    model = load_model(str(first_round(tmp_path, base, config())), trainable=True)
    start = logits(model)
    with pytest.raises(ValueError, match=rf"a second LoRA adapter: .*{message}.*train the first adapter further"):
        add_lora(model, r=2)
    assert torch.equal(logits(model), start)


def test_a_first_adapter_inside_a_transformers_model_is_refused(base: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(first_round(tmp_path, base, lora()))
    with pytest.raises(ValueError, match="expected a peft.PeftModel, got a transformers model with a built-in adapter"):
        add_lora(model, r=2)


def test_in_half_precision_a_young_first_adapter_is_not_rounded_away(tmp_path: Path) -> None:
    tiny_llama(tie_word_embeddings=False).bfloat16().save_pretrained(tmp_path / "base")
    trained = add_lora(load_model(str(tmp_path / "base")), r=4)
    for name, weight in trained.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=1e-2)
    trained.save_pretrained(tmp_path / "first")
    model = load_model(str(tmp_path / "first"), trainable=True)
    assert torch.equal(logits(model), logits(trained))
    saved = {name: weight.clone() for name, weight in model.named_parameters() if "lora" in name}
    assert {weight.dtype for weight in saved.values()} == {torch.float32}
    assert torch.equal(logits(add_lora(model, r=4)), logits(trained))
    model.save_pretrained(tmp_path / "both")
    again = dict(load_model(str(tmp_path / "both")).named_parameters())
    for name, weight in saved.items():
        kept = again[name]
        assert torch.equal(kept[:4] if "lora_A" in name else kept[:, :4], weight), name


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_a_convolution_for_a_linear_layer(tmp_path: Path) -> None:
    """GPT-2's layers are transposed."""
    model = tiny_model("GPT2Config", n_embd=32, n_layer=2, n_head=4, n_positions=64)
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    folder = first_round(tmp_path / "first", tmp_path / "base", config)
    model = add_lora(load_model(str(folder), trainable=True), r=2, target=["c_attn", "c_proj"])
    for weight in model.parameters():
        if weight.requires_grad:
            nn.init.normal_(weight, std=0.1)
    model.save_pretrained(tmp_path / "both")
    torch.testing.assert_close(logits(load_model(str(tmp_path / "both"))), logits(model), rtol=1e-5, atol=2e-6)


# ---- a run with a second adapter ----


def second_run(folder: Path, first: Path, reference: str = "adapter", **changes: Any) -> UnlearnTrainer:
    torch.manual_seed(3)
    return UnlearnTrainer(
        add_lora(load_model(str(first), trainable=True), r=2),
        arguments(folder, max_steps=6, reference_cache="none", learning_rate=1e-2, **changes),
        forget=random_store(10, seed=1),
        retain=random_store(20, seed=2),
        objective=NPO(),
        reference=reference,
    )


def test_checkpoints_of_a_second_round_are_whole_models_and_resume_bit_for_bit(base: Path, tmp_path: Path) -> None:
    first = first_round(tmp_path / "first", base, lora())
    whole = second_run(tmp_path / "whole", first, save_strategy="steps", save_steps=3)
    expected = exact_losses(whole)
    whole.train()
    resumed = second_run(tmp_path / "resumed", first)
    losses = exact_losses(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses == expected[3:]
    for (name, weight), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(weight, other), name
    last = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-6")
    torch.testing.assert_close(logits(last), logits(whole.model), rtol=1e-5, atol=2e-6)
    assert (logits(last) - logits(load_model(str(first)))).abs().max() > 1e-3
    other = second_run(tmp_path / "other", first_round(tmp_path / "another", base, lora(r=4, lora_alpha=4)))
    with pytest.raises(
        ValueError, match="expected an adapter that this run wrote, got one whose first adapter differs"
    ):
        other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))


@pytest.mark.parametrize("reference", ["adapter", "cached", "live"])
def test_the_reference_of_a_second_round_is_the_end_of_the_first(reference: str, base: Path, tmp_path: Path) -> None:
    first = first_round(tmp_path / "first", base, lora())
    expected = logits(load_model(str(first)))
    trainer = second_run(tmp_path / "run", first, reference)
    losses = exact_losses(trainer)
    trainer.train()
    assert losses == pytest.approx(LOSSES.setdefault("", losses), rel=1e-4)
    if reference == "adapter":
        assert isinstance(trainer.reference, AdapterReference)
        flags = [weight.requires_grad for weight in trainer.model.parameters()]
        with trainer.reference.running() as frozen:
            assert torch.equal(logits(frozen), expected)
        assert flags == [weight.requires_grad for weight in trainer.model.parameters()]


LOSSES: dict[str, list[float]] = {}  # of the first kind of reference; the others must give the same


# ---- the command ----


@pytest.fixture(scope="module")
def rounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rounds")
    saved_llama(folder / "base")
    written_rows(folder / "rows.json")
    assert main(command(folder, "base", "first", "--lora_r", "2")) == 0
    return folder


def command(folder: Path, model: str, out: str, *flags: str, rate: str = "1e-2") -> list[str]:
    data = str(folder / "rows.json")
    words = ["unlearn", "--model", str(folder / model), "--forget", data, "--retain", data, "--use_cpu", "True"]
    return [*words, "--max_steps", "3", "--learning_rate", rate, "--output_dir", str(folder / out), *flags]


SECOND_ROUNDS: dict[str, tuple[str, ...]] = {
    "a second adapter": ("--lora_r", "2"),
    "a second adapter, with its own reference": ("--lora_r", "2", "--reference", "adapter"),
    "a second adapter, merged": ("--lora_r", "2", "--merge_adapter"),
    "the same adapter": (),
    "the same adapter, merged": ("--merge_adapter",),
}


@pytest.mark.parametrize(
    "name", [name if "," not in name else pytest.param(name, marks=LONG) for name in SECOND_ROUNDS]
)
def test_the_command_begins_where_the_first_round_ended(name: str, rounds: Path, tmp_path: Path) -> None:
    first = logits(AutoModelForCausalLM.from_pretrained(rounds / "first"))
    far = logits(AutoModelForCausalLM.from_pretrained(rounds / "base"))
    still, moved = (str(tmp_path / folder) for folder in ("still", "moved"))
    assert main(command(rounds, "first", still, *SECOND_ROUNDS[name], rate="1e-12")) == 0
    assert main(command(rounds, "first", moved, *SECOND_ROUNDS[name])) == 0
    after = logits(AutoModelForCausalLM.from_pretrained(still))
    if name == "the same adapter":
        assert torch.equal(after, first)
    else:  # the same sums in another order
        torch.testing.assert_close(after, first, rtol=1e-5, atol=1e-6)
    assert (logits(AutoModelForCausalLM.from_pretrained(moved)) - first).abs().max() > 1e-4
    assert (first - far).abs().max() > 1e-4
    said = json.loads((Path(moved) / "run.json").read_text())["identity"]["adapter"]["is"]
    assert said.startswith("a second LoRA of rank 2" if "second" in name else "that of")
    assert f"Adapter: {said}." in (Path(moved) / "README.md").read_text()


def test_an_adapter_on_a_checkpoint_in_a_folder_names_it(rounds: Path, tmp_path: Path) -> None:
    saved_llama(tmp_path / "run" / "checkpoint-12")
    words = command(
        rounds, str(tmp_path / "run"), str(tmp_path / "out"), "--lora_r", "2", "--revision", "checkpoint-12"
    )
    assert main(words) == 0
    start = logits(load_model(str(tmp_path / "run" / "checkpoint-12")))
    model = load_model(str(tmp_path / "out"))
    with model.disable_adapter():
        assert torch.equal(logits(model), start)


def test_finetuning_begins_with_the_adapter_too(rounds: Path, tmp_path: Path) -> None:
    words = ["finetune", "--model", str(rounds / "first"), "--data", str(rounds / "rows.json"), "--use_cpu", "True"]
    words += ["--max_steps", "1", "--warmup_epochs", "0", "--learning_rate", "1e-12", "--output_dir", str(tmp_path)]
    assert main(words) == 0
    assert torch.equal(logits(load_model(str(tmp_path))), logits(load_model(str(rounds / "first"))))


def test_an_adapter_that_is_trained_further_is_not_its_own_reference(
    rounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert main(command(rounds, "first", out, "--reference", "adapter")) == 2
    told = capsys.readouterr().err
    assert "or the adapter has been trained before, so it is not clear which model is the reference" in told
    assert not list(Path(out).glob("adapter*"))
    assert main(command(rounds, "first", out, "--reference", "live")) == 0


def test_a_dry_run_on_an_adapter(rounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command(rounds, "first", str(tmp_path / "out"), "--lora_r", "2"), "--dry_run"]) == 0
    assert "first is an adapter" in " ".join(capsys.readouterr().out.split())


# ---- relearning in addition to adapters ----

RELEARNT: dict[str, Callable[[], Any] | None] = {
    "no adapter": None,
    "plain": lora,
    "everywhere": lambda: lora(target_modules="all-linear"),
    "on head and embeddings": lambda: lora(target_modules=["q_proj", "lm_head", "embed_tokens"]),
    **{kind: config for kind, (config, _) in REFUSED.items()},
}


def everything(model: nn.Module) -> dict[str, Any]:
    """Return everything about a module tree, by name."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[name] = (type(module), id(module), module.training, sorted(vars(module)))
        for attribute in ("_active_adapter", "_disable_adapters", "scaling", "r", "p", "merged_adapters"):
            if attribute in vars(module):
                found[f"{name}:{attribute}"] = repr(vars(module)[attribute])
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found[f"{name}="] = (id(tensor), tensor.requires_grad, tensor.grad is None, tensor.tolist())
    base: Any = base_of(model)
    found["config"] = (base.config._attn_implementation, base.config.use_cache, sorted(vars(base)))
    found["adapters"] = sorted(getattr(base, "peft_config", None) or {})
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("loaded_by", "kind"),
    [
        *(("efface", kind) for kind in RELEARNT),
        *(("transformers", kind) for kind in ("plain", "DoRA", "modules_to_save")),
        *(
            pytest.param("transformers", kind, marks=LONG)
            for kind in RELEARNT
            if kind not in ("plain", "DoRA", "modules_to_save", "no adapter", "VeRA")
        ),
    ],
)
def test_relearning_adds_a_fresh_adapter_and_removes_it(loaded_by: str, kind: str, base: Path, tmp_path: Path) -> None:
    config = RELEARNT[kind]
    folder = base if config is None else first_round(tmp_path, base, config())
    model = load_model(str(folder)) if loaded_by == "efface" else AutoModelForCausalLM.from_pretrained(folder)
    model.eval()
    before, expected = everything(model), logits(model)
    with unchanged(model):
        taught = with_fresh_lora(model, r=2)
        assert torch.equal(logits(taught), expected)
        trained = [weight for weight in taught.parameters() if weight.requires_grad]
        assert len(trained) == 2 * 2 * 7
        for weight in trained:
            nn.init.normal_(weight, std=0.2)
        assert (logits(taught) - expected).abs().max() > 1e-2
    assert everything(model) == before
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("lora_r", [None, 2])
@pytest.mark.parametrize("loaded_by", ["efface", "transformers"])
def test_the_audit_relearns_from_the_unlearned_model(
    loaded_by: str, lora_r: int | None, rounds: Path, tmp_path: Path
) -> None:
    folder = str(rounds / "first")
    model = load_model(folder) if loaded_by == "efface" else AutoModelForCausalLM.from_pretrained(folder)
    model.eval()
    before, expected = everything(model), logits(model)
    exam, rows = Exam(model, load_tokenizer(str(rounds / "base"))), audit_rows(TEXTS)[:2]
    for rate in (1e-12, 1e-2):
        with Relearn(steps=1, learning_rate=rate, lora_r=lora_r)._fine_tuned(exam, rows) as taught:
            moved = (logits(taught.model) - expected).abs().max()
        assert (moved > 1e-4) if rate == 1e-2 else (moved < 1e-6)
        assert everything(model) == before
        assert torch.equal(logits(model), expected)


def test_a_block_that_fails_is_undone_too(base: Path) -> None:
    model = load_model(str(base)).eval()
    before = everything(model)
    with contextlib.suppress(RuntimeError), unchanged(model):
        with_fresh_lora(model, r=2)
        raise RuntimeError
    assert everything(model) == before


assert TINY["num_hidden_layers"] == 2  # the counts of trained tensors above assume it
