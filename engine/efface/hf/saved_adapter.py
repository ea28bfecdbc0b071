"""A saved adapter, read back onto its base model: exactly as it was trained, or not at all."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from efface.hf.adapted_head import base_of, import_peft

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
            "merge that into its own base first (`--merge_adapter`, or peft's merge_and_unload)"
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
