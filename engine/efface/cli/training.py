"""What the commands that train share: a run that can be stopped, goes on, and leaves a whole model or none."""

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.utils import broadcast_object_list
from rich.console import Console
from transformers import PrinterCallback, set_seed

from efface.cli.progress import ProgressBar, open_console
from efface.cli.run_folder import RunFolder
from efface.files import bytes_in_words, locked_folder, written_whole
from efface.flags import hyphens
from efface.hf.model.adapted_head import base_of
from efface.hf.model.fingerprint import fingerprint
from efface.hf.model.loading import MAIN, load_model, load_tokenizer
from efface.hf.model.lora import add_lora, check_mergeable, is_second, merged
from efface.hf.reference.cached import NO_FILE
from efface.hf.text.rows import check_source
from efface.hf.text.templates import get_template
from efface.hf.train.arguments import UnlearnArguments
from efface.hf.train.checkpoints import check_whole, checkpoints, newest_checkpoint, unsaved
from efface.hf.train.estimate import disk_need
from efface.hf.train.publish import HubError, check_login, default_client
from efface.hf.train.record import argument_values, command_line
from efface.hf.train.trainer import PackedTrainer, UnlearnTrainer
from efface.objectives import Objective
from efface.recipes import Recipe
from efface.recipes.command import UnlearnCommand
from efface.recipes.evaluation import check_evaluation, check_files, check_sets, evaluate_recipe
from efface.recipes.settings import recipe_of
from efface.reference import LogprobStore

_READ = ("forget", "retain", "data", "recipe")  # flags of what is read beside models
# Weights of an earlier model in the folder, in whatever files: loading would take them for this one's.
_WEIGHTS = ("model*.safetensors*", "pytorch_model*.bin*", "adapter_model.*", "adapter_config.json")


@dataclass(frozen=True)
class TrainingRun:
    """A run of a command.

    Attributes:
        args: of the trainer.
        title: of its progress bar.
        command: its command line, for the model card.
        overwrite: whether the output folder may hold other things.
        inputs: what it reads, by flags: the output folder must not hold it.
        merged: whether the model is written with its adapter in it.
        make: returns the trainer, ready to train, and what the result depends on beside the trainer's own recipe.
        before_saving: changes the trained model, which is then written.
        after_saving: is called with the trainer and the bar when the model is whole in the output folder.
    """

    args: UnlearnArguments
    title: str
    command: str
    overwrite: bool
    inputs: Mapping[str, str | Path | None]
    merged: bool
    make: Callable[[ProgressBar], tuple[PackedTrainer, dict[str, Any]]]
    before_saving: Callable[[PackedTrainer], None] | None = None
    after_saving: Callable[[PackedTrainer, ProgressBar], None] | None = None

    @property
    def out(self) -> Path:
        """The output folder."""
        return Path(self.args.output_dir or "trainer_output")


def carry_out(run: TrainingRun) -> int:
    """Train, save and push; continue an unfinished run of the same command. Returns the exit code."""
    # Of the processes of a distributed run, the first is the one that speaks and writes.
    console = open_console(stderr=True, quiet=run.args.process_index != 0)
    try:
        _carry_out(run, console)
    except KeyboardInterrupt:
        newest = newest_checkpoint(run.out)
        state = "there is no checkpoint yet, so it starts anew" if newest is None else f"{newest.name} is whole"
        console.print(f"stopped; run the same command again to continue: {state}")
        raise
    return 0


def _carry_out(run: TrainingRun, console: Console) -> None:
    args, folder = run.args, None
    if not args.learning_rate > 0:
        raise ValueError(
            f"--learning-rate: expected more than 0, got {args.learning_rate}: the model would be written as it was"
        )
    bar = ProgressBar(console, run.title)
    with ExitStack() as stack:
        stack.callback(bar.close)
        if args.process_index == 0:
            overwrite = run.overwrite or args.resume_from_checkpoint is not None
            folder = RunFolder(run.out, overwrite=overwrite, inputs={**run.inputs, **_own_checkpoint(run)})
            if args.push_to_hub:
                _check_pushed(run)
                check_login(default_client(args.hub_token))
            stack.enter_context(folder.locked())
        if args.resume_from_checkpoint is not None:
            check_whole(Path(args.resume_from_checkpoint))
        trainer, beside = run.make(bar)
        trainer.command = run.command
        checkpoint = [args.resume_from_checkpoint]
        if folder is not None:
            checkpoint = [_begin(run, trainer, folder, _identity(trainer, beside), console)]
        checkpoint = broadcast_object_list(checkpoint)
        if checkpoint[0] is not None:
            console.print(f"continuing from {checkpoint[0]}")
        try:
            trainer.train(resume_from_checkpoint=checkpoint[0])
        except (ValueError, TypeError, FloatingPointError):  # the same command would end so again
            if folder is not None and checkpoint[0] is None:
                folder.abandon()
            raise
        bar.stage("writing the model")
        _save(run, trainer)
        if folder is not None:
            folder.settle()
        trainer.save_state()
        bar.close()
        console.print(f"wrote {run.out}")
        _push(trainer, args, run.out)
        if run.after_saving is not None:
            run.after_saving(trainer, bar)
        if folder is not None:
            folder.finish()


