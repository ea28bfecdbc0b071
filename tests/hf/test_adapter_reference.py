"""Tests of the reference "adapter", for all initialisations of peft: it equals the initial model, or is rejected."""

import contextlib
import importlib.util
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from efface import NPO, UnlearnTrainer
from efface.hf.model.loading import load_model
from efface.hf.model.lora import add_lora
from efface.hf.reference.live import AdapterReference, LiveReference
from support.helpers import VOCABULARY, arguments, random_store, tiny_llama
from support.padded_loop import exact_losses

peft = pytest.importorskip("peft", reason="needs peft: pip install 'efface[lora]'")

pytestmark = pytest.mark.filterwarnings("ignore")
BODY = ["q_proj", "down_proj"]

RIGHT, REFUSED = "is the model as loaded", "is another model"
INITIALISATIONS: dict[Any, str] = {
    True: RIGHT,
    False: REFUSED,  # noise in both A and B: the policy differs from the loaded model
    "gaussian": RIGHT,
    "eva": RIGHT,
    "orthogonal": RIGHT,
    "mica": RIGHT,
    "pissa": REFUSED,
    "pissa_niter_4": REFUSED,
    "olora": REFUSED,
    "corda": REFUSED,
    "loftq": REFUSED,
}
_NEEDS = {"corda": "attr", "loftq": "bitsandbytes"}
_hints = typing.get_type_hints(peft.LoraConfig)["init_lora_weights"]
_names = {name for part in typing.get_args(_hints) for name in typing.get_args(part)}
OF_PEFT = {True, False} | {"pissa_niter_4" if name.startswith("pissa_niter") else name for name in _names}
KINDS = [
    pytest.param(
        init,
        marks=pytest.mark.skipif(
            init in _NEEDS and importlib.util.find_spec(_NEEDS[init]) is None, reason=f"needs {_NEEDS.get(init)}"
        ),
    )
    for init in INITIALISATIONS
    if init in OF_PEFT
]
OTHERS: dict[str, Callable[[], Any]] = {
    "DoRA": lambda: peft.LoraConfig(task_type="CAUSAL_LM", target_modules=BODY, use_dora=True),
    "modules_to_save": lambda: peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=BODY, modules_to_save=["lm_head", "embed_tokens"]
    ),
    "trainable tokens": lambda: peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=BODY, trainable_token_indices=[3]
    ),
    "LoHa": lambda: peft.LoHaConfig(task_type="CAUSAL_LM", target_modules=BODY),
    "LoKr": lambda: peft.LoKrConfig(task_type="CAUSAL_LM", target_modules=BODY),
    "IA3": lambda: peft.IA3Config(task_type="CAUSAL_LM", target_modules=BODY, feedforward_modules=["down_proj"]),
    "OFT": lambda: peft.OFTConfig(task_type="CAUSAL_LM", target_modules=BODY, oft_block_size=4),
    "VeRA": lambda: peft.VeraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4),
}


def initialised(init: Any, model: Any) -> Any:
    """Return the model with an adapter that has this initialisation."""
    settings: dict[str, Any] = {}
    if init == "loftq":
        settings["loftq_config"] = peft.LoftQConfig(loftq_bits=4)
    if init == "eva":
        settings["eva_config"] = peft.EvaConfig(rho=1.0)
    if init == "corda":
        from peft.tuners.lora.config import CordaConfig
        from peft.tuners.lora.corda import preprocess_corda

        settings["corda_config"] = CordaConfig(corda_method="kpm")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=BODY, init_lora_weights=init, **settings)
    rows = [torch.randint(VOCABULARY, (1, 12)) for _ in range(8)]
    if init == "corda":
        preprocess_corda(model, config, run_model=lambda: [model(ids) for ids in rows])
    made = peft.get_peft_model(model, config)
    if init == "eva":
        peft.initialize_lora_eva_weights(made, [{"input_ids": ids} for ids in rows])
    return made


def trainer(folder: Path, model: Any, reference: str, **settings: Any) -> UnlearnTrainer:
    return UnlearnTrainer(
        model,
        arguments(folder, max_steps=2, reference_cache="none"),
        forget=random_store(8, seed=1),
        retain=random_store(8, seed=2),
        objective=settings.pop("objective", NPO()),
        reference=reference,
        **settings,
    )


def test_every_initialisation_of_peft_is_known() -> None:
    """A new initialisation of peft must be added to INITIALISATIONS, as RIGHT or REFUSED."""
    assert set(INITIALISATIONS) >= OF_PEFT


