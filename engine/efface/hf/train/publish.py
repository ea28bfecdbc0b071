"""Model cards, and upload of checkpoints to the Hub as revisions of one repository."""

import json
import logging
import math
import re
import threading
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import LocalTokenNotFoundError
from transformers import TrainerControl, TrainerState, TrainingArguments

from efface.files import PARTIAL, write_whole
from efface.hf.train.arguments import UnlearnArguments
from efface.hf.train.callbacks import TrainerBound
from efface.hf.train.checkpoints import REPLACED, checkpoints
from efface.hf.train.record import RunRecord

RECORD = "pushed.json"
_LOG = logging.getLogger(__name__)
# Only the model is published, not the state for resuming training.
_NOT_PUSHED = [
    *(
        "optimizer*",
        "scheduler.pt",
        "scaler.pt",
        "rng_state*",
        "progress*.pt",
        "training_args.bin",
        "trainer_state.json",
    ),
    *("global_step*", "pytorch_model_fsdp*", "checkpoint-*", f"{PARTIAL}*", "run.json", RECORD, f"{REPLACED}*"),
    *("evaluation/*", "audit*", "*.sqlite*"),  # generated answers and caches, which can reveal the data
]


class HubError(OSError):
    """The Hub rejected a request, could not be reached, or lacks an expected repository or file."""


class HubClient(Protocol):
    """The methods of ``huggingface_hub.HfApi`` that this module calls."""

    def whoami(self) -> Any:
        """Return the account; raise an error if not logged in."""

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> Any:
        """Create a repository; return an object whose ``repo_id`` is its full name."""

    def create_branch(self, repo_id: str, *, branch: str, exist_ok: bool) -> None:
        """Create a branch from main."""

    def upload_folder(
        self,
        *,
        repo_id: str,
        folder_path: str | Path,
        revision: str,
        commit_message: str,
        ignore_patterns: list[str],
    ) -> Any:
        """Commit a folder to a branch."""


def default_client(token: str | None = None) -> HubClient:
    """Return a client of the Hub; without ``token`` it uses the login of huggingface_hub."""
    client: HubClient = HfApi(token=token)
    return client


def check_login(client: HubClient) -> None:
    """Raise HubError unless the client is logged in to the Hub."""
    try:
        client.whoami()
    except LocalTokenNotFoundError as error:
        raise HubError(
            "`--push-to-hub`: expected a login to the Hugging Face Hub, got none; run `hf auth login`, or set HF_TOKEN"
        ) from error
    except Exception as error:
        raise HubError(f"`--push-to-hub`: the login to the Hugging Face Hub failed: {error}") from error


