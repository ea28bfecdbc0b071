"""Files of a trial on the disk: its folder, log, record and lock, and the removal of its weights."""

import json
import math
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from efface.files import remove_whole, take_lock, write_whole
from efface.hf.train.checkpoints import checkpoints

SUMMARY = "TOFU_SUMMARY.json"
RETAIN_LOG = Path("retain_model", "TOFU_EVAL.json")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin", "*.index.json")


@dataclass(frozen=True)
class Result:
    """The result of a trial.

    Attributes:
        metrics: finite figures of the evaluation, by open-unlearning's names.
        error: last lines of the log, or the reason for missing metrics; empty if the trial is complete.
        exit_code: exit code of the process: 3 means that training diverged, a negative code is a signal.
        seconds: duration of the last process.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    error: str = ""
    exit_code: int = 0
    seconds: float = 0.0


class Place:
    """The paths of a trial: the folder ``trials/NAME/``, and its log, record (``NAME.json``) and lock next to it."""

    def __init__(self, out: Path, name: str) -> None:
        trials = out / "trials"
        self.folder = trials / name
        self.log, self._record, self._lock = (trials / f"{name}.{end}" for end in ("log", "json", "lock"))

    def result(self) -> Result | None:
        """Return the recorded result of the trial, or None if there is no record or it is damaged."""
        try:
            content = json.loads(self._record.read_text(encoding="utf-8"))
            checksum = content.pop("checksum", None)  # records of earlier versions have no checksum
            result = Result(**content)
        except (FileNotFoundError, ValueError, TypeError, AttributeError):
            return None
        return result if checksum in (None, _checksum(result)) else None

    def finish(self, result: Result) -> None:
        """Write the record of the result."""
        write_whole(self._record, json.dumps({**asdict(result), "checksum": _checksum(result)}, indent=2))

    def forget(self) -> None:
        """Delete the record of the result, so that the trial runs again."""
        self._record.unlink(missing_ok=True)

    def lock(self) -> int | None:
        """Take the lock of the trial without waiting.

        Returns:
            A file descriptor. The lock is held as long as any process has it open. None if another process holds it.
        """
        return take_lock(self._lock)

    def read(self, exit_code: int, seconds: float, *, evaluated: bool) -> Result:
        """Return the result of a trial from the files of its ended process.

        Args:
            exit_code: exit code of the process.
            seconds: duration of the process.
            evaluated: whether a complete trial has an evaluation.
        """
        if exit_code:
            return Result({}, last_lines(self.log) or _died(exit_code), exit_code, seconds)
        if not evaluated:
            return Result({}, "", 0, seconds)
        path = self.folder / "evaluation" / SUMMARY
        try:
            content: Any = json.loads(path.read_text(encoding="utf-8"))
            numbers = {name: float(value) for name, value in content.items() if isinstance(value, (int, float))}
        except (OSError, ValueError, AttributeError) as error:
            return Result({}, f"no evaluation: {error}", 0, seconds)
        metrics = {name: value for name, value in numbers.items() if math.isfinite(value)}
        return Result(metrics, "" if metrics else f"no finite figure in {path}", 0, seconds)

    def has_weights(self) -> bool:
        """Return whether the folder contains weights of a model."""
        return any(path for pattern in _WEIGHTS for path in self.folder.glob(pattern))

    def remove_weights(self) -> None:
        """Remove the model and its checkpoints. The evaluation is kept."""
        for path in checkpoints(self.folder).values():
            remove_whole(path)
        for pattern in _WEIGHTS:
            for path in self.folder.glob(pattern):
                path.unlink(missing_ok=True)

    def share_retain_log(self, out: Path) -> None:
        """Copy the evaluation of the retain model into the folder of the sweep, for later trials to use."""
        own, shared = self.folder / "evaluation" / RETAIN_LOG, out / RETAIN_LOG
        if own.is_file() and not shared.is_file():
            write_whole(shared, own.read_bytes())


def _checksum(result: Result) -> int:
    return zlib.crc32(json.dumps(asdict(result), sort_keys=True).encode())


def last_lines(log: Path, count: int = 5, most: int = 1000) -> str:
    """Return the last ``count`` non-empty lines of a log, at most ``most`` characters; empty if it cannot be read."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 16 * most))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return "\n".join(lines[-count:])[-most:]


def _died(exit_code: int) -> str:
    return f"ended by signal {-exit_code}" if exit_code < 0 else f"ended with exit code {exit_code}"
