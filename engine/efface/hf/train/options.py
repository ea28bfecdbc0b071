"""Treatment of every field of ``transformers.TrainingArguments`` and every parameter of ``transformers.Trainer``.

A field is in one of three tables. ``EFFECTS``: the field works with packed batches, and its effect does not depend on
``token_budget``. ``HARMLESS``: the field does not change the result, whatever its value. ``REFUSALS``: some values
raise an error that gives the reason. A field in no table, from a newer transformers, must have its default value. The
tables cover transformers 4.56 to 5.23; tests compare them with the installed version.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

from transformers import TrainerCallback, TrainingArguments

Arguments = Any
"""``TrainingArguments`` or a subclass."""


@dataclass(frozen=True)
class Refusal:
    """The reason why some values of a field are refused.

    Attributes:
        accepts: returns whether the arguments have an accepted value.
        expected: the accepted value, as the error message describes it.
        reason: what a refused value would do or fail to do, and what to set instead.
    """

    accepts: Callable[[Arguments], bool]
    expected: str
    reason: str


def _unset(name: str, *values: Any) -> Callable[[Arguments], bool]:
    """Return a predicate: the field is missing, is None, False or "" ("off" in some version), or is in ``values``."""
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


_OPTIMIZER = "the optimizer"
_LOGS = "logging"
_SAVES = "checkpoints"
_HUB = "uploads to the Hub"
_EVALUATION = "evaluation of `eval_dataset`, which transformers pads and collates"
_DEVICE = "the choice of device"
_PROCESSES = "runs on several processes"

EFFECTS: Mapping[str, str] = {
    "output_dir": _SAVES,
    "per_device_train_batch_size": "the number of pairs per optimizer step, which is this value times "
    "gradient_accumulation_steps times processes, unless pairs_per_step is set",
    "gradient_accumulation_steps": "the number of pairs per optimizer step, see per_device_train_batch_size; the size "
    "of a forward pass is set by token_budget",
    "num_train_epochs": "the length of the run; an epoch uses each row of the larger set once",
    "max_steps": "the length of the run, in optimizer steps",
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
    "max_grad_norm": "gradient clipping, by the norm of a whole optimizer step over all processes",
    "bf16": "precision: autocast to bfloat16",
    "fp16": "precision: autocast to float16, with a loss scaler",
    "tf32": "precision",
    "gradient_checkpointing": "memory",
    "gradient_checkpointing_kwargs": "memory",
    "activation_checkpointing": "memory",
    "activation_checkpointing_kwargs": "memory",
    "torch_compile": "compilation of the decoder; the loss is a separate kernel",
    "torch_compile_backend": "compilation of the decoder",
    "torch_compile_mode": "compilation of the decoder",
    "torchdynamo": "compilation of the decoder",
    "torch_empty_cache_steps": "memory",
    "use_cache": "the model's configuration; packed batches run without a KV cache",
    "liger_kernel_config": "the choice of Liger's layers, see use_liger_kernel",
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
    "include_num_input_tokens_seen": "logging: the tokens of all packed batches, over all processes; they have no "
    "padding, so all and non_padding are the same",
    "debug": "logging; underflow_overflow watches the decoder",
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
    "full_determinism": "the kernels that torch chooses",
    "seed": "LoRA's initial weights, refusals, dropout, and the plan of an epoch if data_seed is None",
    "data_seed": "the plan of an epoch: which pairs form a step",
    "dataloader_drop_last": "the plan of an epoch: an incomplete last step is dropped",
    "dataloader_num_workers": "speed only: the number of threads that assemble packed batches (for eval_dataset: of "
    "processes)",
    "dataloader_pin_memory": "memory and speed",
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
    "ray_scope": "a hyper-parameter search by Ray",
}
"""Fields that work with packed batches as in transformers, and what each affects."""

HARMLESS: Mapping[str, str] = {
    "average_tokens_across_devices": "the mean is always over the whole step, on all processes",
    "logging_nan_inf_filter": "a loss that is not finite always stops the run",
    "length_column_name": "only grouping by length reads it, which is refused",
    "fp16_opt_level": "only Apex reads it, which is refused",
    "do_train": "for scripts; no trainer reads it",
    "do_eval": "for scripts; no trainer reads it",
    "do_predict": "for scripts; no trainer reads it",
    "resume_from_checkpoint": "for scripts; `efface unlearn` reads it, and train() has an argument of this name",
    "overwrite_output_dir": "for scripts; `efface unlearn` has --overwrite",
}
"""Fields that do not change the result, and why."""

REFUSALS: Mapping[str, Refusal] = {
    "label_smoothing_factor": Refusal(
        _unset("label_smoothing_factor", 0),
        "0",
        "the objective's formula has no label smoothing; drop it",
    ),
    "neftune_noise_alpha": Refusal(
        lambda args: args.neftune_noise_alpha is None or getattr(args, "compat", None) is not None,
        "None",
        "its noise depends on the tokens of a forward pass, so token_budget would change the result; drop it",
    ),
    "train_sampling_strategy": Refusal(
        _unset("train_sampling_strategy", "random"),
        "'random'",
        "the plan of an epoch pairs forget and retain sequences, and packed batches have no padding that grouping by "
        "length would save; set retain_sampling for the order of retain rows",
    ),
    "group_by_length": Refusal(
        _unset("group_by_length"), "False", "packed batches have no padding that grouping by length would save; drop it"
    ),
    "auto_find_batch_size": Refusal(
        _unset("auto_find_batch_size"),
        "False",
        "the number of pairs per step does not depend on memory; set a smaller token_budget, which changes memory and "
        "not the result",
    ),
    "use_liger_kernel": Refusal(
        _liger_accepts,
        "False",
        "Liger's loss would replace the fused head; drop it, or use Liger's layers without its loss: "
        "liger_kernel_config={'fused_linear_cross_entropy': False, 'cross_entropy': False}",
    ),
    "ignore_data_skip": Refusal(
        _unset("ignore_data_skip"),
        "False",
        "a resumed run would train some pairs twice; drop it, skipping data costs no time here",
    ),
    "accelerator_config": Refusal(
        _accelerator_accepts,
        "one without split_batches, dispatch_batches and gradient_accumulation_kwargs",
        "the plan of an epoch already divides steps among processes and includes gradient accumulation; drop them, and "
        "set pairs_per_step",
    ),
    "parallelism_config": Refusal(
        _parallelism_accepts,
        "one without tensor, context and sequence parallelism",
        "they split a batch along axes that a packed batch does not have; use DDP or `fsdp`",
    ),
    "include_tokens_per_second": Refusal(
        _unset("include_tokens_per_second"), "False", "every log entry already has tokens_per_second; drop it"
    ),
    "past_index": Refusal(
        lambda args: getattr(args, "past_index", -1) == -1, "-1", "packed batches run without past states; drop it"
    ),
    "half_precision_backend": Refusal(
        _unset("half_precision_backend", "auto", "cpu_amp", "cuda_amp"), "'auto'", "Apex is not supported; use bf16"
    ),
    "fp16_backend": Refusal(
        _unset("fp16_backend", "auto", "cpu_amp", "cuda_amp"), "'auto'", "Apex is not supported; use bf16"
    ),
    "per_gpu_train_batch_size": Refusal(
        _unset("per_gpu_train_batch_size"), "None", "it is deprecated; set per_device_train_batch_size"
    ),
    "per_gpu_eval_batch_size": Refusal(
        _unset("per_gpu_eval_batch_size"), "None", "it is deprecated; set per_device_eval_batch_size"
    ),
    "mp_parameters": Refusal(
        _unset("mp_parameters"), "''", "SageMaker's model parallelism is not supported; use `fsdp`"
    ),
}
"""Fields with refused values."""

TRAINER_EFFECTS: Mapping[str, str] = {
    "model": "the model to train: a transformers or peft model, a folder, or a name on the Hub",
    "args": "efface.UnlearnArguments or transformers.TrainingArguments",
    "processing_class": "the tokenizer; required for text",
    "callbacks": "as in transformers",
    "optimizers": "as in transformers",
    "optimizer_cls_and_kwargs": "as in transformers",
    "eval_dataset": _EVALUATION,
    "compute_metrics": _EVALUATION,
    "preprocess_logits_for_metrics": _EVALUATION,
    "data_collator": f"{_EVALUATION}; requires `eval_dataset`",
}
"""Parameters of ``Trainer`` that efface's trainers accept too."""

