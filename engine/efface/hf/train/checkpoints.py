"""Checkpoints that are written atomically, and contain enough state for a killed run to resume bit for bit."""

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
BEST = "best"  # default folder of KeepBest
RESULTS = ("TOFU_*.json", "FAME_*.json", "METRICS_*.json", "EVAL_CONFIG.json", "eval_log_aggregated.json", "AUDIT.*")
REPLACED = "_replaced-run"  # checkpoints of an old run, kept until the new run is complete; transformers ignores "_*"
_REMEDY = "resume from an older checkpoint, or start over (--overwrite)"
_NAME = re.compile(r"checkpoint-(\d+)")


class CheckpointError(OSError):
    """A checkpoint could not be written or read; the message names the newest complete checkpoint or a remedy."""


def checkpoints(folder: str | Path) -> dict[int, Path]:
    """Return the checkpoints of a run by step, oldest first."""
    path = Path(folder)
    found = ((_NAME.fullmatch(item.name), item) for item in path.iterdir()) if path.is_dir() else ()
    return dict(sorted((int(match[1]), item) for match, item in found if match and item.is_dir()))


def newest_checkpoint(folder: str | Path) -> Path | None:
    """Return the newest checkpoint with trainer state and random-number state, from which a run can resume, or None."""
    whole = [path for path in checkpoints(folder).values() if (path / STATE).is_file() and any(path.glob("rng_state*"))]
    return whole[-1] if whole else None


def rotate(folder: Path, limit: int | None, keep: AbstractSet[Path]) -> None:
    """Remove the oldest checkpoints until ``limit`` remain; the newest and those in ``keep`` are never removed.

    A ``limit`` of None or 0 keeps all checkpoints.
    """
    paths = list(checkpoints(folder).values())
    kept = {paths[-1], *keep} if paths else set()
    excess = len(paths) - limit if limit else 0
    for path in [path for path in paths if path not in kept][: max(excess, 0)]:
        remove_whole(path)


def _check_complete(checkpoint: Path) -> None:
    """Raise CheckpointError if a checkpoint lacks a file that resuming needs, or a file is damaged.

    transformers would silently continue with a new optimizer or schedule. Files of torch are zip archives, which have
    their directory at the end, so that a cut-off file is detected.
    """
    for name in (STATE, "optimizer.pt", "scheduler.pt"):
        if not (checkpoint / name).is_file():
            raise CheckpointError(
                f"{str(checkpoint)!r}: expected {name}, which an exact continuation needs, got none; {_REMEDY}"
            )
    check_whole(checkpoint)


