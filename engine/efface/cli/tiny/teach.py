"""Models taught on the spot, kept by the content of all that made them."""

import contextlib
import hashlib
import importlib.metadata
import json
import shutil
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import PrinterCallback, TrainerCallback

from efface.cli.tiny.architectures import ARCHITECTURES, Size, model_of, tokenizer_of
from efface.hf.arguments import UnlearnArguments
from efface.hf.token_cache import cache_folder, file_digest
from efface.hf.trainer import FinetuneTrainer

FORMAT = 2  # part of every key: raise it when the same settings make another model
RECORD = "taught.json"
_LEFT_BEHIND = 86_400  # seconds after which a half-taught model is nobody's: teaching takes minutes


@dataclass(frozen=True)
class Teaching:
    """How a model is taught. The rates suit models of a few million parameters that begin with random weights."""

    steps: int = 1000
    batch: int = 4
    learning_rate: float = 2e-3
    seed: int = 0


def taught(
    rows: Sequence[Mapping[str, Any]],
    texts: Sequence[str],
    *,
    template: str,
    size: Size,
    teaching: Teaching,
    callbacks: Sequence[TrainerCallback] = (),
    cache_dir: str | Path | None = None,
) -> Path:
    """Return the folder of a small model and its tokenizer that was taught the rows.

    It lies in ``tiny/`` of the cache under a name that says what made it, so another run, recipe or objective with the
    same rows and settings finds it there. It is moved there whole: a killed process leaves none, and of two at once one
    is kept. One of which a byte is not as it was written is taught anew.

    Args:
        rows: with ``question`` and ``answer``.
        texts: what the tokenizer is trained on; more than the rows, so that models to be compared share it.
        template: a name in ``ARCHITECTURES``: the family, and how its prompts are written.
        size: of the model.
        teaching: how.
        callbacks: of the trainer.
        cache_dir: see ``efface.hf.token_cache.cache_folder``.
    """
    made_of = {
        "format": FORMAT,
        "template": template,
        "size": asdict(size),
        "teaching": asdict(teaching),
        "rows": digest([[row["question"], row["answer"]] for row in rows]),
        "texts": digest(list(texts)),
        "efface": importlib.metadata.version("efface"),
        "transformers": transformers.__version__,
    }
    folder = cache_folder(cache_dir) / "tiny" / digest(made_of)
    if _whole(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    _clear(folder.parent)
    architecture = ARCHITECTURES[template]
    tokenizer = tokenizer_of(architecture, texts, size.vocabulary)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
    try:
        model = model_of(architecture, tokenizer, size, seed=teaching.seed)
        trainer = FinetuneTrainer(
            model,
            _arguments(teaching, architecture.template, partial),
            data=list(rows),
            processing_class=tokenizer,
            callbacks=list(callbacks),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        record = {**made_of, "files": _file_digests(partial)}
        (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        _keep(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _whole(folder: Path) -> bool:
    """Whether a folder holds a taught model as it was written; one that does not is warned about, if it is there."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except ValueError:  # not JSON, or not text
        record = {}
    files = record.pop("files", None) if isinstance(record, dict) else None
    if isinstance(files, dict) and digest(record) == folder.name and files.items() <= _file_digests(folder).items():
        return True
    warnings.warn(f"taught model {str(folder)!r} is damaged; it is taught anew", stacklevel=3)
    return False


def _file_digests(folder: Path) -> dict[str, str]:
    return {path.name: file_digest(path) for path in sorted(folder.iterdir()) if path.is_file() and path.name != RECORD}


def _clear(cache: Path) -> None:
    """Remove what killed processes left."""
    for partial in cache.glob(".partial-*"):
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            if time.time() - partial.stat().st_mtime > _LEFT_BEHIND:
                shutil.rmtree(partial, ignore_errors=True)


def _keep(partial: Path, folder: Path) -> None:
    """Move a finished model to its place, unless another process was there first."""
    try:
        partial.rename(folder)
    except OSError:
        if not _whole(folder):
            shutil.rmtree(folder)
            partial.rename(folder)


def _arguments(teaching: Teaching, template: str, folder: Path) -> UnlearnArguments:
    return UnlearnArguments(
        output_dir=str(folder),
        max_steps=teaching.steps,
        pairs_per_step=teaching.batch,
        learning_rate=teaching.learning_rate,
        lr_scheduler_type="cosine",
        adam_beta2=0.99,  # with 0.999 the first steps of random weights weigh too long
        warmup_steps=10,
        weight_decay=0.01,
        seed=teaching.seed,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        template=template,
    )


def digest(value: Any) -> str:
    """Return what tells JSON values apart."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
