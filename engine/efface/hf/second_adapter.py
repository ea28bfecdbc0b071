"""A second LoRA adapter on a model that has one: the first is frozen, and one adapter that equals both is saved.

The sum of two adapters, s1 B1 (A1 x) + s2 B2 (A2 x), is one adapter of the ranks' sum: s2 [B1 s1 / s2, B2] [A1; A2] x.
Nothing is merged into the base model, which in half precision would round a young adapter away.
"""

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn

from efface.hf.adapted_head import base_of, import_peft

FIRST, SECOND = "default", "second_lora"
_KINDS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Return peft's layers by name, the outermost ones."""
    tuner = import_peft().tuners.tuners_utils.BaseTunerLayer
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, tuner) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


def linear_layers(base: Any) -> list[str]:
    """Return the names of the linear layers but the head, as they were before there were adapters on them."""
    head, layers = base.get_output_embeddings(), adapted_layers(base)
    copied = import_peft().utils.other.AuxiliaryTrainingWrapper  # layers that are trained whole
    names: list[str] = []
    closed: list[str] = []
    for name, module in base.named_modules():
        if name.startswith(tuple(closed)):
            continue
        if module is head or name in layers or isinstance(module, copied):
            closed.append(f"{name}.")
        layer = module.get_base_layer() if name in layers else module
        if module is not head and not isinstance(module, copied) and _is_linear(layer):
            names.append(name)
    return names


def _is_linear(layer: Any) -> bool:
    return isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D" or "Linear" in type(layer).__name__


def attach(base: Any, config: Any, name: str = SECOND) -> None:
    """Put another adapter on a transformers model that has some; it alone is trained, all that were active stay so.

    Dropout of those that were there is switched off: they belong to the model that the run begins with.

    Raises:
        ValueError: a layer to adapt that the model has not.
    """
    for layer in adapted_layers(base).values():
        for module in layer.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    # peft makes the newest adapter the only active one, and switches off copies in modules_to_save with it.
    active = {module: module._active_adapter for module in base.modules() if "_active_adapter" in vars(module)}  # noqa: SLF001
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        import_peft().inject_adapter_in_model(config, base, adapter_name=name)
    for module, names in active.items():
        module._active_adapter = names  # noqa: SLF001
    for layer in adapted_layers(base).values():
        if any(name in getattr(layer, kind, ()) for kind in ("lora_A", "lora_embedding_A")):
            before = list(layer.active_adapters) if layer in active else []
            layer._active_adapter = [*before, name]  # noqa: SLF001
    for weight_name, weight in base.named_parameters():
        weight.requires_grad_(name in weight_name.split("."))


def check_second(model: Any, config: Any) -> None:
    """Raise ValueError unless the adapter of ``model`` and a second of ``config`` can be saved as one."""
    layers = adapted_layers(base_of(model))
    first = model.peft_config[FIRST] if set(model.peft_config) == {FIRST} else None
    reasons = {
        f"adapters named {', '.join(map(repr, model.peft_config))} instead of {FIRST!r}": first is None,
        "one that is switched off or merged": any(
            layer.disable_adapters or getattr(layer, "merged", False) for layer in layers.values()
        ),
        f"an adapter of kind {getattr(first, 'peft_type', None)}": getattr(first, "peft_type", "LORA") != "LORA",
        "a variant of LoRA (DoRA and the like)": any(
            getattr(layer, "lora_variant", None) or getattr(layer, "use_dora", {}).get(FIRST)
            for layer in layers.values()
        ),
        "whole layers of its own (modules_to_save)": bool(getattr(first, "modules_to_save", None)),
        "tokens of its own (trainable_token_indices)": bool(getattr(first, "trainable_token_indices", None)),
        "biases (bias, lora_bias)": getattr(first, "bias", "none") != "none" or getattr(first, "lora_bias", False),
        "layers used more than once (layer_replication)": bool(getattr(first, "layer_replication", None)),
        "parameters that are no layers (target_parameters)": bool(getattr(first, "target_parameters", None)),
        f"an initialisation that changed the base model ({getattr(first, 'init_lora_weights', None)!r})": str(
            getattr(first, "init_lora_weights", "")
        ).startswith(("pissa", "olora", "corda", "loftq")),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(
                f"a second LoRA adapter: expected a model with one plain LoRA adapter, got {reason}, which no single "
                "adapter on the same base can hold together with the second. Train the first one further (without "
                "lora_r), or save the first as a whole model (--merge_adapter) and begin with that"
            )
    if config.use_dora:
        raise ValueError("a second LoRA adapter: expected plain LoRA, got use_dora=True")


def add_second(model: Any, config: Any) -> Any:
    """Return ``model`` with a second adapter, which alone is trained; it is saved and read as one adapter with both.

    Args:
        model: a ``peft.PeftModel`` with one plain LoRA adapter; is changed in place.
        config: a ``peft.LoraConfig``.

    Raises:
        ValueError: a first adapter of another kind; a layer to adapt that the model has not.
    """
    check_second(model, config)
    attach(base_of(model), config)
    own = type(model)
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    model.__class__ = type(own.__name__, (_TwoAdapters, own), names)
    return model


def is_second(model: Any) -> bool:
    """Return whether ``add_second`` made the model."""
    return isinstance(model, _TwoAdapters)


@contextmanager
def without_second(model: Any) -> Iterator[None]:
    """Switch the second adapter off; what is trainable stays so."""
    active = {
        layer: list(layer.active_adapters)
        for layer in adapted_layers(base_of(model)).values()
        if SECOND in layer.active_adapters
    }
    try:
        for layer, names in active.items():
            layer._active_adapter = [name for name in names if name != SECOND]  # noqa: SLF001 - set_adapter sets free
        yield
    finally:
        for layer, names in active.items():
            layer._active_adapter = names  # noqa: SLF001


class _TwoAdapters:
    """Mixed in before a model's own class by ``add_second``."""

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        is_main_process: bool = True,
        **_: Any,
    ) -> None:
        """Write one adapter that equals both."""
        if not is_main_process:
            return
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        weights, config = combined(self, state_dict)
        save_torch_state_dict(
            weights, folder, filename_pattern="adapter_model{suffix}.safetensors", max_shard_size="1TB"
        )
        config.save_pretrained(str(folder))

    def load_adapter(self, model_id: str | Path, *_: Any, **__: Any) -> None:
        """Read the second adapter from what ``save_pretrained`` wrote, which is how a run is resumed."""
        saved = import_peft().load_peft_weights(str(model_id), device="cpu")
        expected, _config = combined(self, None)
        same = saved.keys() == expected.keys() and all(saved[key].shape == expected[key].shape for key in expected)
        parts = list(_parts(self)) if same else []
        for part in parts:
            a, b = (saved[key] for key in part.keys)
            ranks = len(a) - part.second
            same = same and torch.equal(a[:ranks], expected[part.keys[0]][:ranks])
            same = same and torch.equal(b[:, :ranks], expected[part.keys[1]][:, :ranks])
        if not same:
            raise ValueError(f"{str(model_id)!r}: expected an adapter that this run wrote, got one with another first")
        with torch.no_grad():
            for part in parts:
                if part.second:
                    a, b = (saved[key] for key in part.keys)
                    layer_a, layer_b = (_weight(part.layer, kind, SECOND) for kind in part.kinds)
                    layer_a.copy_(a[-part.second :])
                    layer_b.copy_(b[:, -part.second :])


