"""What the commands that train share: a run that can be stopped, goes on, and leaves a whole model or none."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from rich.console import Console

from efface.cli.console import open_console
from efface.cli.output import written_whole
from efface.cli.progress import ProgressBar
from efface.cli.run_folder import RunFolder
from efface.hf.arguments import UnlearnArguments
from efface.hf.checkpoints import newest_checkpoint
from efface.hf.hub import HubError, check_login, default_client
from efface.hf.recipe import argument_values
from efface.hf.trainer import PackedTrainer

# Weights of an earlier model in the folder, in whatever files: loading would take them for this one's.
_WEIGHTS = ("model*.safetensors*", "pytorch_model*.bin*", "adapter_model.*", "adapter_config.json")


@dataclass(frozen=True)
class Run:
    """A run of a command.

    Attributes:
        args: of the trainer.
        title: of its progress bar.
        command: its command line, for the model card.
        overwrite: whether the output folder may hold other things.
        make: returns the trainer, ready to train, and what the result depends on beside the trainer's own recipe.
        before_saving: changes the trained model, which is then written.
        after_saving: is called with the trainer and the console when the model is whole in the output folder.
    """

    args: UnlearnArguments
    title: str
    command: str
    overwrite: bool
    make: Callable[[ProgressBar], tuple[PackedTrainer, dict[str, Any]]]
    before_saving: Callable[[PackedTrainer], None] | None = None
    after_saving: Callable[[PackedTrainer, Console], None] | None = None

    @property
    def out(self) -> Path:
        """The output folder."""
        return Path(self.args.output_dir or "trainer_output")


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
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


def carry_out(run: Run) -> int:
    """Train, save and push; continue an unfinished run of the same command. Returns the exit code."""
    # Of the processes of a distributed run, the first is the one that speaks and writes.
    console = open_console(stderr=True, quiet=run.args.process_index != 0)
    try:
        with terminated_as_interrupted():
            _carry_out(run, console)
    except KeyboardInterrupt:
        newest = newest_checkpoint(run.out)
        state = "there is no checkpoint yet, so it starts anew" if newest is None else f"{newest.name} is whole"
        console.print(f"stopped; run the same command again to continue: {state}", highlight=False, soft_wrap=True)
        raise
    return 0


def _carry_out(run: Run, console: Console) -> None:
    args, folder = run.args, None
    if not args.learning_rate > 0:
        raise ValueError(
            f"--learning_rate: expected more than 0, got {args.learning_rate}: the model would be written as it was"
        )
    bar = ProgressBar(console, run.title)
    with ExitStack() as stack:
        stack.callback(bar.close)
        if args.process_index == 0:
            folder = RunFolder(run.out, overwrite=run.overwrite or args.resume_from_checkpoint is not None)
            if args.push_to_hub:
                check_login(default_client(args.hub_token))
            stack.enter_context(folder.locked())
        trainer, beside = run.make(bar)
        trainer.command = run.command
        checkpoint = [args.resume_from_checkpoint]
        if folder is not None:
            identity = _identity(trainer, beside)
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
        if run.before_saving is not None:
            run.before_saving(trainer)
        with written_whole(run.out, writes=args.should_save, replaced=_WEIGHTS) as partial:
            trainer.save_model(str(partial), _internal_call=True)
        trainer.save_state()
        console.print(f"wrote {run.out}", highlight=False, soft_wrap=True)
        _push(trainer, args, run.out)
        if run.after_saving is not None:
            run.after_saving(trainer, console)
        if folder is not None:
            folder.finish()


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
    if trainer.pusher is not None:
        trainer.pusher.push_final(out)
