"""LoRA by peft: made, put beside an adapter that is there, and merged. Without peft everything else works.

On a model with an adapter, that one is frozen, and what is saved is one adapter that equals both: the sum
s1 B1 (A1 x) + s2 B2 (A2 x) is s2 [B1 s1 / s2, B2] [A1; A2] x, an adapter of the ranks' sum. Nothing is merged into the
base model, which in half precision would round a young adapter away.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel

from efface.hf.model.adapted_head import base_of, head_linears, import_peft
from efface.hf.model.supported import undisturbed

COMPARED_TOKENS = 64
"""Tokens of a sequence on which the reference and the policy are compared."""

FIRST, SECOND = "default", "second_lora"
_KINDS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))


def add_lora(
    model: Any,
    *,
    r: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    target: Sequence[str] = (),
    revision: str | None = None,
) -> Any:
    """Return ``model`` within a ``peft.PeftModel`` with a fresh LoRA adapter; at the start it computes what it did.

    A model with an adapter keeps it, frozen, under the fresh one, and ``save_pretrained`` writes one adapter of both
    ranks that equals both.

    Args:
        model: a transformers model, or a ``peft.PeftModel`` with one plain LoRA adapter; is changed in place.
        r: rank.
        alpha: the adapter counts alpha / r; None is 2 r.
        dropout: of what enters the adapter.
        target: names of layers; none, or "all-linear", is every linear layer but the head.
        revision: of the base model on the Hub, for whoever reads the saved adapter.

    Raises:
        ImportError: without peft, with the command that installs it.
        ValueError: a rank below 1, a dropout outside 0 .. 1, a target that the model has not, an adapter of another
            kind on it.
    """
    config = lora_config(model, r=r, alpha=alpha, dropout=dropout, target=target, revision=revision)
    if base_of(model) is not model:
        return add_second(model, config)
    if getattr(model, "peft_config", None):  # transformers has put the adapter into the model itself
        raise ValueError(
            "a second LoRA adapter: expected a peft.PeftModel, got a transformers model with an adapter inside; load "
            "it with efface.hf.model.loading.load_model, or peft.AutoPeftModelForCausalLM"
        )
    return import_peft().get_peft_model(model, config)


def lora_config(
    model: Any,
    *,
    r: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    target: Sequence[str] = (),
    revision: str | None = None,
) -> Any:
    """Return the ``peft.LoraConfig`` that ``add_lora`` takes; arguments and errors are its."""
    peft = import_peft()
    if r < 1:
        raise ValueError(f"`lora_r`: expected at least 1, got {r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"`lora_dropout`: expected 0 .. 1, got {dropout}")
    targets: Any = list(target)
    if targets in ([], ["all-linear"]):
        # peft would take the parts of adapters that are there for linear layers of the model.
        targets = linear_layers(base_of(model)) if getattr(model, "peft_config", None) else "all-linear"
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=2 * r if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=targets,
        revision=revision,
    )


def with_fresh_lora(model: Any, *, r: int) -> Any:
    """Return a model to train that is ``model`` with a fresh adapter, which alone is trained, beside any it has.

    For a model that is put back afterwards, not saved, so that what there is may be of any kind. ``model`` is changed
    in place.

    Raises:
        ImportError: without peft.
        ValueError: a rank below 1; a model that does not compute with the fresh adapter what it did.
    """
    base = base_of(model)
    if not getattr(base, "peft_config", None):
        return add_lora(model, r=r)
    ids = torch.arange(2 * COMPARED_TOKENS, device=base.device).remainder(base.config.get_text_config().vocab_size)
    before = logits_of(base, ids.view(2, -1))
    attach(base, lora_config(model, r=r))
    if not torch.equal(before, logits_of(base, ids.view(2, -1))):
        kinds = ", ".join(sorted(str(config.peft_type) for config in base.peft_config.values()))
        raise ValueError(
            "a fresh LoRA adapter: expected the model to compute at first what it did without, got other logits: peft "
            f"cannot put one beside {kinds}; merge the model's own adapters first, or train all weights"
        )
    return model


@torch.no_grad()
def logits_of(model: Any, ids: Tensor) -> Tensor:
    """Return the float32 logits (B, T, V) of ``ids`` (B, T), in evaluation mode; the model is left as it was."""
    with undisturbed(model):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.float()


def check_mergeable(model: Any) -> None:
    """Raise ValueError unless ``merge_and_unload`` gives the model that was trained."""
    base = base_of(model)
    if base is model:
        raise ValueError("merging: expected a model with adapters, got one without; give lora_r")
    head, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    adapted = any(hasattr(layer, "base_layer") for layer in (head, embeddings))
    weights = head_linears(head)[0].weight, getattr(embeddings, "base_layer", embeddings).weight
    if adapted and weights[0] is weights[1]:
        raise ValueError(
            "merging: lm_head and the input embeddings share one weight, and an adapter on one of them would change "
            "both; leave them out of lora_target, or keep the adapter apart"
        )


def merged(model: Any) -> PreTrainedModel:
    """Return the transformers model with the adapters of ``model`` added to its weights; ``model`` is used up."""
    check_mergeable(model)
    base: PreTrainedModel = model.merge_and_unload()
    return base


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
                "lora_r), or save the first as a whole model (--merge-adapter) and begin with that"
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