def check_whole(checkpoint: Path) -> None:
    """Raise an error if a folder is not a checkpoint, or contains a file that is cut off.

    Only the structure of the files is checked, not their content.

    Raises:
        CheckpointError: a weight or state file is cut off.
        FileNotFoundError: the folder does not exist, or is not a checkpoint.
        ValueError: ``trainer_state.json`` is damaged.
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
    return reading(f"checkpoint {str(place)!r}", "files written by a run of this model", _REMEDY)


class ResumableTrainer(Trainer):
    """``transformers.Trainer`` with atomic checkpoints that allow a bit-identical continuation.

    In addition to the state that transformers saves, checkpoints contain the loss since the last log entry, and the
    state of each callback with ``state_dict()`` and ``load_state_dict(state)``.
    """

    _staging: Path | None = None  # while a checkpoint is written: temporary folder used instead of the output folder
    _running_loss: Tensor | None = None  # loss of the steps since the last log; the tensor belongs to transformers
    _carried: dict[str, Any] | None = None  # progress from the checkpoint, until the first step after resuming

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, **options: Any) -> TrainOutput:  # type: ignore[override]
        """Train; with ``resume_from_checkpoint``, continue bit for bit as if the run had not been interrupted.

        Args:
            resume_from_checkpoint: a checkpoint folder, or True for the newest one in the output folder.
            options: passed to ``transformers.Trainer.train``.

        Raises:
            CheckpointError: the checkpoint cannot be read, or a new one cannot be written.
            ValueError: ``resume_from_checkpoint`` is True and there is no checkpoint.
        """
        if self.args.should_save:
            remove_leftovers(str(self.args.output_dir))
        self.accelerator.wait_for_everyone()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_checkpoint(str(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"`resume_from_checkpoint`: expected checkpoint-N in {self.args.output_dir!r}, got none; leave it "
                    "out to start from the beginning"
                )
        path = None if not resume_from_checkpoint else Path(resume_from_checkpoint)
        if path is not None and self._has_ended(path):
            if not _NAME.fullmatch(path.name):  # the folder of a finished model, possibly of another run
                _check_complete(path)
            return self._load_ended(path)  # needs only the weights
        if path is not None and path.is_dir() and not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            _check_complete(path)
        return super().train(resume_from_checkpoint=None if path is None else str(path), **options)

    def _has_ended(self, checkpoint: Path) -> bool:
        # Within an epoch, transformers would run one more step before it checks max_steps.
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if sharded or not (checkpoint / STATE).is_file():
            return False
        last = self.args.max_steps
        if last <= 0:
            last = math.ceil(self.args.num_train_epochs * len(self.get_train_dataloader()))
        step: int = _state_of(checkpoint).global_step
        return step >= last

    def _load_ended(self, checkpoint: Path) -> TrainOutput:
        """Restore the state at the end of a finished run, without training."""
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
        # All ranks write into one folder, so its name is fixed. remove_leftovers has removed that of a killed run.
        staging = folder / f"{PARTIAL}{name}"
        stateful: Any = self.state.stateful_callbacks
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExportableState):  # new since the checkpoint that was resumed from
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
                if (staging / name).is_dir():  # a machine without a disk shared with the first one
                    move_whole(staging / name, folder / name)
                shutil.rmtree(staging, ignore_errors=True)
        except KeyboardInterrupt:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        except Exception as error:
            shutil.rmtree(staging, ignore_errors=True)
            whole = newest_checkpoint(folder)
            left = "no earlier checkpoint exists" if whole is None else f"{whole.name} is complete and unchanged"
            raise CheckpointError(
                f"{name} could not be written to {str(folder)!r}: {_in_a_line(error)}. The run stops; {left}. If the "
                "disk is full, free space or use another disk, and resume"
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
        """Return the checkpoints that must not be removed yet; subclasses override this."""
        return set()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Do nothing: transformers would upload in the background, from a folder that is renamed later.

        ``_save_checkpoint`` starts the upload after the rename.
        """

    def _correct_best(self, folder: Path, written: Path) -> None:
        # transformers recorded the path of the best checkpoint within the staging folder.
        if self.state.best_global_step:
            best = folder / f"checkpoint-{self.state.best_global_step}"
            if best.is_dir() or best.name == written.name:
                self.state.best_model_checkpoint = str(best)  # on all ranks, because each loads it
                if self.args.should_save:
                    self.state.save_to_json(str(written / STATE))

    # State that transformers does not save: the losses since the last log, and the state of callbacks

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
        if not path.is_file():  # saved by plain transformers, or with another number of processes
            return
        with _readable(path):
            progress = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(progress, dict) or not {"running_loss", "last_logged", "callbacks"} <= progress.keys():
            raise CheckpointError(f"{str(path)!r}: expected the progress of a run, got something else; {_REMEDY}")
        for name, callback in self._stateful_callbacks():
            if name in progress["callbacks"]:
                callback.load_state_dict(progress["callbacks"][name])
        self._carried = progress


def unsaved(folder: Path, error: Exception) -> CheckpointError:
    """Return the error for a final model that could not be written; the message names the newest checkpoint."""
    whole = newest_checkpoint(folder)
    left = (
        "without a checkpoint it starts over, so save checkpoints next time (--save-schedule epoch)"
        if whole is None
        else f"it resumes from {whole.name}, which is complete"
    )
    return CheckpointError(
        f"the model could not be written to {str(folder)!r}: {_in_a_line(error)}. If the disk is full, free space, and "
        f"run the same command again; {left}"
    )


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _results(folder: Path) -> list[Path]:
    """Return the results of the model in ``folder``: in the folder itself, or in a folder in it that is not a run."""
    others = [path for path in folder.iterdir() if path.is_dir() and path.name not in (BEST, REPLACED)]
    apart = [path for path in others if not _NAME.fullmatch(path.name) and not (path / "config.json").exists()]
    return sorted(path for place in (folder, *apart) for pattern in RESULTS for path in place.glob(pattern))


def set_aside(folder: Path) -> str:
    """Move the checkpoints, the best model and the results of another run to the folder ``_replaced-run``.

    Results are files that match ``RESULTS``. They describe the model that is being replaced; left in place, a report
    would show them for the new one. Other files are not touched.

    If that folder exists, it contains the files of a still older run, and the run to be replaced never completed. The
    files of the incomplete run are then deleted, so that failing runs do not fill the disk.

    Returns:
        A description of the deleted files; "" if none were deleted.
    """
    best, aside = folder / BEST, folder / REPLACED
    paths = [*checkpoints(folder).values(), *([best] if best.is_dir() else []), *_results(folder)]
    removed = in_words(paths) if paths and aside.is_dir() else ""
    if paths and not removed:
        aside.mkdir()
    for path in paths:
        if not removed:
            (aside / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            path.rename(aside / path.relative_to(folder))
        elif path.is_dir():
            remove_whole(path)
        else:
            path.unlink()
    return removed


__all__ = ["CheckpointError", "ResumableTrainer", "checkpoints", "newest_checkpoint"]
