"""``efface unlearn --dry-run``: the settings, steps, tokens and memory of a run, without network access or weights."""

import copy
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from efface.batching import EpochPlanner, TokenStore
from efface.cli.plan import summary
from efface.cli.progress import show_json
from efface.hf.model.loading import MAIN, local_files, read_config, read_tokenizer
from efface.hf.reference.make import reference_kind
from efface.hf.text.rows import check_columns, load_rows, local_file, matching, parse_conditions
from efface.hf.text.templates import AUTO, TEMPLATES
from efface.hf.train.arguments import UnlearnArguments
from efface.hf.train.dataset import Accumulation
from efface.hf.train.estimate import RunShape, adapter_parameters, memory, model_sizes, training_flops
from efface.hf.train.open_unlearning import check_objective
from efface.hf.train.stepping import pairs_per_step, reads_last_tokens
from efface.hf.train.stores import accumulation_steps, unlearning_stores
from efface.objectives import Objective, check_term
from efface.recipes import Recipe
from efface.recipes.command import UnlearnCommand
from efface_kernels import device_memory

Lines = dict[str, Any]

_NOTES = {
    "memory": ": computed from the configuration, not measured; one process without sharding",
    "arithmetic": ": 6 x parameters without embeddings x tokens; 8 x with gradient checkpointing",
}


def show(command: UnlearnCommand, args: UnlearnArguments, objective: Objective, recipe: Recipe | None) -> int:
    """Print the resolved configuration and the steps, tokens and memory of the run. Returns exit code 0."""
    report = describe(command, args, objective, recipe)
    if command.json:
        show_json(report)
        return 0
    for title, lines in report.items():
        print(f"{title}{_NOTES.get(title, '')}")
        width = max(map(len, lines), default=0)
        write = _bytes if title == "memory" else _written
        for name, value in lines.items():
            print(f"  {name:<{width}}  {write(name, value)}".rstrip())
    return 0


def describe(
    command: UnlearnCommand, args: UnlearnArguments, objective: Objective, recipe: Recipe | None
) -> dict[str, Lines]:
    """Return the report that ``show`` prints: section -> name -> value.

    Raises:
        FileNotFoundError: a local file does not exist.
        ValueError: a column is missing, no row meets a filter, or settings contradict one another.
    """
    if args.template not in (AUTO, *TEMPLATES):
        raise ValueError(f"`template`: expected one of {', '.join([AUTO, *TEMPLATES])}, got {args.template!r}")
    if args.compat is not None:
        check_objective(objective)
    check_term(objective)
    reference = _reference(command, args, objective)
    data = _data(command, args, objective, recipe)
    report = {"configuration": _configuration(command, args, objective, recipe, reference)}
    if recipe is not None:
        report["provenance"] = _provenance(recipe)
    report["run"] = _run(args, data, objective)
    tokens = report["run"].get("tokens")
    known = tokens if isinstance(tokens, int) else None
    return report | _needs(command, args, objective, recipe, reference, known)


@dataclass(frozen=True)
class _Data:
    """Row counts of the sets, and their tokens if the data and the tokenizer are on this machine."""

    rows: Mapping[str, int]
    unfiltered: Mapping[str, int]  # rows of a file before its filter; only sets with a filter
    stores: tuple[TokenStore, TokenStore, TokenStore | None] | None
    missing: str  # reason why ``stores`` is None; empty otherwise


