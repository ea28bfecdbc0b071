"""Models and tokenizers by name and revision, from folders and from the Hub."""

import importlib.util
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from huggingface_hub import HfApi, try_to_load_from_cache
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils.peft_utils import find_adapter_config_file

from efface.hf.saved_adapter import load_adapted

MAIN = "main"
_WEIGHTS = (".safetensors", ".bin")

T = TypeVar("T")


class HubFiles(Protocol):
    """The part of ``huggingface_hub.HfApi`` that is used here."""

    def list_repo_refs(self, repo_id: str) -> Any:
        """Return what has the branches as ``branches``, each with a ``name``."""

    def list_repo_files(self, repo_id: str, *, revision: str) -> list[str]:
        """Return the names of the files of a revision."""


def load_model(
    name: str,
    *,
    revision: str = MAIN,
    dtype: str = "auto",
    load_in_8bit: bool = False,
    trainable: bool = False,
    client: HubFiles | None = None,
) -> Any:
    """Load a causal language model: all of its weights from the checkpoint, and all of the checkpoint.

    A saved adapter comes as a ``peft.PeftModel`` around its base model, with the very weights that were trained: one
    of a base in half precision stays in float32, one with added tokens finds room for them.

    Args:
        name: a folder, or a name on the Hub.
        revision: a branch, tag or commit; of a folder, a checkpoint in it, such as "checkpoint-12".
        dtype: auto (as saved), float32, bfloat16 or float16.
        load_in_8bit: quantise all linear layers but the head, by bitsandbytes; for models that are not trained.
        trainable: whether a saved adapter can be trained further; a whole model always can.
        client: the Hub; None is the real one.

    Raises:
        ImportError: ``load_in_8bit`` without bitsandbytes; an adapter without peft.
        FileNotFoundError: no such folder, no weights in this revision (lists the revisions that there are), or no base
            model of an adapter.
        ValueError: weights that are not those of the config, or of the adapter's base model; an adapter that cannot be
            read back as it was trained.
        OSError: whatever else the Hub says.
    """

    def load(source: str | Path, **options: Any) -> Any:
        if (found := find_adapter_config_file(str(source), **options)) is not None:
            if Path(found).with_name("config.json").is_file():
                raise ValueError(
                    f"model {name!r}: expected a whole model or an adapter, got both config.json and "
                    "adapter_config.json in one folder; keep each in a folder of its own"
                )
            return load_adapted(Path(found).parent, base_at, trainable=trainable)
        if load_in_8bit:
            options["quantization_config"] = _in_8bit()
        return _load_whole(source, name, dtype=dtype, **options)

    def load_readable(source: str | Path, **options: Any) -> Any:
        try:
            return load(source, **options)
        except SafetensorError as error:  # cut off, or something else
            raise ValueError(f"model {name!r}: its weights cannot be read ({error}); get the files again") from error

    def base_at(base: str, base_revision: str) -> Any:
        return load_model(base, revision=base_revision, dtype=dtype, load_in_8bit=load_in_8bit, client=client)

    return _load(load_readable, name, revision, client)


