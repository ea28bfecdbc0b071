"""``efface unlearn``: make a checkpoint forget a data set."""

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from rich.console import Console
from transformers import PrinterCallback, set_seed

from efface.cli.flags import UnlearnCommand, parse
from efface.cli.output import written_whole
from efface.cli.progress import ProgressBar
from efface.cli.run_folder import RunFolder
from efface.hf.adapters import add_lora, check_mergeable, merged
from efface.hf.arguments import UnlearnArguments
from efface.hf.checkpoints import newest_checkpoint
from efface.hf.fingerprint import fingerprint
from efface.hf.hub import HubError, check_login, default_client
from efface.hf.loading import load_model, load_tokenizer
from efface.hf.recipe import argument_values, command_line
from efface.hf.trainer import UnlearnTrainer
from efface.objectives import Objective


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM end the run as Ctrl-C does, so that what is half written is cleared away."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # only there does Python allow handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _adapted(model: Any, command: UnlearnCommand, seed: int) -> Any:
    """Return the model, with the LoRA adapter that the flags ask for."""
    if command.lora_r is None:
        given = {"alpha": command.lora_alpha, "dropout": command.lora_dropout, "target": command.lora_target}
        unused = [f"--lora_{name}" for name, value in given.items() if value]
        unused += ["--merge_adapter"] if command.merge_adapter else []
        if unused:
            raise ValueError(f"{', '.join(unused)}: expected --lora_r, the rank of the adapter, got none")
        return model
    set_seed(seed)  # the adapter's first weights are drawn
    model = add_lora(
        model,
        r=command.lora_r,
        alpha=command.lora_alpha,
        dropout=command.lora_dropout,
        target=command.lora_target or (),
    )
    if command.merge_adapter:
        check_mergeable(model)
    return model


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
    model = load_model(command.model, revision=command.revision, dtype=command.dtype)
    models: dict[str, str | None] = {"weights": fingerprint(model).hex(), "reference_weights": None}
    reference_model = _reference_model(command)
    if reference_model is not None:
        models["reference_weights"] = fingerprint(reference_model).hex()
    trainer = UnlearnTrainer(
        _adapted(model, command, args.seed),
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
    trainer.remove_callback(PrinterCallback)
    trainer.base_model, trainer.revision = command.model, command.revision
    return trainer, models


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    command, args = parse(argv)
    first = args.process_index == 0  # of the processes of a distributed run, the one that speaks and writes
    console = Console(stderr=True, quiet=not first)
    out = Path(args.output_dir or "trainer_output")
    try:
        with _terminated_as_interrupted():
            return _run(command, args, out, console, command_line(argv))
    except KeyboardInterrupt:
        newest = newest_checkpoint(out)
        state = "there is no checkpoint yet, so it starts anew" if newest is None else f"{newest.name} is whole"
        console.print(f"stopped; run the same command again to continue: {state}", highlight=False, soft_wrap=True)
        raise


def _run(command: UnlearnCommand, args: UnlearnArguments, out: Path, console: Console, line: str) -> int:
    objective, folder = command.make_objective(), None
    bar = ProgressBar(console, f"{objective.name} · {Path(command.model).name}")
    with ExitStack() as stack:
        stack.callback(bar.close)
        if args.process_index == 0:
            folder = RunFolder(out, overwrite=command.overwrite or args.resume_from_checkpoint is not None)
            if args.push_to_hub:
                check_login(default_client(args.hub_token))
            stack.enter_context(folder.locked())
        trainer, models = make_trainer(command, args, objective, bar)
        trainer.command = line
        checkpoint = [args.resume_from_checkpoint]
        if folder is not None:
            identity = _identity(trainer, command, models)
            if checkpoint[0] is None:
                start = folder.begin(identity)
                checkpoint = [None if start is None else str(start)]
            else:
                folder.continue_from(identity)
        checkpoint = broadcast_object_list(checkpoint)
        if checkpoint[0] is not None:
            console.print(f"continuing from {checkpoint[0]}", highlight=False, soft_wrap=True)
        trainer.train(resume_from_checkpoint=checkpoint[0])
        bar.close()
        if command.merge_adapter:
            trainer.model = merged(trainer.model)
        with written_whole(out, writes=args.should_save) as partial:
            trainer.save_model(str(partial), _internal_call=True)
        trainer.save_state()
        console.print(f"wrote {out}")
        _push(trainer, args, out)
        if folder is not None:
            folder.finish()
        if args.world_size > 1:
            # A process that leaves without a word may tear connections that others still read from.
            trainer.accelerator.wait_for_everyone()
            trainer.accelerator.end_training()
    return 0


def _identity(trainer: UnlearnTrainer, command: UnlearnCommand, models: dict[str, str | None]) -> dict[str, Any]:
    """Return all that the result of the run depends on; an unfinished run of the same identity is continued."""
    recipe = trainer.recipe()
    return {
        "model": models,
        "adapter": {name: value for name, value in vars(command).items() if name.startswith("lora_")},
        "objective": recipe.objective,
        "reference": recipe.reference,
        "data": {role: facts.fingerprint for role, facts in recipe.data.items()},
        "plan": recipe.plan,
        "arguments": argument_values(trainer.args),  # type: ignore[arg-type]
    }


def _push(trainer: UnlearnTrainer, args: UnlearnArguments, out: Path) -> None:
    """Push the final model where that was asked for.

    Raises:
        HubError: it, or checkpoints before it, could not be pushed.
    """
    if not args.revision_per_checkpoint:
        if args.push_to_hub:
            trainer.push_to_hub()
        return
    if trainer.not_pushed:
        listed = "; ".join(f"checkpoint-{step}: {error}" for step, error in sorted(trainer.not_pushed.items()))
        raise HubError(
            f"not pushed: {listed}. They and the final model are whole in {str(out)!r}; run the same command again to "
            "push them"
        )
    if trainer.pusher is not None:
        trainer.pusher.push_final(out)