def _data(command: UnlearnCommand, args: UnlearnArguments, objective: Objective, recipe: Recipe | None) -> _Data:
    sources = {"forget": (command.forget, command.forget_filter)}
    if command.retain is not None and objective.reads_retain():
        sources["retain"] = (command.retain, command.retain_filter)
    elif objective.reads_retain():
        raise ValueError(
            f"--retain: expected a retain set for objective {objective.name!r} with alpha={objective.alpha}, got none; "
            "give one, or set --alpha 0"
        )
    files = {role: local_file(source) for role, (source, _) in sources.items()}
    unfiltered: dict[str, int] = {}

    def counts() -> dict[str, int]:
        rows: dict[str, int] = {}
        for role, (source, conditions) in sources.items():
            if (file := files[role]) is not None:
                rows[role], total = _count(file, conditions, args, role)
                unfiltered.update({role: total} if conditions else {})
            elif (
                recipe is not None
                and source == recipe.unlearn.get(role)
                and conditions == recipe.unlearn.get(f"{role}_filter")
            ):
                rows |= {role: recipe.rows[role]} if role in recipe.rows else {}
        return rows

    named = command.tokenizer or command.model
    folder = local_files(named, MAIN if command.tokenizer else command.revision, "tokenizer_config.json")
    if folder is None:
        return _Data(counts(), unfiltered, None, f"the tokenizer of {named} is not on this machine")
    if remote := [source for role, (source, _) in sources.items() if files[role] is None]:
        return _Data(
            counts(),
            unfiltered,
            None,
            f"{' and '.join(dict.fromkeys(remote))} is on the Hub; give --data or local files",
        )
    retain = command.retain if "retain" in sources else None
    stores = unlearning_stores(
        objective,
        read_tokenizer(folder, trust_remote_code=command.trust_remote_code),
        args,
        forget=command.forget,
        retain=retain,
        forget_filter=command.forget_filter,
        retain_filter=command.retain_filter,
    )
    return _Data({"forget": len(stores[0]), "retain": len(stores[1])}, unfiltered, stores, "")


def _count(file: Path, conditions: list[str] | None, args: UnlearnArguments, role: str) -> tuple[int, int]:
    """Return the number of rows that meet the conditions, and the number of all rows."""
    rows, source = load_rows(file), f"{role} data {str(file)!r}"
    if not (args.template in TEMPLATES and TEMPLATES[args.template].documents):
        check_columns(rows, [args.question_column or "question", args.answer_column or "answer"], source)
    numbers = matching(rows, parse_conditions(conditions), source)
    return len(rows) if numbers is None else len(numbers), len(rows)


def _reference(command: UnlearnCommand, args: UnlearnArguments, objective: Objective) -> str | None:
    kind = reference_kind(command.reference, objective, None, padded=args.compat is not None)
    return "adapter" if kind == "live" and command.reference == "auto" and command.lora_r is not None else kind


def _configuration(
    command: UnlearnCommand,
    args: UnlearnArguments,
    objective: Objective,
    recipe: Recipe | None,
    reference: str | None,
) -> Lines:
    parameters = dataclasses.asdict(objective)
    unused = set() if objective.reads_retain() else {"retain", "retain filter"}
    lines: Lines = {
        "recipe": None if recipe is None else recipe.name,
        "model": command.model,
        "revision": command.revision,
        "forget": command.forget,
        "forget filter": _joined(command.forget_filter),
        "retain": command.retain,
        "retain filter": _joined(command.retain_filter),
        "template": args.template,
        "system prompt": args.system_prompt,
        "date": args.date_string,
        "method": type(objective).__name__,
        **parameters,
        "refusals": args.refusal_file,
        "reference": reference,
        "LoRA rank": command.lora_r,
        "lr": args.learning_rate,
        "schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "warm-up": _warm_up(args),
        "epochs": args.num_train_epochs if args.max_steps <= 0 else None,
        "max steps": args.max_steps if args.max_steps > 0 else None,
        "effective batch": pairs_per_step(args),
        "wd": args.weight_decay,
        "max grad norm": args.max_grad_norm,
        "optimizer": _optimizer(args),
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "as the weights",
        "weights": command.dtype,
        "seed": args.seed,
        "token budget": args.token_budget,
        "checkpoints": _checkpoints(args),
        "evaluation": _evaluation(command, recipe),
    }
    return {name: value for name, value in lines.items() if value is not None and name not in unused}


def _joined(conditions: list[str] | None) -> str | None:
    return None if conditions is None else " and ".join(conditions)