class RevisionPusher:
    """Uploader that pushes each checkpoint to the branch ``checkpoint-N`` of a repository.

    Uploads run in a background thread. They can take minutes, during which training continues, and other processes do
    not wait for the upload and time out. A checkpoint that could not be pushed is kept. The upload is tried again with
    the next checkpoint, when training ends, and when a killed run is resumed.

    Args:
        client: see ``HubClient``.
        name: name of the repository, which is created if it does not exist.
        folder: output folder of the run; a file there records the pushed steps.
        private: whether a new repository is private; None is the account's default.

    Raises:
        HubError: there is no login, or the repository cannot be created.
    """

    def __init__(self, client: HubClient, name: str, folder: Path, *, private: bool | None = None) -> None:
        check_login(client)
        try:
            self.repository: str = client.create_repo(name, private=private, exist_ok=True).repo_id
        except Exception as error:
            raise HubError(f"`--hub-model-id`: cannot create or write to the repository {name!r}: {error}") from error
        self._client = client
        self._folder = folder
        self._lock = threading.Lock()
        self._pending: dict[int, Path] = {}
        self._errors: dict[int, str] = {}
        self._thread: threading.Thread | None = None

    @classmethod
    def of(cls, args: UnlearnArguments, client: HubClient | None = None) -> "RevisionPusher":
        """Return the pusher for the arguments of a run."""
        folder = Path(args.output_dir or "trainer_output")
        name = args.hub_model_id or folder.absolute().name
        return cls(client or default_client(args.hub_token), name, folder, private=args.hub_private_repo)

    def resume(self) -> None:
        """Queue the checkpoints that an earlier process of the run saved but did not push."""
        pushed = self._pushed()
        for step, path in checkpoints(self._folder).items():
            if step not in pushed:
                self.add(step, path)

    def start_anew(self) -> None:
        """Delete the record of what another run pushed from this folder."""
        (self._folder / RECORD).unlink(missing_ok=True)

    def add(self, step: int, checkpoint: Path) -> None:
        """Queue a checkpoint, and start the upload thread unless it is running; it also retries pending checkpoints."""
        with self._lock:
            self._pending[step] = checkpoint
        if self._thread is None or not self._thread.is_alive():
            # A daemon thread, so that Ctrl-C does not wait for an upload.
            self._thread = threading.Thread(target=self._drain, daemon=True)
            self._thread.start()

    def in_use(self) -> AbstractSet[Path]:
        """Return the checkpoints that are not pushed yet, which must not be deleted."""
        with self._lock:
            return set(self._pending.values())

    def finish(self) -> dict[int, str]:
        """Wait for the uploads, retry pending checkpoints once, and return the errors of the failed ones, by step."""
        if self._thread is not None:
            self._thread.join()
        self._drain()
        with self._lock:
            return {step: self._errors.get(step, "") for step in self._pending}

    def push_final(self, folder: Path) -> None:
        """Push the final model in ``folder`` to the main branch.

        Raises:
            HubError: the upload failed.
        """
        try:
            self._upload(folder, "main", "efface: final model")
        except Exception as error:
            raise HubError(
                f"the final model was not pushed to {self.repository!r}: {error}. It is complete in {str(folder)!r}; "
                "run the same command again to push it"
            ) from error

    def _drain(self) -> None:
        tried: set[int] = set()
        while True:
            with self._lock:
                left = [(step, path) for step, path in sorted(self._pending.items()) if step not in tried]
            if not left:
                return
            step, path = left[0]
            tried.add(step)
            try:
                self._client.create_branch(self.repository, branch=path.name, exist_ok=True)
                self._upload(path, path.name, f"efface: step {step}")
                self._remember(step)
            except Exception as error:  # noqa: BLE001 - no upload error can stop training
                self._errors[step] = f"{type(error).__name__}: {error}"
                _LOG.warning("%s was not pushed; the upload will be retried later: %s", path.name, error)
            else:
                with self._lock:
                    del self._pending[step]

    def _upload(self, folder: Path, revision: str, message: str) -> None:
        self._client.upload_folder(
            repo_id=self.repository,
            folder_path=folder,
            revision=revision,
            commit_message=message,
            ignore_patterns=_NOT_PUSHED,
        )

    def _pushed(self) -> set[int]:
        try:
            record = json.loads((self._folder / RECORD).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return set()
        return set(record["steps"]) if record["repository"] == self.repository else set()

    def _remember(self, step: int) -> None:
        record = {"repository": self.repository, "steps": sorted({*self._pushed(), step})}
        write_whole(self._folder / RECORD, json.dumps(record))


_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")  # names that the Hub accepts in the header of a card


def model_card(recipe: RunRecord, log_history: list[dict[str, Any]], *, step: int) -> ModelCard:
    """Return the model card of the run ``recipe`` after ``step`` optimizer steps."""
    losses, evaluations = final_metrics(log_history)
    name = f"{recipe.method} of {Path(recipe.base_model).name or 'a model'}"
    data = ModelCardData(
        base_model=recipe.base_model if _is_hub_name(recipe.base_model) else None,
        datasets=sorted({source for facts in recipe.data.values() if _is_hub_name(source := facts.hub_name)}) or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["efface", "machine-unlearning", recipe.method],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type="forget-retain",
                dataset_name="forget and retain sets of the run",
                metric_type=metric,
                metric_value=value,
            )
            for metric, value in evaluations.items()
        ]
        or None,
        efface={**recipe.as_dict(), "step": step, "metrics": {**losses, **evaluations}},
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_body(name, recipe, {**losses, **evaluations}, step)}")