TRAINER_REFUSALS: Mapping[str, str] = {
    "train_dataset": "pass `forget` and `retain` (FinetuneTrainer: `data`)",
    "compute_loss_func": "the loss is computed in the head, without logits; pass `objective`, which can be a function "
    "of log-probabilities (efface.FunctionObjective)",
    "model_init": "pass `model`, a model or a name",
    "tokenizer": "pass `processing_class`",
}
"""Parameters of ``Trainer`` that are refused, and what to pass instead; ``tokenizer`` exists in transformers 4 only."""

_TRAINING = {field.name: field for field in fields(TrainingArguments)}


def check_fields(args: Arguments) -> None:
    """Raise ValueError for a value in ``REFUSALS``: it would have no effect, or a wrong one, on packed batches."""
    for name in _TRAINING:
        if (refusal := REFUSALS.get(name)) is not None and not refusal.accepts(args):
            raise ValueError(f"`{name}`: expected {refusal.expected}, got {getattr(args, name)!r}: {refusal.reason}")


def check_unknown_fields(args: Arguments) -> None:
    """Raise ValueError if a field that is in no table does not have its default value."""
    for name, field in unknown_fields():
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        if getattr(args, name) != default:
            raise ValueError(
                f"`{name}`: expected its default, {default!r}, got {getattr(args, name)!r}: this version of efface "
                "does not know the effect of this field on packed batches; drop it, or install a newer efface"
            )