def _warm_up(args: UnlearnArguments) -> str:
    if args.warmup_epochs is not None:
        return f"{args.warmup_epochs:g} epoch{'' if args.warmup_epochs == 1 else 's'}"
    ratio = getattr(args, "warmup_ratio", None)
    return f"{ratio:g} of the steps" if ratio else f"{args.warmup_steps:g} steps"


def _optimizer(args: UnlearnArguments) -> str:
    """Return the name of the optimizer as model cards write it: paged AdamW 32 bit for ``paged_adamw_32bit``."""
    name = str(getattr(args.optim, "value", args.optim))
    return name.replace("_", " ").replace("adamw", "AdamW").replace("bit", " bit")


def _checkpoints(args: UnlearnArguments) -> str:
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    if strategy == "no":
        return "none"
    kept = "all kept" if args.save_total_limit is None else f"the last {args.save_total_limit:g} kept"
    kept = kept.replace("last 1 ", "last ")
    every = f"every {args.save_steps:g} steps" if strategy == "steps" else f"every {strategy}"
    pushed = ", each to its own branch" if args.revision_per_checkpoint else ""
    return f"{every}, {kept}{pushed}"


def _evaluation(command: UnlearnCommand, recipe: Recipe | None) -> str | None:
    if recipe is None:
        return None
    settings = recipe.evaluate
    if not command.evaluate or settings["benchmark"] == "none":
        return "none"
    against = command.retain_log or settings.get("retain_log") or settings.get("retain_model")
    quality = f"forget quality against {against}" if against else "no forget quality without --retain-log"
    protocol = settings.get("protocol", "open-unlearning")
    return f"{settings['benchmark'].upper()} {settings['split']}, protocol {protocol}, {quality}"


def _provenance(recipe: Recipe) -> Lines:
    ours = {f"ours {number}": text for number, text in enumerate(recipe.ours, 1)}
    return {"source": recipe.source, **{f"published {name}": value for name, value in recipe.published.items()}, **ours}


def _run(args: UnlearnArguments, data: _Data, objective: Objective) -> Lines:
    lines: Lines = {}
    for role, count in data.rows.items():
        lines[f"{role} rows"] = count
        if role in data.unfiltered:
            lines[f"{role} rows before the filter"] = data.unfiltered[role]
    if "forget" not in data.rows:
        return {**lines, "steps": "not known: the forget set is on the Hub, so its number of rows is unknown"}
    per_step = pairs_per_step(args)
    accumulation = Accumulation.of(
        data.rows["forget"],
        per_step // accumulation_steps(args),
        accumulation_steps(args),
        drop_last=args.dataloader_drop_last,
    )
    epoch_steps = accumulation.steps
    total = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * epoch_steps)
    args = copy.copy(args)
    args.epoch_pairs = (data.rows["forget"], per_step)
    lines |= {
        "steps of an epoch": epoch_steps,
        "steps": total,
        "warm-up steps": args.get_warmup_steps(total),
    }
    if data.stores is None:
        return {**lines, "tokens": f"not known: {data.missing}"}
    if args.compat is not None:
        return {**lines, "tokens": f"not known: --compat {args.compat} uses padded batches"}
    planner = EpochPlanner(
        [store for store in data.stores if store is not None],
        share=args.share_prefixes,
        last_tokens=reads_last_tokens(objective),
        pairs_per_step=per_step,
        token_budget=args.token_budget,
        world_size=args.world_size,
        seed=args.seed if args.data_seed is None else args.data_seed,
        retain_sampling=args.retain_sampling,  # type: ignore[arg-type]
        drop_last=args.dataloader_drop_last,
    )
    figures = summary(planner, 0)
    return {
        **lines,
        "tokens of an epoch": figures["tokens"],
        "tokens": round(figures["tokens"] / epoch_steps * total),
        "forward passes of a step": figures["micro_batches_per_step"],
        "padding saved": figures["padding_saved"],
        "prefixes saved": figures["prefixes_saved"],
    }


