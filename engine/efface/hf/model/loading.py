"""Loading of models, tokenizers, configurations and saved adapters, by name and revision, from folders and the Hub.

A saved adapter is either loaded onto its base model exactly as it was trained, or refused with an error.
"""

import json
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging
from transformers.utils.peft_utils import find_adapter_config_file

from efface.errors import one_line, reading
from efface.extras import check_extras
from efface.hf.model.adapted_head import base_of, import_peft

MAIN = "main"
_WEIGHTS = (".safetensors", ".bin")
# A name with one of these suffixes is taken for a missing file, not for a repository on the Hub.
_FILES = (*_WEIGHTS, ".pt", ".pth", ".ckpt", ".gguf", ".json", ".model", ".zip", ".tar", ".gz")
# Small JSON files of models and tokenizers, which are checked before loading.
_MODEL_JSON = ("config.json", "generation_config.json", "adapter_config.json", "*.index.json")
_TOKENIZER_JSON = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_TOKENIZER = ("*token*", "vocab*", "merges*", "*.model", "spiece*")

T = TypeVar("T")


class HubFiles(Protocol):
    """The methods of ``huggingface_hub.HfApi`` that this module calls."""

    def list_repo_refs(self, repo_id: str) -> Any:
        """Return an object with a list ``branches``, each with a ``name``."""

    def list_repo_files(self, repo_id: str, *, revision: str) -> list[str]:
        """Return the names of the files in a revision."""


def load_model(
    name: str,
    *,
    revision: str = MAIN,
    dtype: str = "auto",
    load_in_8bit: bool = False,
    trainable: bool = False,
    trust_remote_code: bool = False,
    client: HubFiles | None = None,
) -> Any:
    """Load a causal language model, and check that every weight of the model is in the checkpoint and vice versa.

    A saved adapter is loaded as a ``peft.PeftModel`` around its base model, with exactly the weights that were trained.
    An adapter trained in float32 stays in float32 on a half-precision base. If the adapter was saved with added
    tokens, the base model is resized for them.

    Args:
        name: a folder, or a name on the Hub.
        revision: a branch, tag or commit. For a folder, the name of a checkpoint in it, such as "checkpoint-12".
        dtype: auto (as saved), float32, bfloat16 or float16.
        load_in_8bit: whether to quantise all linear layers except the head with bitsandbytes; for models that are not
            trained.
        trainable: whether a saved adapter can be trained further; a whole model always can.
        trust_remote_code: whether to run code from the checkpoint (``auto_map`` in its config.json).
        client: client for the Hub; None uses ``huggingface_hub.HfApi``.

    Raises:
        ImportError: if bitsandbytes is missing for ``load_in_8bit``, or peft is missing for an adapter.
        FileNotFoundError: if the folder does not exist, the revision has no weights (the message lists the available
            revisions), or the base model of an adapter is missing.
        NotADirectoryError: if ``name`` is a file.
        ValueError: if the weights do not match the config or the adapter's base model, an adapter cannot be loaded as
            it was trained, or the checkpoint has code that is not trusted.
        OSError: for other errors of the Hub.
    """
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"`dtype`: expected auto, float32, bfloat16 or float16, got {dtype!r}")

    def load(source: str | Path, **options: Any) -> Any:
        if (found := find_adapter_config_file(str(source), **options)) is not None:
            if Path(found).with_name("config.json").is_file():
                raise ValueError(
                    f"model {name!r}: expected a whole model or an adapter, got both config.json and "
                    "adapter_config.json in one folder; move one of them to another folder"
                )
            return load_adapted(Path(found).parent, base_at, trainable=trainable)
        if load_in_8bit:
            options["quantization_config"] = _in_8bit()
        return _load_whole(source, name, dtype=dtype, trust_remote_code=trust_remote_code, **options)

    def load_readable(source: str | Path, **options: Any) -> Any:
        _check_json(source, _MODEL_JSON)
        check_code(source, trusted=trust_remote_code)
        folder = Path(source)
        if folder.is_dir() and not any((folder / file).exists() for file in ("config.json", "adapter_config.json")):
            raise FileNotFoundError(
                f"model {name!r}: expected config.json or adapter_config.json in {str(source)!r}, got neither; check "
                "the path, or get the files again"
            )
        with _readable_weights(name, source), _no_progress_bar_in_a_pipe():
            return load(source, **options)

    def base_at(base: str, base_revision: str) -> Any:
        return load_model(
            base,
            revision=base_revision,
            dtype=dtype,
            load_in_8bit=load_in_8bit,
            trust_remote_code=trust_remote_code,
            client=client,
        )

    return _load(load_readable, name, revision, client)


