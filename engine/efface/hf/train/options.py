"""What becomes of every field of ``transformers.TrainingArguments`` and every parameter of ``transformers.Trainer``.

A field has an effect, is refused with the reason, or is harmless: whatever its value, the result is the same. What an
effect is holds for packed batches: it does not depend on ``token_budget``. A field that is in no table, of a newer
transformers, is refused unless it has its default. The tables know transformers 4.56 to 5.23; tests compare them with
the version that is installed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

from transformers import TrainerCallback, TrainingArguments

Arguments = Any
"""``TrainingArguments``, or a subclass."""


@dataclass(frozen=True)
class Refusal:
    """Why values of a field are refused.

    Attributes:
        accepts: whether the arguments are fine all the same.
        expected: what a message says is accepted.
        reason: what the value would do, or not do; and what serves instead.
    """

    accepts: Callable[[Arguments], bool]
    expected: str
    reason: str


def _unset(name: str, *values: Any) -> Callable[[Arguments], bool]:
    """Return whether a field has one of ``values``; every version's names for "off" count."""
    return lambda args: getattr(args, name, None) in (None, False, "", *values)


def _accelerator_accepts(args: Arguments) -> bool:
    config = args.accelerator_config
    wanted = config if isinstance(config, Mapping) else vars(config) if config is not None else {}
    return not any(wanted.get(name) for name in ("split_batches", "dispatch_batches", "gradient_accumulation_kwargs"))


def _parallelism_accepts(args: Arguments) -> bool:
    config = getattr(args, "parallelism_config", None)
    sizes = (getattr(config, name, 1) for name in ("tp_size", "cp_size", "sp_size"))
    return config is None or all(size in (None, 1) for size in sizes)


def _liger_accepts(args: Arguments) -> bool:
    config = args.liger_kernel_config or {}
    losses = ("fused_linear_cross_entropy", "cross_entropy")
    return not args.use_liger_kernel or all(config.get(name) is False for name in losses)


_OPTIMIZER = "of the optimizer"
_LOGS = "of logs"
_SAVES = "of checkpoints"
_HUB = "of what is pushed to the Hub"
_EVALUATION = "of the evaluation of `eval_dataset`, which is padded and collated by transformers"
_DEVICE = "of where it runs"
_PROCESSES = "of runs on several processes"

