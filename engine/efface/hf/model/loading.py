"""Models, tokenizers and saved adapters by name and revision, from folders and from the Hub.

An adapter is read back onto its base model exactly as it was trained, or not at all.
"""

import importlib.util
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils.peft_utils import find_adapter_config_file

from efface.hf.model.adapted_head import base_of, import_peft

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


_NOT_REPEATED = {
    "pissa_niter": "a randomised decomposition of the base weights, which comes out otherwise each time; use 'pissa'",
    "corda": "activations of calibration data, which the adapter does not hold",
    "loftq": "a quantised base model, which the adapter does not hold",
}
"""Initialisations that change the base weights in a way that reading the adapter does not repeat."""


def load_adapted(folder: Path, load_base: Callable[[str, str], Any], *, trainable: bool = False) -> Any:
    """Return a ``peft.PeftModel``: the base model that an adapter names, with the adapter.

    A base with a smaller vocabulary than that of the adapter is resized, if the adapter holds all rows of both the
    input embeddings and the head: the new ones are then the adapter's.

    Args:
        folder: holds adapter_config.json and the adapter's weights.
        load_base: loads a model by name and revision.
        trainable: whether the adapter is to be trained further; else nothing requires a gradient.

    Raises:
        FileNotFoundError: the base model is not there.
        ImportError: without peft.
        ValueError: an adapter that does not name its base, or is for another base; one that cannot be read back.
    """
    peft = import_peft()
    config = peft.PeftConfig.from_pretrained(str(folder))
    name, revision = config.base_model_name_or_path, config.revision or "main"
    if not name:
        raise ValueError(f"adapter {str(folder)!r}: expected base_model_name_or_path in adapter_config.json, got none")
    _check_repeatable(folder, config)
    try:
        base = load_base(name, revision)
    except OSError as error:
        raise FileNotFoundError(f"adapter {str(folder)!r}: its base model cannot be loaded: {error}") from error
    if base_of(base) is not base:
        raise ValueError(
            f"adapter {str(folder)!r}: expected a whole model as its base, got {name!r}, which is an adapter too; "
            "merge that into its own base first (`--merge-adapter`, or peft's merge_and_unload)"
        )
    weights = peft.load_peft_weights(str(folder), device="cpu")
    _make_room(folder, config, base, weights)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # refused below
            model = peft.PeftModel.from_pretrained(base, str(folder), is_trainable=trainable, torch_device="cpu")
    except RuntimeError as error:  # how torch says that shapes differ
        listed = " ".join(str(error).split())
        raise ValueError(f"adapter {str(folder)!r} is not of its base model {name!r}: {listed}") from error
    _check_held(folder, name, model, weights)
    if not trainable:
        model.requires_grad_(False)
    return model


def _check_repeatable(folder: Path, config: Any) -> None:
    init = getattr(config, "init_lora_weights", None)
    for known, reason in _NOT_REPEATED.items():
        if isinstance(init, str) and init.startswith(known):
            raise ValueError(
                f"adapter {str(folder)!r} cannot be read back: init_lora_weights={init!r} changed its base model by "
                f"{reason}. Save the merged model (peft's merge_and_unload), or convert the adapter while its model is "
                "at hand (path_initial_model_for_weight_conversion of save_pretrained)"
            )


def _make_room(folder: Path, config: Any, base: Any, weights: Mapping[str, Tensor]) -> None:
    """Give ``base`` as many rows as the adapter has tokens."""
    layers = {"input embeddings": base.get_input_embeddings(), "head": base.get_output_embeddings()}
    paths = {part: path for path, module in base.named_modules() for part, layer in layers.items() if module is layer}
    held = {part: _ending(weights, f".{path}.weight", f".{path}.base_layer.weight") for part, path in paths.items()}
    rows = {len(weight) for weight in held.values() if weight is not None}
    own = layers["input embeddings"].weight.shape[0]
    if rows <= {own}:
        return
    tied = layers["head"] is None or layers["head"].weight is layers["input embeddings"].weight
    # A copy in modules_to_save is tied to nothing: the head goes on with the base's rows.
    copied = bool(getattr(config, "modules_to_save", None)) and not getattr(config, "ensure_weight_tying", False)
    lacking = [] if tied and not copied else [part for part, weight in held.items() if weight is None]
    if len(rows) > 1 or lacking:
        sizes = ", ".join(map(str, sorted(rows)))
        raise ValueError(
            f"adapter {str(folder)!r} has a vocabulary of {sizes} tokens, its base model "
            f"{config.base_model_name_or_path!r} one of {own}, and the adapter does not hold the new rows of both the "
            f"input embeddings and the head (it lacks the {' and the '.join(lacking) or 'same number of them'}); save "
            "them with it (modules_to_save), or save the resized base model and train the adapter on that"
        )
    with torch.random.fork_rng(devices=[]):  # rows that the adapter's replace
        base.resize_token_embeddings(rows.pop(), mean_resizing=False)


def _ending(weights: Mapping[str, Tensor], *endings: str) -> Tensor | None:
    return next((weight for key, weight in weights.items() if key.endswith(endings)), None)


def _check_held(folder: Path, name: str, model: Any, weights: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless the adapter of ``model`` is what was saved, to the last bit."""
    peft = import_peft()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        needed = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
        held = needed | peft.get_peft_model_state_dict(model, save_embedding_layers=True)
    faults = {
        "the model lacks": [key for key in weights if key not in held],
        "the adapter lacks": [key for key in needed if key not in weights],
        "do not fit": [
            key
            for key, weight in weights.items()
            if key in held and not torch.equal(held[key].cpu(), weight.to(held[key].dtype))
        ],
    }
    found = [f"{len(keys)} tensors {fault}, such as {keys[0]}" for fault, keys in faults.items() if keys]
    if found:
        raise ValueError(f"adapter {str(folder)!r} is not of its base model {name!r}: {'; '.join(found)}")