@contextmanager
def _readable_weights(name: str, source: str | Path) -> Iterator[None]:
    """Convert library errors about a checkpoint to ValueError, with the name of the damaged file if it is local."""
    with reading(
        f"model {name!r}",
        "a checkpoint that transformers can load",
        "check its config.json, or get the files again",
    ):
        try:
            yield
        except SafetensorError as error:  # a truncated file, or not a safetensors file
            file = f"{str(damaged)!r}: " if (damaged := _damaged(source)) else ""
            raise ValueError(
                f"model {name!r}: its weights cannot be read ({file}{one_line(str(error))}); get the files again"
            ) from error
        except (pickle.UnpicklingError, EOFError) as error:
            raise ValueError(
                f"model {name!r}: its pickled weights cannot be read: they are damaged, or contain objects other than "
                "tensors, which could run code; get the files again, preferably as safetensors"
            ) from error


def _damaged(source: str | Path) -> Path | None:
    return next((path for path in sorted(Path(source).glob("*.safetensors")) if not is_whole(path)), None)


def is_whole(weights: Path) -> bool:
    """Return whether a safetensors file has a valid header that matches the size of the file."""
    try:
        with safe_open(weights, "pt"):
            return True
    except SafetensorError:
        return False


def _check_json(source: str | Path, patterns: Iterable[str]) -> None:
    """Raise ValueError if a matching file in a folder is not a JSON object; transformers ignores some damaged files."""
    for path in sorted(path for pattern in patterns for path in Path(source).glob(pattern)):
        where, remedy = repr(str(path)), "get the file again"
        with reading(where, "a JSON object", remedy):
            content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"{where}: expected a JSON object, got {type(content).__name__}; {remedy}")  # noqa: TRY004 - a file's content is a value