EFFECTS: Mapping[str, str] = {
    "output_dir": _SAVES,
    "per_device_train_batch_size": "of the pairs of an optimizer step: it times gradient_accumulation_steps times "
    "processes, unless pairs_per_step says how many",
    "gradient_accumulation_steps": "of the pairs of an optimizer step, see per_device_train_batch_size; what one "
    "forward pass holds is token_budget's",
    "num_train_epochs": "of the run's length; an epoch is the larger set once",
    "max_steps": "of the run's length, in optimizer steps",
    "learning_rate": _OPTIMIZER,
    "lr_scheduler_type": _OPTIMIZER,
    "lr_scheduler_kwargs": _OPTIMIZER,
    "warmup_steps": _OPTIMIZER,
    "warmup_ratio": _OPTIMIZER,
    "optim": _OPTIMIZER,
    "optim_args": _OPTIMIZER,
    "optim_target_modules": _OPTIMIZER,
    "weight_decay": _OPTIMIZER,
    "adam_beta1": _OPTIMIZER,
    "adam_beta2": _OPTIMIZER,
    "adam_epsilon": _OPTIMIZER,
    "adafactor": _OPTIMIZER,
    "max_grad_norm": "of the gradient of a whole optimizer step, on all processes",
    "bf16": "of the precision: autocast",
    "fp16": "of the precision: autocast, with a loss scaler",
    "tf32": "of the precision",
    "gradient_checkpointing": "of memory",
    "gradient_checkpointing_kwargs": "of memory",
    "activation_checkpointing": "of memory",
    "activation_checkpointing_kwargs": "of memory",
    "torch_compile": "of the decoder; the loss is a kernel",
    "torch_compile_backend": "of the decoder",
    "torch_compile_mode": "of the decoder",
    "torchdynamo": "of the decoder",
    "torch_empty_cache_steps": "of memory",
    "use_cache": "of the model's configuration; packs are read without a cache",
    "liger_kernel_config": "of Liger's layers, see use_liger_kernel",
    "logging_strategy": _LOGS,
    "logging_steps": _LOGS,
    "logging_first_step": _LOGS,
    "logging_dir": _LOGS,
    "log_on_each_node": _LOGS,
    "log_level": _LOGS,
    "log_level_replica": _LOGS,
    "disable_tqdm": _LOGS,
    "report_to": _LOGS,
    "run_name": _LOGS,
    "project": _LOGS,
    "trackio_space_id": _LOGS,
    "trackio_bucket_id": _LOGS,
    "trackio_static_space_id": _LOGS,
    "include_num_input_tokens_seen": "of logs: the tokens of all packs, on all processes; packs hold no padding, so "
    "all and non_padding are one",
    "debug": "of logs; underflow_overflow watches the decoder",
    "skip_memory_metrics": _LOGS,
    "eval_strategy": _EVALUATION,
    "eval_steps": _EVALUATION,
    "eval_delay": _EVALUATION,
    "eval_on_start": _EVALUATION,
    "per_device_eval_batch_size": _EVALUATION,
    "prediction_loss_only": _EVALUATION,
    "eval_do_concat_batches": _EVALUATION,
    "eval_use_gather_object": _EVALUATION,
    "eval_accumulation_steps": _EVALUATION,
    "include_for_metrics": _EVALUATION,
    "include_inputs_for_metrics": _EVALUATION,
    "batch_eval_metrics": _EVALUATION,
    "bf16_full_eval": _EVALUATION,
    "fp16_full_eval": _EVALUATION,
    "jit_mode_eval": _EVALUATION,
    "label_names": _EVALUATION,
    "remove_unused_columns": _EVALUATION,
    "use_legacy_prediction_loop": _EVALUATION,
    "dataloader_persistent_workers": _EVALUATION,
    "dataloader_prefetch_factor": _EVALUATION,
    "dataloader_multiprocessing_context": _EVALUATION,
    "dataloader_in_order": _EVALUATION,
    "save_strategy": _SAVES,
    "save_steps": _SAVES,
    "save_total_limit": _SAVES,
    "save_only_model": _SAVES,
    "save_on_each_node": _SAVES,
    "save_safetensors": _SAVES,
    "enable_jit_checkpoint": _SAVES,
    "load_best_model_at_end": _SAVES,
    "metric_for_best_model": _SAVES,
    "greater_is_better": _SAVES,
    "restore_callback_states_from_checkpoint": _SAVES,
    "push_to_hub": _HUB,
    "push_to_hub_model_id": _HUB,
    "push_to_hub_organization": _HUB,
    "push_to_hub_token": _HUB,
    "hub_token": _HUB,
    "hub_private_repo": _HUB,
    "hub_model_id": _HUB,
    "hub_strategy": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
    "full_determinism": "of the kernels that torch chooses",
    "seed": "of LoRA's first weights, refusals, dropout, and of the plan where data_seed is None",
    "data_seed": "of the plan: which pairs make a step",
    "dataloader_drop_last": "of the plan: a last step of fewer pairs is left out",
    "dataloader_num_workers": "of the threads that assemble packs (of eval_dataset: processes); of speed alone",
    "dataloader_pin_memory": "of memory and speed",
    "use_cpu": _DEVICE,
    "no_cuda": _DEVICE,
    "use_mps_device": _DEVICE,
    "use_ipex": _DEVICE,
    "tpu_num_cores": _DEVICE,
    "tpu_metrics_debug": _DEVICE,
    "local_rank": _PROCESSES,
    "ddp_find_unused_parameters": _PROCESSES,
    "ddp_bucket_cap_mb": _PROCESSES,
    "ddp_broadcast_buffers": _PROCESSES,
    "ddp_static_graph": _PROCESSES,
    "ddp_backend": _PROCESSES,
    "ddp_timeout": _PROCESSES,
    "fsdp": _PROCESSES,
    "fsdp_config": _PROCESSES,
    "fsdp_min_num_params": _PROCESSES,
    "fsdp_transformer_layer_cls_to_wrap": _PROCESSES,
    "deepspeed": _PROCESSES,
    "ray_scope": "of a hyper-parameter search by Ray",
}
"""Fields that do what they do in transformers, and of what; for packed batches."""

