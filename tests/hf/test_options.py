"""Tests of transformers' arguments: each has an effect, is rejected, or is harmless; and of the accepted types."""

import dataclasses
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from transformers import TrainingArguments

from efface import NPO, FinetuneTrainer, FunctionObjective, SimNPO, UnlearnArguments, UnlearnTrainer, evaluate
from efface.hf.train import options
from efface.hf.train.arguments import unlearn_arguments
from efface.hf.train.options import (
    EFFECTS,
    HARMLESS,
    REFUSALS,
    TRAINER_EFFECTS,
    TRAINER_REFUSALS,
    checked_trainer_options,
    unknown_fields,
)
from efface.objectives import as_objective
from support.helpers import TEXTS, arguments, random_store, tiny_llama, tiny_tokenizer

FIELDS = {field.name: field for field in dataclasses.fields(TrainingArguments) if field.init}
TABLES = {"effect": EFFECTS, "harmless": HARMLESS, "refused": REFUSALS}


def trainer_of(args: Any, model: Any = None, **trainer_options: Any) -> UnlearnTrainer:
    sets = {"forget": random_store(8, seed=1), "retain": random_store(20, seed=2)}
    return UnlearnTrainer(model or tiny_llama(), args, **{**sets, "objective": NPO(), **trainer_options})


def losses_of(folder: Path, *, model: Any = None, **changes: Any) -> list[float]:
    trainer = trainer_of(arguments(folder, **{"max_steps": 3, "reference_cache": "none", **changes}), model)
    losses: list[float] = []
    own = trainer.training_step

    def training_step(*args: Any, **options: Any) -> torch.Tensor:
        loss = own(*args, **options)
        losses.append(loss.item())
        return loss

    trainer.training_step = training_step  # type: ignore[method-assign]
    trainer.train()
    assert len(losses) == 3
    return losses


# ---- the tables ----


def test_every_field_of_the_installed_transformers_is_in_one_table() -> None:
    assert not [name for name, _ in unknown_fields()], (
        "a newer transformers has fields that are missing in hf/train/options.py"
    )
    for name in FIELDS:
        assert [kind for kind, table in TABLES.items() if name in table] != [], name
    names = [name for table in TABLES.values() for name in table]
    assert len(names) == len(set(names))


def test_every_parameter_of_the_installed_trainer_is_in_one_table() -> None:
    parameters = set(inspect.signature(transformers.Trainer.__init__).parameters) - {"self"}
    assert parameters <= {*TRAINER_EFFECTS, *TRAINER_REFUSALS}
    assert not {*TRAINER_EFFECTS} & {*TRAINER_REFUSALS}


def test_the_tables_are_a_page(tmp_path: Path) -> None:
    page = options.as_markdown()
    for name in (*FIELDS, *TRAINER_EFFECTS, *TRAINER_REFUSALS):
        assert f"| `{name}` |" in page, name
    assert all(line.count("|") == 3 for line in page.splitlines() if line)


def test_a_field_that_no_table_knows_is_refused_unless_it_has_its_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(EFFECTS, "max_grad_norm")  # type: ignore[arg-type]
    arguments(tmp_path)
    with pytest.raises(ValueError, match=r"`max_grad_norm`: expected its default, 1\.0, got 0\.5: this version of"):
        arguments(tmp_path, max_grad_norm=0.5)


# ---- rejected ----