@pytest.mark.parametrize("init", KINDS)
def test_the_adapter_reference_is_the_model_as_loaded_or_refused(init: Any, tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=False)
    torch.manual_seed(1)
    made = trainer(tmp_path, initialised(init, model), "adapter")
    refusal = pytest.raises(ValueError, match=f"init_lora_weights={init!r}.*use 'cached', .* or 'live'")
    with contextlib.nullcontext() if INITIALISATIONS[init] == RIGHT else refusal:
        made.train()


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_cached_and_a_live_reference_work_with_a_changed_base(init: Any, tmp_path: Path) -> None:
    """At the start L − L_ref is 0, as for a plain adapter on the same model."""
    first = []
    for kind, reference in ((init, "cached"), (init, "live"), (True, "adapter")):
        torch.manual_seed(1)
        made = trainer(tmp_path, initialised(kind, tiny_llama(tie_word_embeddings=False)), reference)
        losses = exact_losses(made)
        made.train()
        first.append(losses[0])
    assert first[1] == pytest.approx(first[0], rel=1e-5)
    assert first[2] == pytest.approx(first[0], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", OTHERS)
def test_other_adapters_that_start_as_the_model_are_supported(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = peft.get_peft_model(tiny_llama(tie_word_embeddings=False).to(dtype), OTHERS[kind]())
    made = trainer(tmp_path, model, "adapter")
    made.check_start()
    for name, weight in model.named_parameters():
        if weight.requires_grad and "layernorm" not in name:
            nn.init.normal_(weight, std=1.0)
    with pytest.raises(ValueError, match="or the adapter has been trained before"):
        made.check_start()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trained_adapter_is_refused_however_little_it_was_trained(dtype: torch.dtype, tmp_path: Path) -> None:
    model = add_lora(tiny_llama(tie_word_embeddings=False).to(dtype), r=4)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=1e-2)
    made = trainer(tmp_path, model, "auto", objective=NPO(retain_loss_type="KL"))
    assert isinstance(made.reference, AdapterReference)
    with pytest.raises(ValueError, match="or the adapter has been trained before"):
        made.train()
    live = trainer(tmp_path, model, "live", objective=NPO(retain_loss_type="KL"))
    assert isinstance(live.reference, LiveReference)
    live.train()


def test_a_resumed_run_is_not_compared(tmp_path: Path) -> None:
    """The model of a resumed run can be the one loaded from the checkpoint."""
    tiny_llama().save_pretrained(tmp_path / "base")
    settings = {"objective": NPO(), "reference": "adapter"}
    stores = {"forget": random_store(8, seed=1), "retain": random_store(8, seed=2)}
    args = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    first = UnlearnTrainer(
        add_lora(load_model(str(tmp_path / "base")), r=4), arguments(tmp_path / "run", **args), **stores, **settings
    )
    losses = exact_losses(first)
    first.train()
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    again = UnlearnTrainer(
        load_model(checkpoint, trainable=True), arguments(tmp_path / "again", **args), **stores, **settings
    )
    continued = exact_losses(again)
    again.train(resume_from_checkpoint=checkpoint)
    assert continued == losses[2:]


@pytest.mark.parametrize("reference", ["live", "cached"])
def test_a_reference_model_that_shares_the_policys_weights_is_refused(reference: str, tmp_path: Path) -> None:
    base = tiny_llama()
    with pytest.raises(ValueError, match="got one that shares weights with the policy"):
        trainer(tmp_path, add_lora(base, r=2), reference, reference_model=base)


# ---- saved and loaded ----


@pytest.mark.parametrize("init", KINDS)
def test_a_saved_adapter_is_read_back_bit_for_bit_or_refused(init: Any, tmp_path: Path) -> None:
    tiny_llama(tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    model = initialised(init, AutoModelForCausalLM.from_pretrained(tmp_path / "base")).eval()
    for weight in model.parameters():
        if weight.requires_grad:
            nn.init.normal_(weight, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(3, 23)[None]
    repeated = not str(init).startswith(("pissa_niter", "corda", "loftq"))
    refusal = pytest.raises(ValueError, match="cannot be loaded: init_lora_weights=.* changed its base model")
    with contextlib.nullcontext() if repeated else refusal:
        assert torch.equal(load_model(str(tmp_path / "adapter"))(ids).logits, model(ids).logits)


@pytest.mark.parametrize("kind", OTHERS)
def test_other_saved_adapters_are_read_back_bit_for_bit(kind: str, tmp_path: Path) -> None:
    tiny_llama(tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), OTHERS[kind]()).eval()
    for weight in model.parameters():
        if weight.requires_grad:
            nn.init.normal_(weight, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(3, 23)[None]
    for trainable in (False, True):
        loaded = load_model(str(tmp_path / "adapter"), trainable=trainable).eval()
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        assert any(weight.requires_grad for weight in loaded.parameters()) == trainable