def _begin(
    run: TrainingRun, trainer: PackedTrainer, folder: RunFolder, identity: dict[str, Any], console: Console
) -> str | None:
    """Make the folder this run's; return the checkpoint to continue from.

    Raises:
        FileExistsError: the folder is another run's.
        OSError: there is too little space.
    """
    given = run.args.resume_from_checkpoint
    own = given is not None or folder.continues(identity)
    _check_space(run, trainer, len(checkpoints(run.out)) if own else 0)
    if given is not None:
        folder.continue_from(identity)
        return given
    start = folder.begin(identity)
    if folder.removed:
        console.print(f"removed: {folder.removed}")
    if start is None and (said := folder.replaced_in_words(*_WEIGHTS)):
        console.print(f"removed when the new model is whole: {said}")
    return None if start is None else str(start)


def _save(run: TrainingRun, trainer: PackedTrainer) -> None:
    """Write the model, whole or not at all.

    Raises:
        CheckpointError: it cannot be written; says what is left.
    """
    if run.before_saving is not None:
        run.before_saving(trainer)
    try:
        with written_whole(run.out, writes=trainer.args.should_save, replaced=_WEIGHTS) as partial:
            trainer.save_model(str(partial), _internal_call=True)
    except Exception as error:
        raise unsaved(run.out, error) from error


def _check_pushed(run: TrainingRun) -> None:
    """Raise ValueError where transformers would push what models said of the data, and the true answers, too."""
    if not run.args.revision_per_checkpoint and any((run.out / "evaluation").glob("*")):
        raise ValueError(
            f"--push-to-hub: {str(run.out / 'evaluation')!r} holds results with questions and answers of the data, "
            "which would be pushed; move it out of the folder, or add --revision-per-checkpoint, which pushes the "
            "model alone"
        )


def _own_checkpoint(run: TrainingRun) -> dict[str, str | Path | None]:
    """Return the checkpoint to go on from as an input where it is the output folder itself; one in there is fine."""
    given = run.args.resume_from_checkpoint
    same = given is not None and Path(given).expanduser().resolve() == run.out.resolve()
    return {"--resume-from-checkpoint": given} if same else {}