WRONG: dict[str, Any] = {
    "label_smoothing_factor": 0.3,
    "neftune_noise_alpha": 5.0,
    "train_sampling_strategy": "sequential",
    "group_by_length": True,
    "auto_find_batch_size": True,
    "use_liger_kernel": True,
    "ignore_data_skip": True,
    "accelerator_config": {"split_batches": True},
    "parallelism_config": object(),
    "include_tokens_per_second": True,
    "past_index": 0,
    "half_precision_backend": "apex",
    "fp16_backend": "apex",
    "per_gpu_train_batch_size": 2,
    "per_gpu_eval_batch_size": 2,
    "mp_parameters": "a=1",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_field_without_effect_is_refused_with_an_alternative(name: str, tmp_path: Path) -> None:
    refusal, args = REFUSALS[name], arguments(tmp_path)
    assert refusal.accepts(args)
    wrong = WRONG[name]
    if name == "parallelism_config":
        wrong = type("ParallelismConfig", (), {"cp_size": 2})()
    setattr(args, name, wrong)
    assert not refusal.accepts(args)
    if name not in FIELDS:
        return
    with pytest.raises(ValueError, match=rf"^`{name}`: expected {re.escape(refusal.expected)}, got .*: \w+"):
        trainer_of(args)
    if name != "parallelism_config":
        with pytest.raises((ValueError, ImportError), match=f"^`{name}`|Apex|APEX"):
            arguments(tmp_path, **{name: wrong})


@pytest.mark.parametrize("config", [{"dispatch_batches": True}, {"gradient_accumulation_kwargs": {"num_steps": 4}}])
def test_accelerate_options_about_batches_are_refused(config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^`accelerator_config`: .* set pairs_per_step"):
        arguments(tmp_path, accelerator_config=config)


def test_liger_may_keep_its_layers(tmp_path: Path) -> None:
    layers = {"fused_linear_cross_entropy": False, "cross_entropy": False}
    args = arguments(tmp_path)
    args.use_liger_kernel, args.liger_kernel_config = True, layers
    assert REFUSALS["use_liger_kernel"].accepts(args)


@pytest.mark.parametrize("name", [*TRAINER_REFUSALS, "data_collator"])
def test_a_parameter_without_effect_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=f"`{name}`: expected"):
        trainer_of(arguments(tmp_path), **{name: lambda *_: 1 / 0})
    assert trainer_of(arguments(tmp_path), **{name: None}).objective == NPO()


def test_an_unknown_parameter_is_named() -> None:
    with pytest.raises(TypeError, match="unexpected argument 'colator'; expected one of"):
        checked_trainer_options({"colator": None})


# ---- harmless ----


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of a run without changes."""
    return losses_of(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize(
    "change",
    [
        {"average_tokens_across_devices": False},
        {"logging_nan_inf_filter": True},
        {"length_column_name": "n"},
        {"do_train": True},
        {"do_eval": True},
        {"do_predict": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_harmless_field_changes_no_bit(change: dict[str, Any], plain: list[float], tmp_path: Path) -> None:
    assert losses_of(tmp_path, **change) == plain


# ---- effects, and their independence of the token budget ----

CHANGES: list[dict[str, Any]] = [
    {"per_device_train_batch_size": 2},
    {"gradient_accumulation_steps": 2},
    {"learning_rate": 2e-3},
    {"lr_scheduler_type": "constant"},
    {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 5e-4}},
    {"warmup_steps": 2},
    {"optim": "sgd"},
    {"optim": "adamw_torch", "weight_decay": 10.0},
    {"adam_beta1": 0.5},
    {"adam_beta2": 0.5},
    {"adam_epsilon": 1.0},
    {"max_grad_norm": 0.1, "optim": "sgd"},
    {"data_seed": 7},
    {"seed": 7},
]


@pytest.mark.parametrize("change", CHANGES, ids="-".join)
def test_a_field_of_the_optimizer_or_the_plan_has_an_effect_for_any_token_budget(
    change: dict[str, Any], plain: list[float], tmp_path: Path
) -> None:
    changed = losses_of(tmp_path, **change)
    assert changed != plain
    assert losses_of(tmp_path, **change, token_budget=48) == pytest.approx(changed, rel=1e-5)


@pytest.mark.parametrize("value", ["all", "non_padding", True])
@pytest.mark.parametrize("budget", [4096, 48])
def test_input_tokens_are_counted_as_packs_hold_them(value: Any, budget: int, tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=3, include_num_input_tokens_seen=value, token_budget=budget)
    trainer = trainer_of(args)
    plan = [trainer.get_train_dataloader().dataset[step].tokens for step in range(2)]
    trainer.train()
    seen = [entry["num_input_tokens_seen"] for entry in trainer.state.log_history if "loss" in entry]
    assert seen[:2] == [plan[0], sum(plan)]
    assert trainer.state.num_input_tokens_seen == seen[2] > seen[1]


# ---- types that transformers and TRL accept ----


def test_a_model_may_be_a_name_which_brings_its_tokenizer(tmp_path: Path) -> None:
    tiny_llama(vocab_size=300).save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    sets = {"forget": TEXTS[:2], "retain": TEXTS[2:], "objective": "npo"}
    for name in (str(tmp_path / "m"), tmp_path / "m"):
        trainer = UnlearnTrainer(name, arguments(tmp_path, max_steps=1), **sets, reference_model=name)
        assert trainer.train().global_step == 1
        assert trainer.base_model == str(tmp_path / "m")
    assert FinetuneTrainer(str(name), arguments(tmp_path, max_steps=1), data=TEXTS).train().global_step == 1
    with pytest.raises(FileNotFoundError, match="no-such"):
        UnlearnTrainer(str(tmp_path / "no-such"), arguments(tmp_path), **sets)


def test_training_arguments_are_taken_with_our_defaults(tmp_path: Path) -> None:
    given = {"max_steps": 2, "learning_rate": 1e-3, "seed": 3, "save_strategy": "no", "use_cpu": True, "bf16": True}
    args = TrainingArguments(output_dir=str(tmp_path), hub_token="hf_x", **given)
    before = dict(vars(args))
    ours = unlearn_arguments(args)
    assert vars(args) == before
    assert isinstance(ours, UnlearnArguments)
    assert {name: getattr(ours, name) for name in given} == given
    assert ours.hub_token == "hf_x"
    assert ours.logging_steps == 10
    assert not ours.remove_unused_columns
    assert trainer_of(args).train().global_step == 2
    with pytest.raises(ValueError, match="`label_smoothing_factor`"):
        trainer_of(TrainingArguments(output_dir=str(tmp_path), use_cpu=True, label_smoothing_factor=0.1))


NPO_LIKE: list[Any] = ["npo", "NPO", NPO, NPO()]


@pytest.mark.parametrize("given", NPO_LIKE, ids=repr)
def test_an_objective_may_be_a_name_or_a_class(given: Any) -> None:
    assert as_objective(given) == NPO()


def test_an_objective_may_be_a_function() -> None:
    assert isinstance(as_objective(lambda sequences: sequences.logprobs), FunctionObjective)


WRONG_TYPES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "model": ({"model": 3}, TypeError, "`model`: expected a transformers.PreTrainedModel"),
    "model, a class": ({"model": transformers.LlamaForCausalLM}, TypeError, "`model`: expected a transformers"),
    "model, a module": ({"model": torch.nn.Linear(2, 2)}, TypeError, "`model`: expected a transformers"),
    "reference_model": ({"reference_model": 3}, TypeError, "`reference_model`: expected a transformers"),
    "args, a dict": ({"args": {"output_dir": "x"}}, TypeError, "`args`: expected efface.UnlearnArguments or"),
    "args, of others": (
        {"args": transformers.Seq2SeqTrainingArguments(output_dir="unused", use_cpu=True)},
        TypeError,
        "`args`: expected .* got Seq2SeqTrainingArguments, whose fields generation_config, .* would have no effect",
    ),
    "args, None": ({"args": None}, TypeError, "`args`: expected efface.UnlearnArguments or .* got NoneType"),
    "objective, None": ({"objective": None}, TypeError, "`objective`: expected an efface.Objective.* got NoneType"),
    "objective, a dict": ({"objective": {"name": "npo"}}, TypeError, "`objective`: expected .* got dict"),
    "objective, another class": ({"objective": int}, TypeError, "`objective`: expected .* got int"),
    "objective, an unknown name": ({"objective": "nop"}, ValueError, "objective: expected one of .*npo.* got 'nop'"),
    "objective, a class without defaults": (
        {"objective": FunctionObjective},
        TypeError,
        "expected an instance FunctionObjective",
    ),
    "processing_class": ({"processing_class": "gpt2"}, TypeError, "`processing_class`: expected a tokenizer of"),
    "forget, a stream": (
        {"forget": datasets.Dataset.from_list(TEXTS).to_iterable_dataset(), "processing_class": tiny_tokenizer()},
        TypeError,
        r"`forget`: expected rows \(a list .* got IterableDataset; pass list",
    ),
    "forget, a number": ({"forget": 3, "processing_class": tiny_tokenizer()}, TypeError, "`forget`: expected rows"),
    "retain, columns": (
        {"retain": {"question": ["a"], "answer": ["b"]}, "processing_class": tiny_tokenizer()},
        TypeError,
        "`retain`: expected rows, got a mapping",
    ),
    "callbacks": ({"callbacks": 3}, TypeError, "`callbacks`: expected a list"),
    "reference": ({"reference": 3}, ValueError, "`reference`: expected one of 'auto', .* got 3"),
}


@pytest.mark.parametrize("name", WRONG_TYPES)
def test_an_argument_of_another_type_is_named_with_what_it_takes(name: str, tmp_path: Path) -> None:
    change, kind, message = WRONG_TYPES[name]
    given = {"args": arguments(tmp_path), "model": tiny_llama(), **change}
    with pytest.raises(kind, match=message):
        trainer_of(given.pop("args"), given.pop("model"), **given)


@pytest.mark.parametrize("objective", ["simnpo", SimNPO], ids=repr)
def test_a_named_objective_trains(objective: Any, tmp_path: Path) -> None:
    make: Callable[..., UnlearnTrainer] = trainer_of
    assert make(arguments(tmp_path, max_steps=1), objective=objective).train().global_step == 1


FAME = [{**row, "topic_id": number % 2, "language": "EN"} for number, row in enumerate(TEXTS)]
EVALUATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "tofu": lambda model, tokenizer: evaluate.tofu(model, tokenizer, "unused"),
    "evaluate_metrics": lambda model, tokenizer: evaluate.evaluate_metrics(model, tokenizer, TEXTS, ["probability"]),
    "fame": lambda model, tokenizer: evaluate.fame(model, tokenizer, FAME, forget_filter="topic_id=1"),
    "answer_logprobs": lambda model, tokenizer: evaluate.answer_logprobs(model, tokenizer, ["a"], ["b"]),
    "score_rows": lambda model, tokenizer: evaluate.score_rows(model, tokenizer, TEXTS, truth_ratio=False),
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_an_evaluation_names_wrong_models_and_tokenizers(name: str) -> None:
    call = EVALUATIONS[name]
    if name != "tofu":  # it reads its data first
        with pytest.raises(TypeError, match="`model`: expected a transformers.PreTrainedModel.* got str; load it with"):
            call("gpt2", tiny_tokenizer())
    with pytest.raises((TypeError, FileNotFoundError), match="`tokenizer`: expected a tokenizer of|'unused'"):
        call(tiny_llama(), "gpt2")