def final_metrics(log_history: list[dict[str, Any]]) -> tuple[dict[str, float], dict[str, float]]:
    """Return the last finite value of each loss and of each evaluation metric (``eval_*``) in a run's log."""
    losses: dict[str, float] = {}
    evaluations: dict[str, float] = {}
    for entry in log_history:
        for key, value in entry.items():
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                continue
            if key.startswith("eval_"):
                evaluations[key] = float(value)
            elif key == "loss" or (key.endswith("_loss") and key != "train_loss"):
                losses[key] = float(value)
    return losses, evaluations


def _is_hub_name(name: str) -> bool:
    return bool(_REPOSITORY.fullmatch(name)) and not Path(name).exists()


def _body(name: str, recipe: RunRecord, metrics: dict[str, float], step: int) -> str:
    command = f"## Reproduce\n\n```\n{recipe.command}\n```\n" if recipe.command else ""
    made = f"`{recipe.method}` on `{recipe.base_model}` (revision `{recipe.revision}`), {step} optimizer steps"
    data = [
        (role, f"`{facts.source}`", facts.counts(), f"`{facts.fingerprint}`", ", ".join(facts.filters) or "-")
        for role, facts in recipe.data.items()
    ]
    sections = [
        f"# {name}",
        f"Trained with efface {recipe.versions['efface']}: {made}.",
        f"Adapter: {recipe.adapter}." if recipe.adapter else "",
        "## Objective\n\n" + _table(("parameter", "value"), _rows(recipe.objective)),
        "## Data\n\n" + _table(("set", "source", "rows", "fingerprint of the tokens", "filter"), data),
        "## Hyperparameters\n\n" + _table(("name", "value"), _rows({**recipe.plan, **recipe.arguments})),
        "## Metrics\n\n" + _table(("name", "last value"), [(key, f"{value:.6g}") for key, value in metrics.items()]),
        "## Versions\n\n" + _table(("package", "version"), _rows(recipe.versions)),
        command,
    ]
    return "\n\n".join(filter(None, sections)).rstrip() + "\n"


def _rows(values: dict[str, Any]) -> list[tuple[str, ...]]:
    return [(f"`{key}`", f"`{value}`") for key, value in values.items()]


def _table(heading: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [heading, tuple("---" for _ in heading), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )


class Publisher(TrainerBound):
    """Callback that writes model cards and, with ``revision_per_checkpoint``, pushes checkpoints.

    Attributes:
        revisions: whether each checkpoint is pushed to its own branch.
        not_pushed: after training, the error messages of checkpoints that are not on the Hub, by step.

    Raises:
        HubError: there is no login, or the repository cannot be created.
    """

    def __init__(self, args: UnlearnArguments, client: HubClient | None = None) -> None:
        self.revisions = args.revision_per_checkpoint
        self.not_pushed: dict[int, str] = {}
        # Only the first process pushes.
        self._pusher = RevisionPusher.of(args, client) if self.revisions and args.process_index == 0 else None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """In a resumed run, queue the checkpoints that are not pushed yet; in a new run, clear the record."""
        if self._pusher is not None:
            self._pusher.resume() if state.global_step else self._pusher.start_anew()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Queue the new checkpoint for upload."""
        if self._pusher is not None:
            self._pusher.add(state.global_step, Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Wait for the uploads, and store the errors of failed ones in ``not_pushed``."""
        if self._pusher is not None:
            self.not_pushed = self._pusher.finish()

    def in_use(self) -> AbstractSet[Path]:
        """Return the checkpoints that are not pushed yet."""
        return set() if self._pusher is None else self._pusher.in_use()

    def push_final(self, folder: Path) -> None:
        """Push the model in a folder to main of the checkpoints' repository; every process must call this."""
        if self._pusher is not None:
            self._pusher.push_final(folder)

    def write_card(self, folder: Path) -> None:
        """Write the card (README.md) of the model in a folder, if the folder exists."""
        if folder.is_dir():
            trainer = self._trainer()
            card = model_card(trainer.recipe(), trainer.state.log_history, step=trainer.state.global_step)
            card.save(folder / "README.md")