HARMLESS: Mapping[str, str] = {
    "average_tokens_across_devices": "the means run over the whole step, on all processes, either way",
    "logging_nan_inf_filter": "a loss that is not finite stops the run",
    "length_column_name": "is read by grouping by length alone, which is refused",
    "fp16_opt_level": "is read by Apex alone, which is refused",
    "do_train": "is for scripts; no trainer reads it",
    "do_eval": "is for scripts; no trainer reads it",
    "do_predict": "is for scripts; no trainer reads it",
    "resume_from_checkpoint": "is for scripts; `efface unlearn` reads it, trainers have an argument of train()",
    "overwrite_output_dir": "is for scripts; `efface unlearn` has --overwrite",
}
"""Fields that change no result, and why."""

REFUSALS: Mapping[str, Refusal] = {
    "label_smoothing_factor": Refusal(
        _unset("label_smoothing_factor", 0),
        "0",
        "the loss is the objective's, whose formula has no smoothing; drop it",
    ),
    "neftune_noise_alpha": Refusal(
        lambda args: args.neftune_noise_alpha is None or getattr(args, "compat", None) is not None,
        "None",
        "its noise depends on the tokens of a pass, so that the token budget would change the result; drop it",
    ),
    "train_sampling_strategy": Refusal(
        _unset("train_sampling_strategy", "random"),
        "'random'",
        "the plan of an epoch puts together forget and retain sequences, and packs make grouping by length needless; "
        "see retain_sampling for the order of retain rows",
    ),
    "group_by_length": Refusal(
        _unset("group_by_length"), "False", "packs hold no padding that grouping by length would save; drop it"
    ),
    "auto_find_batch_size": Refusal(
        _unset("auto_find_batch_size"),
        "False",
        "the pairs of a step stay what they are, whatever fits; set a smaller token_budget, which changes memory and "
        "not the result",
    ),
    "use_liger_kernel": Refusal(
        _liger_accepts,
        "False",
        "Liger's loss would take the place of the fused head; drop it, or keep Liger's layers alone with "
        "liger_kernel_config={'fused_linear_cross_entropy': False, 'cross_entropy': False}",
    ),
    "ignore_data_skip": Refusal(
        _unset("ignore_data_skip"),
        "False",
        "a resumed run would train some pairs twice; skipping costs nothing here, so drop it",
    ),
    "accelerator_config": Refusal(
        _accelerator_accepts,
        "one without split_batches, dispatch_batches and gradient_accumulation_kwargs",
        "the plan of an epoch shares steps out among processes and has the accumulation in it; drop them, and set "
        "pairs_per_step",
    ),
    "parallelism_config": Refusal(
        _parallelism_accepts,
        "one without tensor, context and sequence parallelism",
        "they split a batch along axes that a pack has not; use DDP, or `fsdp`",
    ),
    "include_tokens_per_second": Refusal(
        _unset("include_tokens_per_second"), "False", "tokens_per_second is in every log already; drop it"
    ),
    "past_index": Refusal(
        lambda args: getattr(args, "past_index", -1) == -1, "-1", "packs are read without a past; drop it"
    ),
    "half_precision_backend": Refusal(
        _unset("half_precision_backend", "auto", "cpu_amp", "cuda_amp"), "'auto'", "Apex is not served; use bf16"
    ),
    "fp16_backend": Refusal(
        _unset("fp16_backend", "auto", "cpu_amp", "cuda_amp"), "'auto'", "Apex is not served; use bf16"
    ),
    "per_gpu_train_batch_size": Refusal(
        _unset("per_gpu_train_batch_size"), "None", "it is deprecated; set per_device_train_batch_size"
    ),
    "per_gpu_eval_batch_size": Refusal(
        _unset("per_gpu_eval_batch_size"), "None", "it is deprecated; set per_device_eval_batch_size"
    ),
    "mp_parameters": Refusal(_unset("mp_parameters"), "''", "SageMaker's model parallelism is not served; use `fsdp`"),
}
"""Fields of which some values are refused."""

TRAINER_EFFECTS: Mapping[str, str] = {
    "model": "what is trained; a transformers or peft model, or the name of one",
    "args": "efface.UnlearnArguments, or transformers.TrainingArguments",
    "processing_class": "the tokenizer; needed for text",
    "callbacks": "as in transformers",
    "optimizers": "as in transformers",
    "optimizer_cls_and_kwargs": "as in transformers",
    "eval_dataset": _EVALUATION,
    "compute_metrics": _EVALUATION,
    "preprocess_logits_for_metrics": _EVALUATION,
    "data_collator": f"{_EVALUATION}; refused without one",
}
"""Parameters of ``Trainer`` that the trainers take as well."""

