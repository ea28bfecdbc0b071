"""Training runs of ``efface unlearn`` and ``efface finetune``: resumable, with an atomic write of the model."""

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

_INPUT_FLAGS = ("forget", "retain", "data", "recipe")  # flags of inputs other than models
# Weight files of an earlier model in the output folder. They are removed, because loading could read them instead.
_WEIGHTS = ("model*.safetensors*", "pytorch_model*.bin*", "adapter_model.*", "adapter_config.json")


@dataclass(frozen=True)
class TrainingRun:
    """A training run of a command.

    Attributes:
        args: arguments of the trainer.
        title: title of the progress bar.
        command: the command line, for the model card.
        overwrite: allow an output folder that contains other files.
        inputs: flag -> path that the run reads. No input can be in the output folder.
        merged: whether the adapter is merged into the saved model.
        make: returns the trainer, ready to train, and the part of the run's identity that the trainer's recipe lacks.
        before_saving: callback that can change the trained model before it is saved.
        after_saving: callback that receives the trainer and the bar after the model is completely written.
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
    """Train, save and push a model, or continue an unfinished run of the same command. Return exit code 0.

    Raises:
        FileExistsError: the output folder belongs to another run.
        KeyboardInterrupt: the run was interrupted; a message says how to continue.
        OSError: the disk has too little space, or the model cannot be written or pushed.
        ValueError: invalid arguments.
    """
    # In a distributed run only the first process prints and writes files.
    console = open_console(stderr=True, quiet=run.args.process_index != 0)
    try:
        _carry_out(run, console)
    except KeyboardInterrupt:
        newest = newest_checkpoint(run.out)
        state = "no checkpoint yet, so it will start again" if newest is None else f"it will resume from {newest.name}"
        console.print(f"stopped; run the same command again to continue: {state}")
        raise
    return 0


def _carry_out(run: TrainingRun, console: Console) -> None:
    args, folder = run.args, None
    if not args.learning_rate > 0:
        raise ValueError(
            f"--learning-rate: expected more than 0, got {args.learning_rate}; training would not change the model"
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
        trainer, extra = run.make(bar)
        trainer.command = run.command
        checkpoint = [args.resume_from_checkpoint]
        if folder is not None:
            checkpoint = [_begin(run, trainer, folder, _identity(trainer, extra), console)]
        checkpoint = broadcast_object_list(checkpoint)
        if checkpoint[0] is not None:
            console.print(f"continuing from {checkpoint[0]}")
        try:
            trainer.train(resume_from_checkpoint=checkpoint[0])
        except (ValueError, TypeError, FloatingPointError):  # the same command would fail again
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
    """Take over the output folder. Return the checkpoint to resume from, or None.

    Raises:
        FileExistsError: the folder belongs to another run.
        OSError: the disk has too little space.
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
        console.print(f"will be removed when the new model is saved: {said}")
    return None if start is None else str(start)


def _save(run: TrainingRun, trainer: PackedTrainer) -> None:
    """Write the model. If writing fails, the output folder keeps its previous files.

    Raises:
        CheckpointError: the model cannot be written. The message says which checkpoints exist.
    """
    if run.before_saving is not None:
        run.before_saving(trainer)
    try:
        with written_whole(run.out, writes=trainer.args.should_save, replaced=_WEIGHTS) as partial:
            trainer.save_model(str(partial), _internal_call=True)
    except Exception as error:
        raise unsaved(run.out, error) from error


def _check_pushed(run: TrainingRun) -> None:
    """Raise ValueError if transformers would also push evaluation results, which quote the data and its answers."""
    if not run.args.revision_per_checkpoint and any((run.out / "evaluation").glob("*")):
        raise ValueError(
            f"--push-to-hub: {str(run.out / 'evaluation')!r} contains results with questions and answers of the data, "
            "which would be pushed; move it out of the folder, or add --revision-per-checkpoint, which pushes only "
            "the model"
        )


def _own_checkpoint(run: TrainingRun) -> dict[str, str | Path | None]:
    """Return ``--resume-from-checkpoint`` as an input only if it is the output folder itself.

    A checkpoint inside the output folder is allowed.
    """
    given = run.args.resume_from_checkpoint
    same = given is not None and Path(given).expanduser().resolve() == run.out.resolve()
    return {"--resume-from-checkpoint": given} if same else {}