def _check_space(run: TrainingRun, trainer: PackedTrainer, there: int) -> None:
    """Raise OSError where the disk has no space for what the run writes, beside the checkpoints that are there."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:  # whose shards differ, and may lie on many disks
        return
    epoch = len(trainer.get_train_dataloader())
    args: Any = trainer.args
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * epoch)
    need = disk_need(trainer.model, args, steps, epoch, merged=run.merged)
    place = next(folder for folder in (run.out.absolute(), *run.out.absolute().parents) if folder.exists())
    total, _, free = shutil.disk_usage(place)
    if total and free < need.total(there):  # without a total, the file system does not know
        what = f"{need.checkpoints} checkpoints of {bytes_in_words(need.checkpoint)} each and a model of "
        raise OSError(
            f"--output {str(run.out)!r}: expected {bytes_in_words(need.total(there))} of free space, for {what}"
            f"{bytes_in_words(need.model)}, got {bytes_in_words(free)}; free some, choose another disk, or write less: "
            "--save-total-limit 1, --save-schedule no, or --save-only-model True (which no run can go on from)"
        )


def _identity(trainer: PackedTrainer, beside: dict[str, Any]) -> dict[str, Any]:
    """Return all that the result of the run depends on; an unfinished run of the same identity is continued."""
    recipe = trainer.recipe()
    return {
        **beside,
        "objective": recipe.objective,
        "reference": recipe.reference,
        "data": {role: facts.fingerprint for role, facts in recipe.data.items()},
        "plan": recipe.plan,
        "arguments": argument_values(trainer.args),  # type: ignore[arg-type]
    }


def _push(trainer: PackedTrainer, args: UnlearnArguments, out: Path) -> None:
    """Push the final model where that was asked for.

    Raises:
        HubError: it, or checkpoints before it, could not be pushed.
    """
    if not args.revision_per_checkpoint:
        if args.push_to_hub:
            trainer.push_to_hub(saved=True)
        return
    if trainer.not_pushed:
        listed = "; ".join(f"checkpoint-{step}: {error}" for step, error in sorted(trainer.not_pushed.items()))
        raise HubError(
            f"not pushed: {listed}. They and the final model are whole in {str(out)!r}; run the same command again to "
            "push them"
        )
    trainer.publisher.push_final(out)


def _adapted(model: Any, command: UnlearnCommand, seed: int) -> Any:
    """Return the model, with the LoRA adapter that the flags ask for."""
    if command.lora_r is None:
        given = {"alpha": command.lora_alpha, "dropout": command.lora_dropout, "target": command.lora_target}
        unused = [f"--lora-{name}" for name, value in given.items() if value]
        unused += ["--merge-adapter"] if command.merge_adapter and base_of(model) is model else []
        if unused:
            raise ValueError(f"{', '.join(unused)}: expected --lora-r, the rank of the adapter, got none")
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
    return load_model(
        name,
        revision=revision,
        dtype=command.dtype,
        load_in_8bit=command.reference_8bit,
        trust_remote_code=command.trust_remote_code,
    )


class ModelFlags(Protocol):
    """The flags of a model that is trained."""

    model: str
    revision: str
    tokenizer: str | None
    trust_remote_code: bool


def tokenizer_of(command: ModelFlags) -> Any:
    """Load the tokenizer that the flags name, or else the model's own."""
    own = command.tokenizer is None
    return load_tokenizer(
        command.tokenizer or command.model,
        revision=command.revision if own else MAIN,
        trust_remote_code=command.trust_remote_code,
    )


def make_trainer(
    command: UnlearnCommand, args: UnlearnArguments, objective: Objective, bar: ProgressBar
) -> tuple[UnlearnTrainer, dict[str, str | None]]:
    """Load what the command names; the trainer computes what its reference lacks, and is ready to train.

    Returns:
        The trainer, and the fingerprints of the models that it began with.
    """
    args.disable_tqdm = True
    bar.stage("loading the model")
    tokenizer = tokenizer_of(command)  # at once, where a model takes minutes
    model = load_model(
        command.model,
        revision=command.revision,
        dtype=command.dtype,
        trainable=True,
        trust_remote_code=command.trust_remote_code,
    )
    models: dict[str, str | None] = {"weights": fingerprint(model).hex(), "reference_weights": None}
    reference_model = _reference_model(command)
    if reference_model is not None:
        models["reference_weights"] = fingerprint(reference_model).hex()
    adapted = _adapted(model, command, args.seed)
    bar.stage("reading the data")
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
        processing_class=tokenizer,
        callbacks=[bar],
    )
    trainer.check_start()  # before anything is written
    trainer.remove_callback(PrinterCallback)
    trainer.base_model, trainer.revision = command.model, command.revision
    trainer.adapter = _adapter_in_words(adapted, command)
    return trainer, models