TRAINER_REFUSALS: Mapping[str, str] = {
    "train_dataset": "give `forget` and `retain` (FinetuneTrainer: `data`)",
    "compute_loss_func": "the loss is computed in the head, without logits; give `objective`, which may be a function "
    "of log-probabilities (efface.FunctionObjective)",
    "model_init": "give `model`, or the name of one",
    "tokenizer": "give `processing_class`",
}
"""Parameters of ``Trainer`` that are refused, and what serves instead; ``tokenizer`` is transformers 4's."""

_TRAINING = {field.name: field for field in fields(TrainingArguments)}


def check_fields(args: Arguments) -> None:
    """Raise ValueError for a field whose value would have no effect on packed batches, or another one."""
    for name in _TRAINING:
        if (refusal := REFUSALS.get(name)) is not None and not refusal.accepts(args):
            raise ValueError(f"`{name}`: expected {refusal.expected}, got {getattr(args, name)!r}: {refusal.reason}")


def check_unknown_fields(args: Arguments) -> None:
    """Raise ValueError for a field that no table knows, unless it has its default."""
    for name, field in unknown_fields():
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        if getattr(args, name) != default:
            raise ValueError(
                f"`{name}`: expected its default, {default!r}, got {getattr(args, name)!r}: this version of efface "
                "does not know what it does to packed batches; drop it, or take a newer efface"
            )


def unknown_fields() -> Iterator[tuple[str, Any]]:
    """Yield the fields of the installed ``TrainingArguments`` that no table knows."""
    for name, field in _TRAINING.items():
        if field.init and not any(name in table for table in (EFFECTS, HARMLESS, REFUSALS)):
            yield name, field


def checked_trainer_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of ``Trainer`` that were given beside the parameters of our own; None counts as not given.

    Raises:
        TypeError: one that would have no effect, or that there is not.
    """
    for name, value in options.items():
        if name in TRAINER_REFUSALS and value is not None:
            raise TypeError(f"`{name}`: expected none, got {type(value).__name__}; {TRAINER_REFUSALS[name]}")
        if name not in TRAINER_REFUSALS and name not in TRAINER_EFFECTS:
            raise TypeError(f"unexpected argument {name!r}; expected one of {', '.join(sorted(TRAINER_EFFECTS))}")
    if options.get("data_collator") is not None and options.get("eval_dataset") is None:
        raise TypeError(
            "`data_collator`: expected `eval_dataset`, whose rows it collates, got none; what is trained is packed by "
            "token_budget, not collated"
        )
    callbacks = options.get("callbacks")
    if callbacks is not None and not isinstance(callbacks, Sequence):
        raise TypeError(f"`callbacks`: expected a list of TrainerCallback, got {type(callbacks).__name__}")
    for one in callbacks or ():
        if not issubclass(one if isinstance(one, type) else type(one), TrainerCallback):
            raise TypeError(f"`callbacks`: expected a list of TrainerCallback, got {one!r} in it")
    return {name: value for name, value in options.items() if name not in TRAINER_REFUSALS}


def as_markdown() -> str:
    """Return the tables as a page of the documentation has them; the version that is installed is marked."""
    lines = ["| Field of `TrainingArguments` | What becomes of it |", "| --- | --- |"]
    rows = {name: f"effect: {note}" for name, note in EFFECTS.items()}
    rows |= {name: f"harmless: {note}" for name, note in HARMLESS.items()}
    rows |= {name: f"refused, but for {refusal.expected}: {refusal.reason}" for name, refusal in REFUSALS.items()}
    lines += [f"| `{name}`{'' if name in _TRAINING else ' (4.x)'} | {rows[name]} |" for name in sorted(rows)]
    lines += ["", "| Parameter of `Trainer` | What becomes of it |", "| --- | --- |"]
    parameters = {name: f"effect: {note}" for name, note in TRAINER_EFFECTS.items()}
    parameters |= {name: f"refused: {note}" for name, note in TRAINER_REFUSALS.items()}
    lines += [f"| `{name}` | {note} |" for name, note in parameters.items()]
    return "\n".join(lines) + "\n"