def _check_space(run: TrainingRun, trainer: PackedTrainer, existing: int) -> None:
    """Raise OSError if the disk has no space for the files of the run. ``existing`` is its number of checkpoints."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:  # shards have other sizes, and can be on several disks
        return
    epoch = len(trainer.get_train_dataloader())
    args: Any = trainer.args
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * epoch)
    need = disk_need(trainer.model, args, steps, epoch, merged=run.merged)
    place = next(folder for folder in (run.out.absolute(), *run.out.absolute().parents) if folder.exists())
    total, _, free = shutil.disk_usage(place)
    if total and free < need.total(existing):  # some file systems report a total of 0
        what = f"{need.checkpoints} checkpoints of {bytes_in_words(need.checkpoint)} each and a model of "
        raise OSError(
            f"--output {str(run.out)!r}: expected {bytes_in_words(need.total(existing))} of free space, for {what}"
            f"{bytes_in_words(need.model)}, got {bytes_in_words(free)}; free some, choose another disk, or write less: "
            "--save-total-limit 1, --save-schedule no, or --save-only-model True (a run cannot resume from these)"
        )


def _identity(trainer: PackedTrainer, extra: dict[str, Any]) -> dict[str, Any]:
    """Return everything that the result depends on. An unfinished run of the same identity is continued."""
    recipe = trainer.recipe()
    return {
        **extra,
        "objective": recipe.objective,
        "reference": recipe.reference,
        "data": {role: facts.fingerprint for role, facts in recipe.data.items()},
        "plan": recipe.plan,
        "arguments": argument_values(trainer.args),  # type: ignore[arg-type]
    }


def _push(trainer: PackedTrainer, args: UnlearnArguments, out: Path) -> None:
    """Push the final model to the Hub, if the flags request it.

    Raises:
        HubError: the model or an earlier checkpoint could not be pushed.
    """
    if not args.revision_per_checkpoint:
        if args.push_to_hub:
            trainer.push_to_hub(saved=True)
        return
    if trainer.not_pushed:
        listed = "; ".join(f"checkpoint-{step}: {error}" for step, error in sorted(trainer.not_pushed.items()))
        raise HubError(
            f"not pushed: {listed}; these checkpoints and the final model are saved in {str(out)!r}; run the same "
            "command again to push them"
        )
    trainer.publisher.push_final(out)


def _adapted(model: Any, command: UnlearnCommand, seed: int) -> Any:
    """Return the model with the LoRA adapter of the flags.

    Raises:
        ValueError: flags of an adapter without ``--lora-r``, or a model that ``--merge-adapter`` cannot merge.
    """
    if command.lora_r is None:
        given = {"alpha": command.lora_alpha, "dropout": command.lora_dropout, "target": command.lora_target}
        unused = [f"--lora-{name}" for name, value in given.items() if value]
        unused += ["--merge-adapter"] if command.merge_adapter and base_of(model) is model else []
        if unused:
            raise ValueError(f"{', '.join(unused)}: expected --lora-r with the rank of the adapter, got none")
        if command.merge_adapter:
            check_mergeable(model)
        return model
    set_seed(seed)  # the initial weights of the adapter are random
    model = add_lora(
        model,
        r=command.lora_r,
        alpha=command.lora_alpha,
        dropout=command.lora_dropout,
        target=command.lora_target or (),
        # For a local model, the name of the base already contains the folder of the revision.
        revision=None if command.revision == MAIN or Path(command.model).expanduser().is_dir() else command.revision,
    )
    if command.merge_adapter:
        check_mergeable(model)
    return model


def _adapter_in_words(adapted: Any, command: UnlearnCommand) -> str | None:
    """Describe the trained adapter, its base, and how it is saved; None for a model without an adapter."""
    if base_of(adapted) is adapted:
        return None
    saved = "saved merged into its base" if command.merge_adapter else "saved as an adapter of its base"
    if command.lora_r is None:
        return f"that of {command.model!r}, trained further; {saved}"
    if not is_second(adapted):
        return f"LoRA of rank {command.lora_r}; {saved}"
    if not command.merge_adapter:
        saved = "saved as one adapter with the sum of the ranks, for the base of the first"
    return f"a second LoRA of rank {command.lora_r} on that of {command.model!r}, which is frozen; {saved}"


def _reference_model(command: UnlearnCommand) -> Any:
    """Load the reference model, or return None if the reference is the policy before training."""
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
    """The flags that name a model and its tokenizer."""

    model: str
    revision: str
    tokenizer: str | None
    trust_remote_code: bool


def tokenizer_of(command: ModelFlags) -> Any:
    """Load the tokenizer of ``--tokenizer``, or else that of the model."""
    own = command.tokenizer is None
    return load_tokenizer(
        command.tokenizer or command.model,
        revision=command.revision if own else MAIN,
        trust_remote_code=command.trust_remote_code,
    )


def make_trainer(
    command: UnlearnCommand, args: UnlearnArguments, objective: Objective, bar: ProgressBar
) -> tuple[UnlearnTrainer, dict[str, str | None]]:
    """Load the models and the data of a command and construct its trainer.

    The trainer computes the entries that a cached reference lacks.

    Returns:
        The trainer, and the fingerprints of its initial weights and of a separate reference model (or None).

    Raises:
        ValueError: the models, the data and the flags do not fit together.
    """
    args.disable_tqdm = True
    bar.stage("loading the model")
    tokenizer = tokenizer_of(command)  # loads at once, so a wrong name raises before a model that takes minutes
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
    trainer.check_start()  # raises before anything is written
    trainer.remove_callback(PrinterCallback)
    trainer.base_model, trainer.revision = command.model, command.revision
    trainer.adapter = _adapter_in_words(adapted, command)
    return trainer, models


def model_inputs(flag: str, name: str | None, revision: str = MAIN) -> dict[str, str | Path | None]:
    """Return flag -> path of the files of a model: its folder, that of its revision, and the base of an adapter."""
    inputs: dict[str, str | Path | None] = {flag: name}
    if name is None or not (folder := Path(name).expanduser()).is_dir():
        return inputs
    at = folder if revision == MAIN else folder / revision
    if revision != MAIN:
        inputs[f"{flag}, revision {revision}"] = at
    try:
        base = json.loads((at / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):  # not an adapter, or an invalid one that raises when it is loaded
        return inputs
    return {**inputs, f"{flag}, its base model": base}


def config_of(argv: Sequence[str]) -> str | None:
    """Return the value of ``--config`` on a command line, or None."""
    following = [*argv[1:], ""]
    named = (
        word.partition("=")[2] or after
        for word, after in zip(argv, following, strict=True)
        if word.partition("=")[0] == "--config"
    )
    return next(named, None)


def check_inputs(command: UnlearnCommand, args: UnlearnArguments) -> None:
    """Check the local files and the reference device of a run, before a model is loaded or the Hub is accessed.

    Raises:
        OSError: a file does not exist or cannot be read.
        ValueError: a file is damaged, or the device of ``--reference-device`` does not exist.
    """
    for source in (command.forget, command.retain):
        check_source(source)
    if command.reference_device is not None:
        try:
            torch.empty(1, device=command.reference_device).item()
        except (RuntimeError, AssertionError) as error:  # the device does not exist here, or is "meta"
            raise ValueError(
                "--reference-device: expected a device of this machine, such as cuda:1 or cpu, got "
                f"{command.reference_device!r}"
            ) from error
    if args.reference_cache not in (None, NO_FILE) and Path(args.reference_cache).expanduser().is_file():
        LogprobStore(args.reference_cache).close()


def _check_use(command: UnlearnCommand) -> None:
    """Raise ValueError for an invalid device, or for a flag that would have no effect."""
    if command.reference_device is not None:
        try:
            torch.device(command.reference_device)
        except RuntimeError as error:
            device = command.reference_device
            raise ValueError(f"--reference-device: expected a device such as cuda:1 or cpu, got {device!r}") from error
    if command.json and not command.dry_run:
        raise ValueError("--json: expected --dry-run with it, got none; add --dry-run, or drop --json")
    if command.retain_filter and command.retain is None:
        raise ValueError(
            "--retain-filter: expected --retain with the rows to filter, got none; give --retain, or drop the filter"
        )
    if command.retain_log is not None and (command.recipe is None or not command.evaluate):
        raise ValueError(
            "--retain-log: expected a --recipe with an evaluation, got none; use `efface evaluate --retain-log`"
        )


def _evaluate(command: UnlearnCommand, recipe: Recipe, trainer: PackedTrainer, bar: ProgressBar) -> None:
    """Evaluate the trained model with the recipe's benchmark, and print the figures next to the published ones."""
    args: Any = trainer.args
    tokenizer: Any = trainer.processing_class
    # A run with --compat is also evaluated with the labels of that system, unless the recipe names another protocol.
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
        left = f"the model is saved in {args.output_dir}, but not evaluated; run the same command again to evaluate it"
        bar.say(left)
        raise
    bar.close()
    for name in ("model_utility", "forget_quality"):
        if name in figures:
            published = f", published {recipe.published[name]:g}" if name in recipe.published else ""
            bar.say(f"{name} {figures[name]:.4g}{published}")


def unlearn(command: UnlearnCommand, args: UnlearnArguments, argv: Sequence[str]) -> int:
    """Run ``efface unlearn`` and return its exit code.

    Args:
        command: the flags of the command.
        args: the flags of the trainer.
        argv: the words of the command line, for the model card.

    Raises:
        ValueError: flags that contradict one another; and as ``carry_out``.
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
                **{f"--{hyphens(name)}": getattr(command, name) for name in _INPUT_FLAGS},
                "--refusal-file": args.refusal_file,
                "--config": config_of(argv),
            },
            merged=command.merge_adapter,
            make=make,
            before_saving=before_saving,
            after_saving=after_saving,
        )
    )