@contextmanager
def _no_progress_bar_in_a_pipe() -> Iterator[None]:
    """Disable transformers' progress bars if stderr is not a terminal, where each update would be a separate line."""
    if not logging.is_progress_bar_enabled() or (sys.stderr is not None and sys.stderr.isatty()):
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _load_whole(source: str | Path, name: str, **options: Any) -> Any:
    """Load a whole model, and raise ValueError for missing or unused weights, of which transformers only warns."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    model, found = loaded
    if problems := _problems(found, model.config):
        raise ValueError(
            f"model {name!r}: expected the weights of a {type(model).__name__} as config.json describes it, got "
            f"{'; '.join(problems)}; check num_hidden_layers and the sizes in config.json, or get the files again"
        )
    return model


def _problems(found: Mapping[str, Any], config: Any) -> list[str]:
    """Return descriptions of the mismatches that transformers reports; it leaves out tied and optional weights."""
    lists = {
        "not in the checkpoint, so random": sorted(found["missing_keys"]),
        "in the checkpoint, but not in the model": sorted(found["unexpected_keys"]),
        "of another shape": sorted(map(_mismatch, found["mismatched_keys"])),
        "that could not be read": [str(error) for error in found.get("error_msgs") or ()],
    }
    unused = "in the checkpoint, but not in the model"
    lists[unused] = [key for key in lists[unused] if not _CONSTANT.search(key)]
    if config.get_text_config() is not config or getattr(config, "vision_config", None) is not None:
        lists[unused] = [key for key in lists[unused] if not _OTHER_MODALITIES.search(key)]
    return [
        f"{len(keys)} {'tensor' if len(keys) == 1 else 'tensors'} {fault} ({keys[0]}{', ...' if len(keys) > 1 else ''})"
        for fault, keys in lists.items()
        if keys
    ]


def _mismatch(item: Any) -> str:
    if isinstance(item, str):  # transformers 4 reports only the names
        return item
    name, saved, own = item
    return f"{name} {tuple(saved)} instead of {tuple(own)}"


_CONSTANT = re.compile(r"(^|\.)(attn|attention)(\.attention)?\.(bias|masked_bias)$|(^|\.)(position_ids|inv_freq)$")
"""Constant buffers (causal masks, positions, frequencies) in checkpoints of GPT-2, GPT-Neo, GPT-J and early Llama."""

_OTHER_MODALITIES = re.compile(r"(^|\.)(vision|visual|audio|image|multi_modal)")
"""Weights of other modalities in a multimodal checkpoint, which its causal language model does not use."""


def _in_8bit() -> BitsAndBytesConfig:
    check_extras("an 8-bit model", "bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head", "embed_out"])


def load_tokenizer(
    name: str, *, revision: str = MAIN, trust_remote_code: bool = False, client: HubFiles | None = None
) -> Any:
    """Load a tokenizer; arguments and errors are those of ``load_model``."""
    return _load(partial(read_tokenizer, trust_remote_code=trust_remote_code), name, revision, client)


def read_tokenizer(source: str | Path, **options: Any) -> Any:
    """Return the tokenizer in a folder, or under a name on the Hub.

    Args:
        source: the folder or the name.
        **options: keyword arguments for ``AutoTokenizer.from_pretrained``.

    Raises:
        FileNotFoundError: if the folder contains no tokenizer.
        ValueError: if the files of the tokenizer are damaged.
        OSError: for other errors of the Hub.
    """
    where = f"tokenizer {str(source)!r}"
    if Path(source).is_dir() and not any(path for pattern in _TOKENIZER for path in Path(source).glob(pattern)):
        raise FileNotFoundError(
            f"{where}: expected tokenizer.json and tokenizer_config.json in the folder, got no tokenizer files; "
            "choose another tokenizer with --tokenizer, or copy the files from the model's base model"
        )
    _check_json(source, _TOKENIZER_JSON)
    with reading(where, "a tokenizer that transformers can load"):
        return AutoTokenizer.from_pretrained(source, **options)


def check_code(source: str | Path, *, trusted: bool) -> None:
    """Raise ValueError if the model in a folder needs its own code and ``trusted`` is false.

    Without this check, transformers would ask on the terminal and wait for an answer.
    """
    path = Path(source, "config.json")
    if trusted or not path.is_file():
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    code = found.get("auto_map") if isinstance(found, dict) else None
    if isinstance(code, dict) and found.get("model_type") not in CONFIG_MAPPING:
        files = sorted({f"{str(name).split('--')[-1].split('.')[0]}.py" for name in code.values()})
        raise ValueError(
            f"model {str(source)!r}: expected an architecture of transformers, got {found.get('model_type')!r}, which "
            f"needs code from the checkpoint ({', '.join(files)}); read that code, and add --trust-remote-code (in "
            "Python trust_remote_code=True) to run it"
        )


def load_config(name: str, *, revision: str = MAIN, trust_remote_code: bool = False) -> Any:
    """Load a model's configuration; arguments and errors are those of ``load_model``."""
    return _load(partial(read_config, trust_remote_code=trust_remote_code), name, revision, None)


def read_config(source: str | Path, **options: Any) -> Any:
    """Return the configuration in a folder, or under a name on the Hub.

    Args:
        source: the folder or the name.
        **options: keyword arguments for ``AutoConfig.from_pretrained``.

    Raises:
        ValueError: if config.json is damaged, or the model needs code that is not trusted.
        OSError: for other errors of the Hub.
    """
    _check_json(source, ("config.json",))
    check_code(source, trusted=bool(options.get("trust_remote_code")))
    with reading(f"model {str(source)!r}", "a config.json that transformers can load"):
        return AutoConfig.from_pretrained(source, **options)


def _load(load: Callable[..., T], name: str, revision: str, client: HubFiles | None) -> T:
    if (folder := _folder(name)) is not None:
        return load(local_revision(folder, revision))
    try:
        return load(name, revision=revision)
    except OSError as error:
        others = _other_revisions(client or HfApi(), name, revision)
        if not others:
            raise
        raise FileNotFoundError(_no_weights(name, revision, others)) from error