class _Part:
    """What two adapters have at one layer, in the names of the saved adapter."""

    def __init__(self, name: str, layer: Any, kinds: tuple[str, str]) -> None:
        self.name, self.layer, self.kinds = name, layer, kinds
        ending = "" if kinds[0] == "lora_embedding_A" else ".weight"
        self.keys = tuple(f"base_model.model.{name}.{kind}{ending}" for kind in kinds)
        self.first, self.second = (
            layer.r[adapter] if adapter in getattr(layer, kinds[0]) else 0 for adapter in (FIRST, SECOND)
        )

    @property
    def scaling(self) -> float:
        return float(self.layer.scaling[SECOND if self.second else FIRST])


def _parts(model: Any) -> Iterator[_Part]:
    for name, layer in adapted_layers(base_of(model)).items():
        for kinds in _KINDS:
            part = _Part(name, layer, kinds)
            if part.first or part.second:
                yield part


def _weight(layer: Any, kind: str, adapter: str) -> Tensor:
    held = getattr(layer, kind)[adapter]
    weight: Tensor = held if isinstance(held, nn.Parameter) else held.weight
    return weight


def combined(model: Any, state_dict: Mapping[str, Tensor] | None) -> tuple[dict[str, Tensor], Any]:
    """Return the weights, on the CPU, and the configuration of one adapter that equals the two of ``model``.

    Args:
        model: what ``add_second`` returned.
        state_dict: of the model, where its own tensors are sharded; None is its own.
    """
    peft = import_peft()
    weights: dict[str, Tensor] = {}
    ranks, alphas = {}, {}
    for part in _parts(model):
        both = []
        for adapter in (FIRST, SECOND)[: None if part.second else 1]:
            if adapter == FIRST and not part.first:
                continue
            a, b = (_held(state_dict, part, kind, adapter) for kind in part.kinds)
            ratio = float(part.layer.scaling[adapter]) / part.scaling
            both.append((a, b if ratio == 1 else b * ratio))
        weights[part.keys[0]] = torch.cat([a for a, _ in both]).contiguous()
        weights[part.keys[1]] = torch.cat([b for _, b in both], 1).contiguous()
        ranks[part.name] = part.first + part.second
        alphas[part.name] = _alpha(part.scaling, ranks[part.name])
    first, second = model.peft_config[FIRST], model.peft_config[SECOND]
    common_rank, common_alpha = (max(set(v.values()), key=list(v.values()).count) for v in (ranks, alphas))
    config = peft.LoraConfig(
        task_type=first.task_type,
        base_model_name_or_path=first.base_model_name_or_path,
        revision=first.revision,
        r=common_rank,
        lora_alpha=common_alpha,
        lora_dropout=second.lora_dropout,
        fan_in_fan_out=first.fan_in_fan_out,
        target_modules=sorted(ranks),
        rank_pattern={f"^{name}": rank for name, rank in ranks.items() if rank != common_rank},
        alpha_pattern={f"^{name}": alpha for name, alpha in alphas.items() if alpha != common_alpha},
        inference_mode=True,
    )
    return weights, config


def _held(state_dict: Mapping[str, Tensor] | None, part: _Part, kind: str, adapter: str) -> Tensor:
    if state_dict is None:
        return _weight(part.layer, kind, adapter).detach().cpu()
    ending = "" if kind.startswith("lora_embedding") else ".weight"
    return state_dict[f"base_model.model.{part.name}.{kind}.{adapter}{ending}"].detach().cpu()


def _alpha(scaling: float, rank: int) -> float:
    """Return the lora_alpha that, divided by the rank, is the scaling to the last bit."""
    alpha = scaling * rank
    near = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return next((value for value in near if value / rank == scaling), alpha)
