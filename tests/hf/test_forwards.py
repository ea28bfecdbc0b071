"""Tests of models whose ``forward``, head or class was changed by other code: the same losses, or rejected."""

import copy
import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import accelerate
import datasets
import pytest
import torch
import transformers
from torch import nn
from transformers import LlamaForCausalLM

from efface import NPO, UnlearnTrainer
from efface.hf.model.forwards import ROUTED
from efface.hf.model.head import FusedHead, fuse, unfuse
from efface.hf.model.packing import reading_of
from support.helpers import arguments, random_store, tiny_llama
from support.padded_loop import exact_losses

ROWS = datasets.Dataset.from_list([{"input_ids": [3, 4, 5, 6], "labels": [3, 4, 5, 6]}] * 3)


def trainer_of(model: Any, folder: Path, **changes: Any) -> UnlearnTrainer:
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # transformers 4 keeps the precision of the last arguments here
    options = arguments(folder, max_steps=3, reference_cache="none", **changes)
    sets = {"forget": random_store(8, seed=1), "retain": random_store(20, seed=2)}
    return UnlearnTrainer(model, options, **sets, objective=NPO())


def losses_of(model: Any, folder: Path, **changes: Any) -> list[float]:
    trainer = trainer_of(model, folder, **changes)
    losses = exact_losses(trainer)
    trainer.train()
    assert len(losses) == 3
    return losses


# ---- a forward on the instance ----


def transformers_trains(model: Any, **precision: bool) -> None:
    """Let transformers train a model with a learning rate of 0."""
    options = transformers.TrainingArguments(
        output_dir="unused",
        use_cpu=True,
        max_steps=1,
        learning_rate=0.0,
        report_to="none",
        save_strategy="no",
        **precision,
    )
    assert transformers.Trainer(model, options, train_dataset=ROWS).train().global_step == 1


def finetuned(model: Any) -> Any:
    transformers_trains(model, bf16=True)
    assert "forward" in vars(model)
    return model


def finetuned_twice(model: Any) -> Any:
    """With two of accelerate's wrappers, which a script of another process can leave."""
    del finetuned(model)._is_accelerate_prepared
    return finetuned(model)


def dispatched(model: Any) -> Any:
    """As ``device_map="auto"`` does, here with one device."""
    accelerate.dispatch_model(model, {"model": "cpu", "lm_head": "cpu"}, main_device="cpu", force_hooks=True)
    return model


def patched(model: Any) -> Any:
    """As Liger-Kernel patches an instance."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return LlamaForCausalLM.forward(self, *args, **kwargs)

    model.forward = MethodType(forward, model)
    return model


def decorated(model: Any) -> Any:
    own = model.forward

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    model.forward = forward
    return model


def patched_head(model: Any) -> Any:
    own = model.lm_head.forward

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        return own(hidden)

    model.lm_head.forward = forward
    return model


def hooked_head(model: Any) -> Any:
    """With the hook of TRL's ``cast_lm_head_to_fp32``."""
    model.lm_head.register_forward_pre_hook(lambda layer, inputs: (inputs[0].to(layer.weight.dtype),))
    return model


def compiled_in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def compiled_decoder(model: Any) -> Any:
    model.model.compile(backend="eager")
    return model