def _folder(name: str) -> Path | None:
    """Return the folder ``name``, or None if it does not exist and ``name`` can be a name on the Hub.

    Raises:
        FileNotFoundError: if ``name`` is a path that does not exist; it must not be looked up on the Hub.
        NotADirectoryError: if ``name`` is a file.
        ValueError: if ``name`` is blank.
    """
    folder = Path(name).expanduser()
    if not name.strip():
        raise ValueError(f"model: expected a folder or a name on the Hub, got {name!r}")
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NotADirectoryError(f"model {name!r}: expected a folder, got a file; give the folder that contains it")
    if name.startswith((".", "/", "~")) or folder.suffix in _FILES or len(folder.parts) > 2 or folder.is_symlink():
        raise FileNotFoundError(f"model folder {name!r} does not exist; check the path")
    return None


def local_files(name: str, revision: str, wanted: str) -> Path | None:
    """Return the local folder of a checkpoint, or None if it would have to be downloaded.

    Args:
        name: a folder, or a name on the Hub.
        revision: the revision, as in ``load_model``.
        wanted: name of a file that the Hub's local cache must contain for the checkpoint.

    Raises:
        FileNotFoundError: if ``name`` is a path that does not exist, or the folder has no such revision.
    """
    if (folder := _folder(name)) is not None:
        return local_revision(folder, revision)
    cached = try_to_load_from_cache(name, wanted, revision=revision)
    return Path(cached).parent if isinstance(cached, str) else None


