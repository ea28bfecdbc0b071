"""``RunRecord``: everything that the result of a run depends on, as JSON values that can be compared and saved."""

import dataclasses
import importlib.metadata
import json
import platform
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from efface.hf.text.data import DataFacts
from efface.hf.train.arguments import UnlearnArguments
from efface.objectives import Objective

# Arguments of logging, saving and distribution, which do not change the result.
_UNRECORDED = (
    *("output_dir", "overwrite_output_dir", "run_name", "disable_tqdm", "report_to", "project", "trackio_space_id"),
    *("resume_from_checkpoint", "do_train", "do_eval", "do_predict", "prediction_loss_only", "token_cache"),
    "allow_overlap",
    *("include_num_input_tokens_seen", "include_tokens_per_second", "skip_memory_metrics", "load_best_model_at_end"),
    *("restore_callback_states_from_checkpoint", "revision_per_checkpoint", "local_rank", "greater_is_better"),
    *("metric_for_best_model", "batch_eval_metrics", "enable_jit_checkpoint", "push_to_hub", "debug"),
)
_UNRECORDED_PREFIXES = (
    "log",
    "save_",
    "hub_",
    "push_",
    "eval_",
    "ddp_",
    "dataloader_",
    "per_device_",
    "per_gpu_",
    "jit_",
)
# Arguments that plan_values records.
_PLANNED = ("pairs_per_step", "token_budget", "retain_sampling", "seed", "data_seed", "gradient_accumulation_steps")
# Arguments that a card always lists, even with their default values.
_ALWAYS = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps"),
    *("optim", "weight_decay", "max_grad_norm", "bf16", "fp16", "template"),
)
_SECRETS = ("--hub_token", "--hub-token", "--push_to_hub_token", "--push-to-hub-token")


@dataclass(frozen=True)
class RunRecord:
    """Inputs of a training run. Equal records give equal models, with equal software.

    Attributes:
        base_model: name of the model before training.
        revision: revision of the base model.
        method: name of the objective, or "finetune".
        objective: name and parameters of the objective.
        reference: "cached", "live" or "adapter"; None if the objective has no reference.
        data: description of each data set, by role.
        plan: the values that determine which sequences an optimizer step contains.
        arguments: the arguments that are not at their defaults, and those that a card always lists.
        command: command line of the run; None if it was not started from the command line.
        processes: number of processes.
        versions: versions of efface, torch, transformers and Python.
        adapter: text that describes the trained adapter; None without an adapter.
    """

    base_model: str
    revision: str
    method: str
    objective: dict[str, Any]
    reference: str | None
    data: dict[str, DataFacts]
    plan: dict[str, Any]
    arguments: dict[str, Any]
    command: str | None
    processes: int
    versions: dict[str, str]
    adapter: str | None = None

    @classmethod
    def of(cls, trainer: Any) -> "RunRecord":
        """Return the record of the current state of a ``PackedTrainer``."""
        return cls(
            base_model=trainer.base_model,
            revision=trainer.revision,
            method="finetune" if trainer.objective is None else trainer.objective.name,
            objective=objective_values(trainer.objective),
            reference=trainer.reference_kind,
            data=trainer.data,
            plan=plan_values(trainer.args, trainer.pairs_per_step),
            arguments=changed_arguments(argument_values(trainer.args)),
            command=trainer.command,
            processes=trainer.args.world_size,
            versions=versions(),
            adapter=trainer.adapter,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self), default=str))
        return values


def objective_values(objective: Objective | None) -> dict[str, Any]:
    """Return the name and all parameters of an objective; None is fine-tuning."""
    if objective is None:
        return {"name": "finetune"}
    return {"name": objective.name, **dataclasses.asdict(objective)}


def plan_values(args: UnlearnArguments, pairs_per_step: int) -> dict[str, Any]:
    """Return the values that determine which sequences an optimizer step contains."""
    # With compat, means are over a micro-batch, so its size matters too.
    padded = {} if args.compat is None else {"micro_batch": args.per_device_train_batch_size}
    return {
        "seed": args.seed,
        "data_seed": args.seed if args.data_seed is None else args.data_seed,
        "pairs_per_step": pairs_per_step,
        "token_budget": args.token_budget,
        "retain_sampling": args.retain_sampling,
        "drop_last": args.dataloader_drop_last,
        **padded,
    }


def argument_values(args: UnlearnArguments) -> dict[str, Any]:
    """Return the arguments that the result depends on, except those in ``plan_values``, as JSON values."""
    values = {
        name: value
        for name, value in args.to_dict().items()  # type: ignore[no-untyped-call]
        if name not in (*_UNRECORDED, *_PLANNED) and not name.startswith(_UNRECORDED_PREFIXES)
    }
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return plain


def changed_arguments(values: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that are not at their defaults, and those that a card always lists."""
    # Read the defaults from the fields: a new UnlearnArguments would reset the state of accelerate during a run.
    defaults = {field.name: field.default for field in dataclasses.fields(UnlearnArguments)}
    return {name: value for name, value in values.items() if name in _ALWAYS or value != defaults.get(name)}


def command_line(argv: Sequence[str], name: str = "unlearn") -> str:
    """Return the command ``efface <name>`` with its arguments as one shell line; access tokens become ``***``."""
    return shlex.join(["efface", name, *_without_secrets(argv)])


def _without_secrets(argv: Iterable[str]) -> list[str]:
    words: list[str] = []
    secret = False
    for word in argv:
        flag, equals, _ = word.partition("=")
        words.append("***" if secret else f"{flag}=***" if equals and flag in _SECRETS else word)
        secret = word in _SECRETS
    return words


def versions() -> dict[str, str]:
    """Return the versions of efface, torch, transformers and Python."""
    return {
        "efface": importlib.metadata.version("efface"),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