def model_inputs(flag: str, name: str | None, revision: str = MAIN) -> dict[str, str | Path | None]:
    """Return what is read of a model, by flags: of an adapter in a folder, its base too."""
    inputs: dict[str, str | Path | None] = {flag: name}
    if name is None or not (folder := Path(name).expanduser()).is_dir():
        return inputs
    at = folder if revision == MAIN else folder / revision
    if revision != MAIN:
        inputs[f"{flag}, revision {revision}"] = at
    try:
        base = json.loads((at / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):  # no adapter, or one that loading refuses
        return inputs
    return {**inputs, f"{flag}, its base model": base}


def config_of(argv: Sequence[str]) -> str | None:
    """Return the file of flags that a command line names."""
    following = [*argv[1:], ""]
    named = (
        word.partition("=")[2] or after
        for word, after in zip(argv, following, strict=True)
        if word.partition("=")[0] == "--config"
    )
    return next(named, None)


def check_inputs(command: UnlearnCommand, args: UnlearnArguments) -> None:
    """Raise what reading the run's local files would, before a model is loaded or the Hub is asked."""
    for source in (command.forget, command.retain):
        check_source(source)
    if command.reference_device is not None:
        try:
            torch.empty(1, device=command.reference_device).item()
        except (RuntimeError, AssertionError) as error:  # as torch says that there is no such device here, or meta
            raise ValueError(
                "--reference-device: expected a device of this machine, such as cuda:1 or cpu, got "
                f"{command.reference_device!r}"
            ) from error
    if args.reference_cache not in (None, NO_FILE) and Path(args.reference_cache).expanduser().is_file():
        LogprobStore(args.reference_cache).close()


def _check_use(command: UnlearnCommand) -> None:
    """Raise ValueError for a flag that nothing would look at, or that means nothing."""
    if command.reference_device is not None:
        try:
            torch.device(command.reference_device)
        except RuntimeError as error:
            device = command.reference_device
            raise ValueError(f"--reference-device: expected a device such as cuda:1 or cpu, got {device!r}") from error
    if command.json and not command.dry_run:
        raise ValueError("--json: is how --dry-run prints; add that, or drop it")
    if command.retain_filter and command.retain is None:
        raise ValueError("--retain-filter: expected --retain, the rows that it takes some of, got none")
    if command.retain_log is not None and (command.recipe is None or not command.evaluate):
        raise ValueError("--retain-log: is for the evaluation of a --recipe, and there is none; see `efface evaluate`")


def _evaluate(command: UnlearnCommand, recipe: Recipe, trainer: PackedTrainer, bar: ProgressBar) -> None:
    """Judge the trained model as the recipe says, and show what was published beside."""
    args: Any = trainer.args
    tokenizer: Any = trainer.processing_class
    # A run with compat is judged by that system's labels too, unless the recipe names another's protocol.
    compat = args.compat if recipe.evaluate.get("protocol", args.compat) == args.compat else None
    template = get_template(
        args.template, tokenizer, system_prompt=args.system_prompt, date_string=args.date_string, compat=compat
    )
    output = Path(args.output_dir) / "evaluation"
    locks = args.process_index == 0 and recipe.evaluate["benchmark"] != "none"
    try:
        with locked_folder(output) if locks else nullcontext():
            figures = evaluate_recipe(
                trainer.model,
                tokenizer,
                recipe,
                output,
                data=command.data,
                retain_log=command.retain_log,
                template=template,
                compat=compat,
                progress=bar.follow,
            )
    except (ValueError, OSError):
        left = f"the model is whole in {args.output_dir}, but not evaluated; run the same command again to do that"
        bar.say(left)
        raise
    bar.close()
    for name in ("model_utility", "forget_quality"):
        if name in figures:
            published = f", published {recipe.published[name]:g}" if name in recipe.published else ""
            bar.say(f"{name} {figures[name]:.4g}{published}")


def unlearn(command: UnlearnCommand, args: UnlearnArguments, argv: Sequence[str]) -> int:
    """Do what ``efface unlearn`` was asked for, and return its exit code.

    Args:
        command: what the flags say.
        args: likewise.
        argv: the words of the command line, for the model card.
    """
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
    check_inputs(command, args)

    def make(bar: ProgressBar) -> tuple[PackedTrainer, dict[str, Any]]:
        trainer, models = make_trainer(command, args, objective, bar)
        adapter: dict[str, Any] = {name: value for name, value in vars(command).items() if name.startswith("lora_")}
        if base_of(trainer.model) is not trainer.model:
            adapter["is"] = trainer.adapter
        return trainer, {"model": models, "adapter": adapter}

    def before_saving(trainer: PackedTrainer) -> None:
        if command.merge_adapter:
            trainer.model = merged(trainer.model)

    def after_saving(trainer: PackedTrainer, bar: ProgressBar) -> None:
        if recipe is not None and command.evaluate:
            _evaluate(command, recipe, trainer, bar)

    return carry_out(
        TrainingRun(
            args,
            title=f"{objective.name} · {Path(command.model).name}",
            command=command_line(argv),
            overwrite=command.overwrite,
            inputs={
                **model_inputs("--model", command.model, command.revision),
                **model_inputs("--reference-model", command.reference_model, command.reference_revision),
                **{f"--{hyphens(name)}": getattr(command, name) for name in _READ},
                "--refusal-file": args.refusal_file,
                "--config": config_of(argv),
            },
            merged=command.merge_adapter,
            make=make,
            before_saving=before_saving,
            after_saving=after_saving,
        )
    )