def _needs(
    command: UnlearnCommand,
    args: UnlearnArguments,
    objective: Objective,
    recipe: Recipe | None,
    reference: str | None,
    tokens: int | None,
) -> dict[str, Lines]:
    """Return the sections with the memory and the FLOPs of a run, computed and not measured."""
    if _is_adapter(command):
        return {
            "memory": {"not known": f"{command.model} is an adapter; run the estimate for its base model with --lora-r"}
        }
    architecture = _architecture(command, recipe)
    if architecture is None:
        return {"memory": {"not known": f"the configuration of {command.model} is not on this machine"}}
    dtype = _dtype(command, architecture)
    half = bool(args.bf16 or args.fp16)
    try:
        sizes = model_sizes(architecture, dtype, autocast=half and dtype.itemsize > 2)
    except (RuntimeError, TypeError, AttributeError) as error:  # an unusual architecture
        return {"memory": {"not known": f"the parameters of {command.model} cannot be counted: {error}"}}
    trained = None
    if command.lora_r is not None:
        trained = adapter_parameters(architecture, command.lora_r, command.lora_target or ())
    checkpointing = any(getattr(args, name, None) for name in ("gradient_checkpointing", "activation_checkpointing"))
    lines: Lines = {"parameters": sizes.parameters}
    if trained is not None:
        lines["trained"] = trained
    if args.compat is not None:
        return {"memory": {**lines, "not known": f"--compat {args.compat} pads batches and stores all logits"}}
    items = memory(
        sizes,
        RunShape(
            dtype=dtype,
            autocast=half,
            trained=trained,
            optim=str(getattr(args.optim, "value", args.optim)),
            reference=reference,
            reference_8bit=command.reference_8bit,
            distributions=objective.needs_reference_model()
            and reference is not None
            and objective.reads != "activations",
            token_budget=args.token_budget,
            chunk_rows=args.chunk_rows,
            gpu_bytes=device_memory(torch.device("cuda")) if torch.cuda.is_available() else None,
            checkpointing=checkpointing,
        ),
    )
    report = {"memory": {**lines, **items, "total": sum(size for size in items.values() if size is not None)}}
    if tokens is not None:
        report["arithmetic"] = {"FLOPs of training": training_flops(sizes, tokens, checkpointing=checkpointing)}
    return report


def _is_adapter(command: UnlearnCommand) -> bool:
    folder = local_files(command.model, command.revision, "adapter_config.json")
    return folder is not None and (folder / "adapter_config.json").is_file()


def _architecture(command: UnlearnCommand, recipe: Recipe | None) -> Any:
    folder = local_files(command.model, command.revision, "config.json")
    if folder is not None:
        return read_config(folder, trust_remote_code=command.trust_remote_code)
    if recipe is not None and command.model == recipe.unlearn["model"] and recipe.architecture:
        return recipe.architecture
    return None


def _dtype(command: UnlearnCommand, architecture: Any) -> torch.dtype:
    if command.dtype != "auto":
        dtype = getattr(torch, command.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"--dtype: expected auto, float32, bfloat16 or float16, got {command.dtype!r}")
        return dtype
    saved = None if isinstance(architecture, Mapping) else getattr(architecture, "dtype", None)
    return saved if isinstance(saved, torch.dtype) else torch.float32


def _written(name: str, value: Any) -> str:
    """Format a value of a section for the terminal."""
    if isinstance(value, bool) or value is None:
        return "not known" if value is None else str(value)
    if isinstance(value, float):
        mantissa, _, exponent = f"{value:e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}" if 0 < abs(value) < 1e-3 else f"{value:g}"
    return f"{value:,}" if isinstance(value, int) and name != "seed" else str(value)


def _bytes(name: str, value: Any) -> str:
    if isinstance(value, int) and name not in ("parameters", "trained"):
        return f"{value / 2**30:.2f} GiB"
    return _written(name, value)