def local_revision(folder: Path, revision: str) -> Path:
    """Return the path of a revision in a folder: the folder itself ("main"), a subfolder, or a Hub cache snapshot.

    Raises:
        FileNotFoundError: if the folder has no such revision; the message lists the available ones.
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
        return folder  # transformers reports which file is missing
    raise FileNotFoundError(_no_weights(str(folder), revision, kept))


def _has_weights(names: Iterable[str]) -> bool:
    return any(name.endswith(_WEIGHTS) and not name.startswith("training_args") for name in names)


def _other_revisions(client: HubFiles, name: str, revision: str) -> list[str]:
    """Return the other branches of a repository if this revision is missing or has no weights, otherwise []."""
    try:
        branches = [branch.name for branch in client.list_repo_refs(name).branches]
        if revision in branches and _has_weights(client.list_repo_files(name, revision=revision)):
            return []  # the revision has weights, so the error has another cause
    except Exception:  # noqa: BLE001 - the original error is more useful than one from this request
        return []
    return [branch for branch in branches if branch != revision]


def _no_weights(name: str, revision: str, others: list[str]) -> str:
    listed = ", ".join(sorted(others, key=lambda other: (len(other), other))) or "none"
    example = max(others, key=lambda other: (len(other), other), default="checkpoint-N")
    return (
        f"model {name!r}: expected weights at revision {revision!r}, got none; its revisions are {listed}; choose one, "
        f"such as `--revision {example}`"
    )


_NOT_REPRODUCIBLE = {
    "pissa_niter": "a randomised decomposition of the base weights, which differs each time; use 'pissa'",
    "corda": "activations of calibration data, which are not saved with the adapter",
    "loftq": "a quantised base model, which is not saved with the adapter",
}
"""Initialisations that change the base weights in a way that loading the adapter cannot reproduce, with the reason."""


def load_adapted(folder: Path, load_base: Callable[[str, str], Any], *, trainable: bool = False) -> Any:
    """Return a ``peft.PeftModel``: the base model named in a saved adapter's configuration, with the adapter.

    If the base model has another vocabulary size than the adapter, the base model is resized. For that, the adapter
    must contain all rows of both the input embeddings and the head (of one of them, if the two are tied).

    Args:
        folder: folder with adapter_config.json and the adapter's weights.
        load_base: function that loads a model by name and revision.
        trainable: whether the adapter is trained further; if not, no parameter requires a gradient.

    Raises:
        FileNotFoundError: if the base model cannot be loaded.
        ImportError: if peft is not installed.
        ValueError: if the adapter does not name its base model, belongs to another base model, or cannot be loaded as
            it was trained.
    """
    peft = import_peft()
    config = peft.PeftConfig.from_pretrained(str(folder))
    name, revision = config.base_model_name_or_path, config.revision or "main"
    if not name:
        raise ValueError(f"adapter {str(folder)!r}: expected base_model_name_or_path in adapter_config.json, got none")
    _check_reproducible(folder, config)
    try:
        base = load_base(name, revision)
    except OSError as error:
        raise FileNotFoundError(f"adapter {str(folder)!r}: its base model cannot be loaded: {error}") from error
    if base_of(base) is not base:
        raise ValueError(
            f"adapter {str(folder)!r}: expected a whole model as its base, got {name!r}, which is also an adapter; "
            "merge that adapter into its base model first (`--merge-adapter`, or peft's merge_and_unload)"
        )
    weights = peft.load_peft_weights(str(folder), device="cpu")
    _resize_vocabulary(folder, config, base, weights)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # _check_loaded raises for them
            model = peft.PeftModel.from_pretrained(base, str(folder), is_trainable=trainable, torch_device="cpu")
    except RuntimeError as error:  # torch raises it for different shapes
        listed = " ".join(str(error).split())
        raise ValueError(f"adapter {str(folder)!r} does not fit its base model {name!r}: {listed}") from error
    _check_loaded(folder, name, model, weights)
    if not trainable:
        model.requires_grad_(False)
    return model


def _check_reproducible(folder: Path, config: Any) -> None:
    init = getattr(config, "init_lora_weights", None)
    for known, reason in _NOT_REPRODUCIBLE.items():
        if isinstance(init, str) and init.startswith(known):
            raise ValueError(
                f"adapter {str(folder)!r} cannot be loaded: init_lora_weights={init!r} changed its base model by "
                f"{reason}. Save the merged model (peft's merge_and_unload), or convert the adapter while its model is "
                "still in memory (path_initial_model_for_weight_conversion of save_pretrained)"
            )


def _resize_vocabulary(folder: Path, config: Any, base: Any, weights: Mapping[str, Tensor]) -> None:
    """Resize the vocabulary of ``base`` to that of the adapter; raise ValueError if the adapter lacks rows for that."""
    layers = {"input embeddings": base.get_input_embeddings(), "head": base.get_output_embeddings()}
    paths = {part: path for path, module in base.named_modules() for part, layer in layers.items() if module is layer}
    held = {part: _ending(weights, f".{path}.weight", f".{path}.base_layer.weight") for part, path in paths.items()}
    rows = {len(weight) for weight in held.values() if weight is not None}
    own = layers["input embeddings"].weight.shape[0]
    if rows <= {own}:
        return
    tied = layers["head"] is None or layers["head"].weight is layers["input embeddings"].weight
    # A copy in modules_to_save is not tied, so the head still uses the base model's rows.
    copied = bool(getattr(config, "modules_to_save", None)) and not getattr(config, "ensure_weight_tying", False)
    missing = [] if tied and not copied else [part for part, weight in held.items() if weight is None]
    if len(rows) > 1 or missing:
        sizes = ", ".join(map(str, sorted(rows)))
        raise ValueError(
            f"adapter {str(folder)!r} has a vocabulary of {sizes} tokens, its base model "
            f"{config.base_model_name_or_path!r} has {own}, and the adapter does not contain the new rows of both the "
            f"input embeddings and the head (it lacks the {' and the '.join(missing) or 'same number of them'}); save "
            "them with the adapter (modules_to_save), or save the resized base model and train the adapter on that"
        )
    with torch.random.fork_rng(devices=[]):  # the random new rows are replaced by the adapter's
        base.resize_token_embeddings(rows.pop(), mean_resizing=False)


def _ending(weights: Mapping[str, Tensor], *endings: str) -> Tensor | None:
    return next((weight for key, weight in weights.items() if key.endswith(endings)), None)


def _check_loaded(folder: Path, name: str, model: Any, weights: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless the adapter of ``model`` equals the saved weights, bit for bit."""
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
        raise ValueError(f"adapter {str(folder)!r} does not fit its base model {name!r}: {'; '.join(found)}")
