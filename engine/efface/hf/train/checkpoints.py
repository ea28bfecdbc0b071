"""Checkpoints: whole or not there at all, and complete enough that a killed run continues bit for bit."""

import math
import re
import shutil
import zipfile
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.trainer_utils import TrainOutput

from efface.errors import reading
from efface.files import PARTIAL, in_words, move_whole, remove_leftovers, remove_whole
from efface.hf.model.loading import is_whole

STATE = "trainer_state.json"
BEST = "best"  # the folder of KeepBest
REPLACED = "_replaced-run"  # checkpoints of a run until that which replaces it is whole; transformers pushes no "_*"
_REMEDY = "resume from an older checkpoint, or begin anew (--overwrite)"
_NAME = re.compile(r"checkpoint-(\d+)")


class CheckpointError(OSError):
    """A checkpoint could not be written or read; the message says which one is whole."""


def checkpoints(folder: str | Path) -> dict[int, Path]:
    """Return the checkpoints of a run by step, oldest first."""
    path = Path(folder)
    found = ((_NAME.fullmatch(item.name), item) for item in path.iterdir()) if path.is_dir() else ()
    return dict(sorted((int(match[1]), item) for match, item in found if match and item.is_dir()))


def newest_checkpoint(folder: str | Path) -> Path | None:
    """Return the newest checkpoint that a run can continue from: one with optimizer and generators, or None."""
    whole = [path for path in checkpoints(folder).values() if (path / STATE).is_file() and any(path.glob("rng_state*"))]
    return whole[-1] if whole else None


def rotate(folder: Path, limit: int | None, keep: AbstractSet[Path]) -> None:
    """Remove the oldest checkpoints but ``limit``; neither the newest nor those in ``keep``. None or 0 keeps all."""
    paths = list(checkpoints(folder).values())
    kept = {paths[-1], *keep} if paths else set()
    excess = len(paths) - limit if limit else 0
    for path in [path for path in paths if path not in kept][: max(excess, 0)]:
        remove_whole(path)


def _check_complete(checkpoint: Path) -> None:
    """Raise CheckpointError for a checkpoint that lacks what the rest of the run depends on, or holds a part of it.

    transformers would go on with a new optimizer or schedule, without a word. torch's files are zip archives, whose
    last bytes say whether they are whole.
    """
    for name in (STATE, "optimizer.pt", "scheduler.pt"):
        if not (checkpoint / name).is_file():
            raise CheckpointError(
                f"{str(checkpoint)!r}: expected {name}, without which the run would go on as another one, got none; "
                f"{_REMEDY}"
            )
    check_whole(checkpoint)


def check_whole(checkpoint: Path) -> None:
    """Raise an error for a folder that is no checkpoint, or one with a damaged file, as far as their ends tell.

    Raises:
        CheckpointError: a damaged file.
        FileNotFoundError: no such folder, or no checkpoint.
        ValueError: a damaged ``trainer_state.json``.
    """
    _state_of(checkpoint)
    for file in sorted(checkpoint.glob("*.pt")) + sorted(checkpoint.glob("rng_state*.pth")):
        if not zipfile.is_zipfile(file):
            raise CheckpointError(f"{str(checkpoint)!r}: {file.name} is damaged; {_REMEDY}")
    for file in sorted(checkpoint.glob("*.safetensors")):
        if not is_whole(file):
            raise CheckpointError(f"{str(checkpoint)!r}: {file.name} is damaged; {_REMEDY}")


def _state_of(checkpoint: Path) -> TrainerState:
    if not (checkpoint / STATE).is_file():
        got = "none" if checkpoint.is_dir() else "a file" if checkpoint.exists() else "no such folder"
        raise FileNotFoundError(f"checkpoint {str(checkpoint)!r}: expected {STATE} in it, got {got}; check the path")
    with _readable(checkpoint / STATE):
        state: TrainerState = TrainerState.load_from_json(str(checkpoint / STATE))
    return state


