"""``efface unlearn``: make a checkpoint forget a data set."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PrinterCallback, set_seed

from efface.cli.flags import UnlearnCommand, parse, recipe_of, unlearn_parser, with_config
from efface.cli.progress import ProgressBar
from efface.cli.run import Run, carry_out
from efface.hf.adapted_head import base_of
from efface.hf.adapters import add_lora, check_mergeable, merged
from efface.hf.arguments import UnlearnArguments
from efface.hf.fingerprint import fingerprint
from efface.hf.loading import MAIN, load_model, load_tokenizer
from efface.hf.recipe import command_line
from efface.hf.second_adapter import is_second
from efface.hf.templates import get_template
from efface.hf.trainer import PackedTrainer, UnlearnTrainer
from efface.objectives import Objective
from efface.recipes import Recipe
from efface.recipes.evaluation import check_evaluation, check_files, check_sets, evaluate_recipe
from efface.recipes.flags import taken

parser = unlearn_parser


def _adapted(model: Any, command: UnlearnCommand, seed: int) -> Any:
    """Return the model, with the LoRA adapter that the flags ask for."""
    if command.lora_r is None:
        given = {"alpha": command.lora_alpha, "dropout": command.lora_dropout, "target": command.lora_target}
        unused = [f"--lora_{name}" for name, value in given.items() if value]
        unused += ["--merge_adapter"] if command.merge_adapter and base_of(model) is model else []
        if unused:
            raise ValueError(f"{', '.join(unused)}: expected --lora_r, the rank of the adapter, got none")
        if command.merge_adapter:
            check_mergeable(model)
        return model
    set_seed(seed)  # the adapter's first weights are drawn
    model = add_lora(
        model,
        r=command.lora_r,
        alpha=command.lora_alpha,
        dropout=command.lora_dropout,
        target=command.lora_target or (),
        # A folder's revision is a folder in it, whose path is the base's name already.
        revision=None if command.revision == MAIN or Path(command.model).expanduser().is_dir() else command.revision,
    )
    if command.merge_adapter:
        check_mergeable(model)
    return model


def _adapter_in_words(adapted: Any, command: UnlearnCommand) -> str | None:
    """Return which adapter of the model is trained on what, and what is saved."""
    if base_of(adapted) is adapted:
        return None
    saved = "saved merged into its base" if command.merge_adapter else "saved as an adapter of its base"
    if command.lora_r is None:
        return f"that of {command.model!r}, trained further; {saved}"
    if not is_second(adapted):
        return f"LoRA of rank {command.lora_r}; {saved}"
    if not command.merge_adapter:
        saved = "saved as one adapter, of the ranks' sum, on the base of the first"
    return f"a second LoRA of rank {command.lora_r} on that of {command.model!r}, which is frozen; {saved}"


def _reference_model(command: UnlearnCommand) -> Any:
    """Load the reference model, where it is not the policy before training."""
    if command.reference_model is None and not command.reference_8bit:
        return None
    name, revision = command.model, command.revision
    if command.reference_model is not None:
        name, revision = command.reference_model, command.reference_revision
    return load_model(name, revision=revision, dtype=command.dtype, load_in_8bit=command.reference_8bit)


def make_trainer(
    command: UnlearnCommand, args: UnlearnArguments, objective: Objective, bar: ProgressBar
) -> tuple[UnlearnTrainer, dict[str, str | None]]:
    """Load what the command names; the trainer computes what its reference lacks, and is ready to train.

    Returns:
        The trainer, and the fingerprints of the models that it began with.
    """
    args.disable_tqdm = True
    model = load_model(command.model, revision=command.revision, dtype=command.dtype, trainable=True)
    models: dict[str, str | None] = {"weights": fingerprint(model).hex(), "reference_weights": None}
    reference_model = _reference_model(command)
    if reference_model is not None:
        models["reference_weights"] = fingerprint(reference_model).hex()
    adapted = _adapted(model, command, args.seed)
    trainer = UnlearnTrainer(
        adapted,
        args,
        forget=command.forget,
        retain=command.retain,
        forget_filter=command.forget_filter,
        retain_filter=command.retain_filter,
        objective=objective,
        reference=command.reference,
        reference_model=reference_model,
        reference_device=command.reference_device,
        processing_class=load_tokenizer(command.model, revision=command.revision),
        callbacks=[bar],
    )
    trainer.check_start()  # before anything is written
    trainer.remove_callback(PrinterCallback)
    trainer.base_model, trainer.revision = command.model, command.revision
    trainer.adapter = _adapter_in_words(adapted, command)
    return trainer, models


def _check_use(command: UnlearnCommand) -> None:
    """Raise ValueError for a flag that nothing would look at."""
    if command.json and not command.dry_run:
        raise ValueError("--json: is how --dry_run prints; add that, or drop it")
    if command.retain_filter and command.retain is None:
        raise ValueError("--retain_filter: expected --retain, the rows that it takes some of, got none")
    if command.retain_log is not None and (command.recipe is None or not command.evaluate):
        raise ValueError("--retain_log: is for the evaluation of a --recipe, and there is none; see `efface evaluate`")


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    scale, words = taken(with_config(argv), "scale", "tiny or smoke")
    if scale is not None:
        from efface.cli.tiny.command import run_at

        return run_at(scale, words)
    command, args = parse(argv)
    objective, recipe = command.make_objective(), recipe_of(command)
    _check_use(command)
    if not args.allow_overlap:
        check_sets(command)
    if recipe is not None and command.evaluate:
        check_evaluation(command, recipe)
    if command.dry_run:
        from efface.cli.dry_run import show

        return show(command, args, objective, recipe)
    if recipe is not None and command.evaluate:
        check_files(command, recipe)

    def make(bar: ProgressBar) -> tuple[PackedTrainer, dict[str, Any]]:
        trainer, models = make_trainer(command, args, objective, bar)
        adapter: dict[str, Any] = {name: value for name, value in vars(command).items() if name.startswith("lora_")}
        if base_of(trainer.model) is not trainer.model:
            adapter["is"] = trainer.adapter
        return trainer, {"model": models, "adapter": adapter}

    def before_saving(trainer: PackedTrainer) -> None:
        if command.merge_adapter:
            trainer.model = merged(trainer.model)

    def after_saving(trainer: PackedTrainer, console: Console) -> None:
        if recipe is not None and command.evaluate:
            _evaluate(command, recipe, trainer, console)

    return carry_out(
        Run(
            args,
            title=f"{objective.name} · {Path(command.model).name}",
            command=command_line(argv),
            overwrite=command.overwrite,
            make=make,
            before_saving=before_saving,
            after_saving=after_saving,
        )
    )


def _evaluate(command: UnlearnCommand, recipe: Recipe, trainer: PackedTrainer, console: Console) -> None:
    """Judge the trained model as the recipe says, and show what was published beside."""
    args: Any = trainer.args
    tokenizer: Any = trainer.processing_class
    # A run with compat is judged by that system's labels too, unless the recipe names another's protocol.
    compat = args.compat if recipe.evaluate.get("protocol", args.compat) == args.compat else None
    template = get_template(
        args.template, tokenizer, system_prompt=args.system_prompt, date_string=args.date_string, compat=compat
    )
    try:
        figures = evaluate_recipe(
            trainer.model,
            tokenizer,
            recipe,
            Path(args.output_dir) / "evaluation",
            data=command.data,
            retain_log=command.retain_log,
            template=template,
            compat=compat,
        )
    except (ValueError, OSError):
        left = f"the model is whole in {args.output_dir}, but not evaluated; run the same command again to do that"
        console.print(left, highlight=False, soft_wrap=True)
        raise
    for name in ("model_utility", "forget_quality"):
        if name in figures:
            published = f", published {recipe.published[name]:g}" if name in recipe.published else ""
            console.print(f"{name} {figures[name]:.4g}{published}", highlight=False, soft_wrap=True)