SERVED: dict[str, Callable[[Any], Any]] = {
    "fine-tuned in bf16": finetuned,
    "fine-tuned in bf16 twice": finetuned_twice,
    "dispatched": dispatched,
    "patched": patched,
    "decorated": decorated,
    "patched head": patched_head,
    "hooked head": hooked_head,
    "patched and dispatched": lambda model: dispatched(patched(model)),
    "compiled in place": compiled_in_place,
    "compiled decoder": compiled_decoder,
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo reads .grad
@pytest.mark.parametrize("name", SERVED)
def test_wrappers_of_other_libraries_change_no_loss(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ids = torch.arange(3, 11)[None]
    size = {"num_hidden_layers": 1} if "compiled" in name else {}  # tracing is the time of it
    expected = losses_of(tiny_llama(**size), tmp_path)
    model = SERVED[name](tiny_llama(**size))
    assert losses_of(model, tmp_path) == expected
    # transformers reads the column names from the signature
    assert "labels" in inspect.signature(model.forward).parameters
    own = model(input_ids=ids, labels=ids)
    plain = LlamaForCausalLM(model.config).eval()
    plain.load_state_dict(model.state_dict())
    assert torch.allclose(own.loss.float(), plain(input_ids=ids, labels=ids).loss, rtol=1e-5)
    assert losses_of(model, tmp_path) == losses_of(plain, tmp_path)  # a second run of the trainer
    unfuse(model)
    assert not isinstance(model.lm_head, FusedHead)
    assert ROUTED not in vars(model)
    assert model(input_ids=ids, labels=ids).loss.item() == pytest.approx(plain(input_ids=ids, labels=ids).loss.item())


def test_a_forward_on_the_instance_is_that_of_plain_calls_and_of_copies() -> None:
    seen = []

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(id(self))
        return LlamaForCausalLM.forward(self, *args, **kwargs)

    model = tiny_llama().eval()
    model.forward = MethodType(forward, model)  # type: ignore[method-assign]
    fuse(fuse(model))
    twin = copy.deepcopy(model)
    seen.clear()
    ids = torch.arange(3, 11)[None]
    for one in (model, twin):
        one(input_ids=ids)
    assert seen == [id(model), id(twin)]
    assert unfuse(model).forward.__func__ is forward


def scaled(model: Any) -> Any:
    own = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        output.logits = output.logits * 2
        return output

    model.forward = forward
    return model


def hooked_output(model: Any) -> Any:
    model.lm_head.register_forward_hook(lambda layer, inputs, output: output * 2)
    return model


def patched_after_measuring(model: Any) -> Any:
    return scaled(unfuse(fuse(model)))


REFUSED: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "other logits": (scaled, ValueError, "logits are not those of its head"),
    "other logits, patched after measuring": (patched_after_measuring, ValueError, "logits are not those of its head"),
    "hook that scales": (hooked_output, ValueError, "logits are not those of its head"),
    "compiled": (
        functools.partial(torch.compile, backend="eager"),
        TypeError,
        "got OptimizedModule; give the model it",
    ),
    "DataParallel": (nn.DataParallel, TypeError, "got DataParallel; give the model itself, `model.module`"),
    "a module": (lambda model: model.model, ValueError, "lm_head: expected a torch.nn.Linear"),
    "no transformers model": (lambda model: nn.Linear(2, 2), TypeError, "a transformers.PreTrainedModel, or a peft"),
    "offloaded": (lambda model: accelerate.cpu_offload(model, "cpu"), ValueError, "weights are not in this process"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_forwards_are_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    make, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        trainer_of(make(tiny_llama()), tmp_path)


def test_a_model_on_several_devices_is_refused() -> None:
    model: Any = tiny_llama()
    model.hf_device_map = {"model": 0, "lm_head": 1}
    with pytest.raises(ValueError, match=r"spread over 0, 1 \(device_map\).*device_map=\{'': 0\}"):
        fuse(model)


@pytest.mark.parametrize("first", ["transformers", "efface"])
@pytest.mark.parametrize("precision", [{"bf16": True}, {}], ids=["then bf16", "then fp32"])
def test_the_precision_is_that_of_the_run(
    first: str, precision: dict[str, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate skips a model that another trainer of the process has already prepared."""
    monkeypatch.chdir(tmp_path)
    expected = losses_of(tiny_llama(), tmp_path, **precision)
    model, other = tiny_llama(), {} if precision else {"bf16": True}
    if first == "transformers":
        transformers_trains(model, **other)
    else:
        trainer_of(model, tmp_path, **other, learning_rate=1e-30).train()
        model.load_state_dict(tiny_llama().state_dict())
    assert losses_of(model, tmp_path, **precision) == expected


def test_fuse_refuses_mixed_precision_of_another() -> None:
    model = finetuned(tiny_llama())
    with pytest.raises(ValueError, match="call `fuse` before `prepare`"):
        fuse(model)


# ---- heads ----


def fp32_head(**changes: Any) -> Any:
    model = tiny_llama(tie_word_embeddings=False, **changes).bfloat16()
    model.lm_head.float()
    return model


def test_an_fp32_head_on_a_bf16_model_trains_under_autocast(tmp_path: Path) -> None:
    trainer = trainer_of(fp32_head(), tmp_path, bf16=True)
    reading = reading_of(trainer.model)
    assert reading is not None
    assert reading.alone is None
    losses = exact_losses(trainer)
    trainer.train()
    expected = losses_of(tiny_llama(tie_word_embeddings=False), tmp_path)
    assert losses[0] == pytest.approx(expected[0], rel=2e-2)


def test_a_hook_that_casts_for_an_fp32_head_gives_fp32_logits(tmp_path: Path) -> None:
    """The losses are those of a model whose head reads the decoder's bf16 states in fp32."""
    model = hooked_head(fp32_head())
    trainer = trainer_of(model, tmp_path)
    batch = next(iter(trainer.get_train_dataloader())).batches[0]
    trainer.model.eval()
    logprobs = trainer.model(batch=batch)
    whole = batch.unshared()
    rows = torch.cat([model(input_ids=ids[None]).logits[0] for ids in whole.input_ids.split(whole.lengths)])
    expected = rows.double().log_softmax(1)[whole.label_rows, whole.targets]
    assert rows.dtype == torch.float32
    assert torch.allclose(logprobs.double(), expected, atol=2e-2)  # the decoder is bf16
    assert trainer.train().global_step == 3


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_may_be_resized_after_the_trainer_was_made(tied: bool, tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    trainer = trainer_of(model, tmp_path)
    model.resize_token_embeddings(101)
    losses = exact_losses(trainer)
    trainer.train()
    first = tiny_llama(tie_word_embeddings=tied)
    first.resize_token_embeddings(101)
    assert len(losses) == 3
    assert model.get_output_embeddings().weight.shape[0] == 101
    assert isinstance(model.get_output_embeddings(), FusedHead)


# ---- what transformers reads from the signature ----


@pytest.mark.parametrize(
    "settings",
    [
        {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": "eval_loss"},
        {"label_names": ["labels"]},
        {"eval_on_start": True},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_the_evaluation_loss_is_available(settings: dict[str, Any], tmp_path: Path) -> None:
    options = arguments(tmp_path, max_steps=2, reference_cache="none", eval_strategy="steps", eval_steps=1, **settings)
    sets = {"forget": random_store(8, seed=1), "retain": random_store(20, seed=2)}
    trainer = UnlearnTrainer(tiny_llama(), options, **sets, objective=NPO(), eval_dataset=ROWS)
    trainer.train()
    assert sum("eval_loss" in entry for entry in trainer.state.log_history) >= 2


def test_transformers_trains_an_unlearned_model(tmp_path: Path) -> None:
    model = tiny_llama()
    losses_of(model, tmp_path)
    transformers_trains(model, bf16=True)