def _load_whole(source: str | Path, name: str, **options: Any) -> Any:
    """Load what is no adapter; transformers itself only warns of weights that it had to draw or to leave out."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    model, found = loaded
    if problems := _problems(found, model.config):
        raise ValueError(
            f"model {name!r}: its weights are not those of a {type(model).__name__} with its config.json: "
            f"{'; '.join(problems)}. Check num_hidden_layers and the sizes in config.json, or get the files again"
        )
    return model


def _problems(found: Mapping[str, Any], config: Any) -> list[str]:
    """Return what is wrong with weights as transformers found them, which has left out tied and optional ones."""
    lists = {
        "not in the checkpoint, so random": sorted(found["missing_keys"]),
        "in the checkpoint, but not in the model": sorted(found["unexpected_keys"]),
        "of another shape": sorted(map(_mismatch, found["mismatched_keys"])),
        "that could not be read": [str(error) for error in found.get("error_msgs") or ()],
    }
    unused = "in the checkpoint, but not in the model"
    lists[unused] = [key for key in lists[unused] if not _CONSTANT.search(key)]
    if config.get_text_config() is not config or getattr(config, "vision_config", None) is not None:
        lists[unused] = [key for key in lists[unused] if not _OTHER_SENSES.search(key)]
    return [
        f"{len(keys)} {'tensor' if len(keys) == 1 else 'tensors'} {fault} ({keys[0]}{', ...' if len(keys) > 1 else ''})"
        for fault, keys in lists.items()
        if keys
    ]


def _mismatch(item: Any) -> str:
    if isinstance(item, str):  # transformers 4 keeps the names alone
        return item
    name, saved, own = item
    return f"{name} {tuple(saved)} instead of {tuple(own)}"


_CONSTANT = re.compile(r"(^|\.)(attn|attention)(\.attention)?\.(bias|masked_bias)$|(^|\.)(position_ids|inv_freq)$")
"""Causal masks, positions and frequencies, which checkpoints of GPT-2, GPT-Neo, GPT-J and early Llama hold."""

_OTHER_SENSES = re.compile(r"(^|\.)(vision|visual|audio|image|multi_modal)")
"""Parts of a checkpoint that the causal language model of a composite configuration does not have."""


def _in_8bit() -> BitsAndBytesConfig:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(
            "8-bit models need the package bitsandbytes, which is not installed; pip install 'efface[bitsandbytes]'"
        )
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head", "embed_out"])


def load_tokenizer(name: str, *, revision: str = MAIN, client: HubFiles | None = None) -> Any:
    """Load a tokenizer; arguments and errors are those of ``load_model``."""
    return _load(AutoTokenizer.from_pretrained, name, revision, client)


def _load(load: Callable[..., T], name: str, revision: str, client: HubFiles | None) -> T:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return load(local_revision(folder, revision))
    if name.startswith((".", "/", "~")):  # a path that does not exist must not become a search on the Hub
        raise FileNotFoundError(f"model folder {name!r} does not exist; check the path")
    try:
        return load(name, revision=revision)
    except OSError as error:
        others = _other_revisions(client or HfApi(), name, revision)
        if not others:
            raise
        raise FileNotFoundError(_nothing_there(name, revision, others)) from error


def local_files(name: str, revision: str, wanted: str) -> Path | None:
    """Return the folder of a checkpoint that is on this machine, as a folder or in the Hub's cache; else None.

    Raises:
        FileNotFoundError: a path that does not exist.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return local_revision(folder, revision)
    if name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"model folder {name!r} does not exist; check the path")
    cached = try_to_load_from_cache(name, wanted, revision=revision)
    return Path(cached).parent if isinstance(cached, str) else None


def local_revision(folder: Path, revision: str) -> Path:
    """Return where a folder keeps a revision: in itself (main), in a sub-folder, or as a snapshot of the Hub's cache.

    Raises:
        FileNotFoundError: it does not; lists what it keeps.
    """
    ref = folder / "refs" / revision
    if ref.is_file():
        return folder / "snapshots" / ref.read_text(encoding="utf-8").strip()
    inside = folder if revision == MAIN else folder / revision
    if _has_weights(path.name for path in inside.glob("*")):
        return inside
    refs = folder / "refs"
    kept = [str(path.relative_to(refs)) for path in refs.rglob("*") if path.is_file()]
    kept += [path.name for path in folder.glob("[!.]*") if _has_weights(item.name for item in path.glob("*"))]
    if not kept and revision == MAIN:
        return folder  # transformers says what is missing
    raise FileNotFoundError(_nothing_there(str(folder), revision, kept))


def _has_weights(names: Iterable[str]) -> bool:
    return any(name.endswith(_WEIGHTS) and not name.startswith("training_args") for name in names)


def _other_revisions(client: HubFiles, name: str, revision: str) -> list[str]:
    """Return the branches of a repository if this revision is missing or has no weights, else nothing."""
    try:
        branches = [branch.name for branch in client.list_repo_refs(name).branches]
        if revision in branches and _has_weights(client.list_repo_files(name, revision=revision)):
            return []  # the weights are there, so the error is about something else
    except Exception:  # noqa: BLE001 - the first error tells more than one about looking for its cause
        return []
    return [branch for branch in branches if branch != revision]


def _nothing_there(name: str, revision: str, others: list[str]) -> str:
    listed = ", ".join(sorted(others, key=lambda other: (len(other), other))) or "none"
    example = max(others, key=lambda other: (len(other), other), default="checkpoint-N")
    return (
        f"model {name!r}: no weights at revision {revision!r}; it has revisions {listed}. Choose one, such as "
        f"`--revision {example}`"
    )