def _readable(place: str | Path) -> AbstractContextManager[None]:
    return reading(f"checkpoint {str(place)!r}", "what a run of this model wrote", _REMEDY)


class ResumableTrainer(Trainer):
    """A trainer whose checkpoints are whole, and hold what an exact continuation needs beyond transformers' own.

    A callback with ``state_dict()`` and ``load_state_dict(state)`` is saved and restored with them.
    """

    _staging: Path | None = None  # while a checkpoint is written: the folder that stands for the output folder
    _running_loss: Tensor | None = None  # of the steps since the last log; transformers' own tensor
    _carried: dict[str, Any] | None = None  # from the checkpoint, until the first step after it has ended

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, **options: Any) -> TrainOutput:  # type: ignore[override]
        """Train; with ``resume_from_checkpoint`` (a folder, or True for the newest) continue exactly as if never ended.

        Raises:
            CheckpointError: the checkpoint cannot be read, or a new one not be written.
            ValueError: True, and there is no checkpoint.
        """
        if self.args.should_save:
            remove_leftovers(str(self.args.output_dir))
        self.accelerator.wait_for_everyone()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_checkpoint(str(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ValueError(f"no checkpoint to resume from in {self.args.output_dir!r}; expected checkpoint-N")
        path = None if not resume_from_checkpoint else Path(resume_from_checkpoint)
        if path is not None and self._has_ended(path):
            if not _NAME.fullmatch(path.name):  # a finished model's folder, which may be another run's
                _check_complete(path)
            return self._take_up(path)  # the weights are all that it needs
        if path is not None and path.is_dir() and not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            _check_complete(path)
        return super().train(resume_from_checkpoint=None if path is None else str(path), **options)

    def _has_ended(self, checkpoint: Path) -> bool:
        # In an epoch's middle transformers would run one step more before it looks at max_steps.
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if sharded or not (checkpoint / STATE).is_file():
            return False
        last = self.args.max_steps
        if last <= 0:
            last = math.ceil(self.args.num_train_epochs * len(self.get_train_dataloader()))
        step: int = _state_of(checkpoint).global_step
        return step >= last

    def _take_up(self, checkpoint: Path) -> TrainOutput:
        """Be what the run was at the end, with nothing left to train."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = _state_of(checkpoint)
        self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
        self._load_rng_state(str(checkpoint))
        self._carried = None
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        return TrainOutput(self.state.global_step, 0.0, {})

    # Writing

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        # All ranks write into one folder, so its name is no secret; remove_leftovers has seen to a killed run's.
        staging = folder / f"{PARTIAL}{name}"
        stateful: Any = self.state.stateful_callbacks
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExportableState):  # the checkpoint that was resumed from need not know it
                stateful.setdefault(type(callback).__name__, callback.state())
        try:
            staging.mkdir(parents=True, exist_ok=True)
            self._staging = staging
            super()._save_checkpoint(model, trial)
            self._staging = None
            self._correct_best(folder, staging / name)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                move_whole(staging / name, folder / name)
            self.accelerator.wait_for_everyone()
            if self.args.should_save or self.args.local_process_index == 0:
                if (staging / name).is_dir():  # a machine that does not share its disk with the first
                    move_whole(staging / name, folder / name)
                shutil.rmtree(staging, ignore_errors=True)
        except KeyboardInterrupt:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        except Exception as error:
            shutil.rmtree(staging, ignore_errors=True)
            whole = newest_checkpoint(folder)
            left = "no checkpoint was written before" if whole is None else f"{whole.name} is whole and untouched"
            raise CheckpointError(
                f"{name} could not be written to {str(folder)!r}: {_in_a_line(error)}. The run stops; {left}. If the "
                "disk is full, free space or choose another, and resume"
            ) from error
        finally:
            self._staging = None
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(folder / name))
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            keep = {*self.checkpoints_in_use(), *([] if best is None else [folder / Path(best).name])}
            rotate(folder, self.args.save_total_limit, keep)

    def checkpoints_in_use(self) -> AbstractSet[Path]:
        """Return checkpoints that must not be removed yet."""
        return set()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Wait: transformers uploads in the background, from a folder that is about to be renamed."""

    def _correct_best(self, folder: Path, written: Path) -> None:
        # transformers has looked for the best checkpoint in the staging folder.
        if self.state.best_global_step:
            best = folder / f"checkpoint-{self.state.best_global_step}"
            if best.is_dir() or best.name == written.name:
                self.state.best_model_checkpoint = str(best)  # on all ranks: each of them loads it
                if self.args.should_save:
                    self.state.save_to_json(str(written / STATE))

    # What transformers forgets: the losses since the last log, and the state of callbacks

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if self._carried is not None:
            tr_loss += self._carried["running_loss"].to(tr_loss.device)
            self._globalstep_last_logged = self._carried["last_logged"]
            self._carried = None
        self._running_loss = tr_loss
        super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)

    def _stateful_callbacks(self) -> Iterator[tuple[str, Any]]:
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "state_dict") and hasattr(callback, "load_state_dict"):
                yield type(callback).__name__, callback

    def _progress_file(self, folder: str) -> Path:
        rank = f"_{self.args.process_index}" if self.args.world_size > 1 else ""
        return Path(folder) / f"progress{rank}.pt"

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        progress = {
            "running_loss": torch.zeros(()) if self._running_loss is None else self._running_loss.cpu(),
            "last_logged": self._globalstep_last_logged,
            "callbacks": {name: callback.state_dict() for name, callback in self._stateful_callbacks()},
        }
        torch.save(progress, self._progress_file(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with _readable(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _readable(str(checkpoint)):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _readable(str(checkpoint)):
            super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        stateful: Any = self.state.stateful_callbacks or {}
        for name, callback in ((type(item).__name__, item) for item in self.callback_handler.callbacks):
            saved = stateful.get(name)
            if isinstance(callback, ExportableState) and isinstance(saved, dict):
                vars(callback).update(saved["attributes"])
        path = self._progress_file(checkpoint)
        if not path.is_file():  # written by transformers alone, or on another number of processes
            return
        with _readable(path):
            progress = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(progress, dict) or not {"running_loss", "last_logged", "callbacks"} <= progress.keys():
            raise CheckpointError(f"{str(path)!r}: expected where the run was, got something else; {_REMEDY}")
        for name, callback in self._stateful_callbacks():
            if name in progress["callbacks"]:
                callback.load_state_dict(progress["callbacks"][name])
        self._carried = progress


def unsaved(folder: Path, error: Exception) -> CheckpointError:
    """Return the error of a model that could not be written when its training had ended; says what is left."""
    whole = newest_checkpoint(folder)
    left = (
        "no checkpoint was written before, so it begins anew: write one next time (--save-schedule epoch)"
        if whole is None
        else f"{whole.name} is whole, and it goes on from there"
    )
    return CheckpointError(
        f"the model could not be written to {str(folder)!r}: {_in_a_line(error)}. If the disk is full, free space, and "
        f"run the same command again; {left}"
    )


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def set_aside(folder: Path) -> str:
    """Move the checkpoints and the best model of another run out of the way.

    Where those of a run before it are there already, it never was whole, and its own are removed: runs that fail one
    after another must not fill the disk. Returns what was removed, in words.
    """
    best, aside = folder / BEST, folder / REPLACED
    paths = [*checkpoints(folder).values(), *([best] if best.is_dir() else [])]
    removed = in_words(paths) if paths and aside.is_dir() else ""
    if paths and not removed:
        aside.mkdir()
    for path in paths:
        remove_whole(path) if removed else path.rename(aside / path.name)
    return removed


__all__ = ["CheckpointError", "ResumableTrainer", "checkpoints", "newest_checkpoint"]