def unknown_fields() -> Iterator[tuple[str, Any]]:
    """Yield the names and fields of the installed ``TrainingArguments`` that are in no table."""
    for name, field in _TRAINING.items():
        if field.init and not any(name in table for table in (EFFECTS, HARMLESS, REFUSALS)):
            yield name, field


def checked_trainer_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters in ``options`` to pass on to ``transformers.Trainer``.

    A refused parameter with the value None is dropped.

    Raises:
        TypeError: a parameter would have no effect, is unknown, or is of a wrong type.
    """
    for name, value in options.items():
        if name in TRAINER_REFUSALS and value is not None:
            raise TypeError(f"`{name}`: expected None, got {type(value).__name__}; {TRAINER_REFUSALS[name]}")
        if name not in TRAINER_REFUSALS and name not in TRAINER_EFFECTS:
            raise TypeError(f"unexpected argument {name!r}; expected one of {', '.join(sorted(TRAINER_EFFECTS))}")
    if options.get("data_collator") is not None and options.get("eval_dataset") is None:
        raise TypeError(
            "`data_collator`: expected `eval_dataset`, whose rows it collates, got none; drop it, training data are "
            "packed by token_budget and not collated"
        )
    callbacks = options.get("callbacks")
    if callbacks is not None and not isinstance(callbacks, Sequence):
        raise TypeError(f"`callbacks`: expected a list of TrainerCallback, got {type(callbacks).__name__}")
    for one in callbacks or ():
        if not issubclass(one if isinstance(one, type) else type(one), TrainerCallback):
            raise TypeError(f"`callbacks`: expected a list of TrainerCallback, got one with {one!r}")
    return {name: value for name, value in options.items() if name not in TRAINER_REFUSALS}


def as_markdown() -> str:
    """Return the tables as Markdown; fields that the installed transformers does not have are marked (4.x)."""
    lines = ["| Field of `TrainingArguments` | Treatment |", "| --- | --- |"]
    rows = {name: f"affects {note}" for name, note in EFFECTS.items()}
    rows |= {name: f"harmless: {note}" for name, note in HARMLESS.items()}
    rows |= {name: f"only {refusal.expected} is accepted: {refusal.reason}" for name, refusal in REFUSALS.items()}
    lines += [f"| `{name}`{'' if name in _TRAINING else ' (4.x)'} | {rows[name]} |" for name in sorted(rows)]
    lines += ["", "| Parameter of `Trainer` | Treatment |", "| --- | --- |"]
    parameters = {name: f"accepted: {note}" for name, note in TRAINER_EFFECTS.items()}
    parameters |= {name: f"refused: {note}" for name, note in TRAINER_REFUSALS.items()}
    lines += [f"| `{name}` | {note} |" for name, note in parameters.items()]
    return "\n".join(lines) + "\n"
