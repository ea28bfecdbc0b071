"""LoRA with peft: creating adapters, adding a second adapter to a model that has one, and merging.

The rest of efface works without peft. If a model already has an adapter, that adapter is frozen, and saving writes one
adapter that equals both: the sum s1 B1 (A1 x) + s2 B2 (A2 x) is s2 [B1 s1 / s2, B2] [A1; A2] x, an adapter whose rank
is the sum of the two ranks. The first adapter is not merged into the base model, because in half precision rounding
would remove the small changes of a newly trained adapter.
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
"""Number of tokens per sequence on which reference and policy are compared."""

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
    """Add a fresh LoRA adapter to ``model`` and return the ``peft.PeftModel``; its outputs do not change at first.

    If the model already has an adapter, that adapter stays active and is frozen. ``save_pretrained`` then writes one
    adapter that equals both, with the sum of their ranks.

    Args:
        model: a transformers model, or a ``peft.PeftModel`` with one plain LoRA adapter; changed in place.
        r: rank of the adapter.
        alpha: LoRA's alpha, so that the adapter's output is scaled by alpha / r; None is 2 r.
        dropout: probability of dropout on the adapter's input.
        target: names of the layers to adapt; empty or "all-linear" adapts every linear layer except the head.
        revision: revision of the base model on the Hub, stored in the saved adapter for later loading.

    Raises:
        ImportError: if peft is not installed; the message gives the command that installs it.
        ValueError: if the rank is below 1, the dropout is not in 0 .. 1, the model has no such target, or the model has
            an adapter of another kind.
    """
    config = lora_config(model, r=r, alpha=alpha, dropout=dropout, target=target, revision=revision)
    if base_of(model) is not model:
        return add_second(model, config)
    if getattr(model, "peft_config", None):  # transformers has put the adapter into the model itself
        raise ValueError(
            "a second LoRA adapter: expected a peft.PeftModel, got a transformers model with a built-in adapter; load "
            "it with efface.hf.model.loading.load_model or peft.AutoPeftModelForCausalLM"
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
    """Return the ``peft.LoraConfig`` that ``add_lora`` uses; arguments and errors are those of ``add_lora``."""
    peft = import_peft()
    if r < 1:
        raise ValueError(f"`lora_r`: expected at least 1, got {r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"`lora_dropout`: expected 0 .. 1 (excluding 1), got {dropout}")
    targets: Any = list(target)
    if targets in ([], ["all-linear"]):
        # With "all-linear", peft would also adapt the linear layers inside existing adapters.
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
    """Add a fresh adapter, the only trained one, in addition to any adapters that ``model`` has, and return the model.

    ``model`` is changed in place. The function is for models that are restored afterwards and not saved, so the
    existing adapters can be of any kind.

    Raises:
        ImportError: if peft is not installed.
        ValueError: if the rank is below 1, or the fresh adapter changes the outputs of the model.
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
            "a fresh LoRA adapter: expected it to leave the model's logits unchanged, got other logits: peft cannot "
            f"combine it with {kinds}; merge the model's own adapters first, or train all weights"
        )
    return model


@torch.no_grad()
def logits_of(model: Any, ids: Tensor) -> Tensor:
    """Return the float32 logits (B, T, V) of ``ids`` (B, T), in evaluation mode; the model's modes are restored."""
    with undisturbed(model):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.float()


def check_mergeable(model: Any) -> None:
    """Raise ValueError if ``model`` has no adapters, or if merging them would change tied weights."""
    base = base_of(model)
    if base is model:
        raise ValueError("merging: expected a model with adapters, got one without; set lora_r to train an adapter")
    head, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    adapted = any(hasattr(layer, "base_layer") for layer in (head, embeddings))
    weights = head_linears(head)[0].weight, getattr(embeddings, "base_layer", embeddings).weight
    if adapted and weights[0] is weights[1]:
        raise ValueError(
            "merging: lm_head and the input embeddings share one weight, so merging an adapter on one of them would "
            "change both; leave them out of lora_target, or do not merge the adapter"
        )


def merged(model: Any) -> PreTrainedModel:
    """Merge the adapters of ``model`` into its weights and return the transformers model; do not use ``model`` again.

    Raises:
        ValueError: if the adapters cannot be merged; see ``check_mergeable``.
    """
    check_mergeable(model)
    base: PreTrainedModel = model.merge_and_unload()
    return base


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers that peft has wrapped, by name; layers inside another wrapped layer are left out."""
    tuner = import_peft().tuners.tuners_utils.BaseTunerLayer
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, tuner) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


def linear_layers(base: Any) -> list[str]:
    """Return the names of the model's own linear layers except the head, without the layers inside adapters."""
    head, layers = base.get_output_embeddings(), adapted_layers(base)
    copied = import_peft().utils.other.AuxiliaryTrainingWrapper  # layers of which peft trains a full copy
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
    """Add an adapter to a transformers model that has adapters; only the new one is trained, active ones stay active.

    Dropout in the existing adapters is switched off, because they are part of the model with which the run begins.

    Raises:
        ValueError: if the model has no layer that the config names.
    """
    for layer in adapted_layers(base).values():
        for module in layer.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    # peft makes the newest adapter the only active one, which also switches off the copies in modules_to_save.
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
    """Raise ValueError unless the adapter of ``model`` and a second one with ``config`` can be saved as one adapter."""
    layers = adapted_layers(base_of(model))
    first = model.peft_config[FIRST] if set(model.peft_config) == {FIRST} else None
    reasons = {
        f"adapters named {', '.join(map(repr, model.peft_config))} instead of {FIRST!r}": first is None,
        "an adapter that is switched off or merged": any(
            layer.disable_adapters or getattr(layer, "merged", False) for layer in layers.values()
        ),
        f"an adapter of kind {getattr(first, 'peft_type', None)}": getattr(first, "peft_type", "LORA") != "LORA",
        "a variant of LoRA (such as DoRA)": any(
            getattr(layer, "lora_variant", None) or getattr(layer, "use_dora", {}).get(FIRST)
            for layer in layers.values()
        ),
        "an adapter with whole layers (modules_to_save)": bool(getattr(first, "modules_to_save", None)),
        "an adapter with trained tokens (trainable_token_indices)": bool(
            getattr(first, "trainable_token_indices", None)
        ),
        "an adapter with biases (bias, lora_bias)": getattr(first, "bias", "none") != "none"
        or getattr(first, "lora_bias", False),
        "an adapter with repeated layers (layer_replication)": bool(getattr(first, "layer_replication", None)),
        "an adapter on single parameters (target_parameters)": bool(getattr(first, "target_parameters", None)),
        f"an initialisation that changed the base model ({getattr(first, 'init_lora_weights', None)!r})": str(
            getattr(first, "init_lora_weights", "")
        ).startswith(("pissa", "olora", "corda", "loftq")),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(
                f"a second LoRA adapter: expected a model with one plain LoRA adapter, got {reason}, which cannot be "
                "saved together with a second adapter as one adapter; train the first adapter further (without "
                "lora_r), or merge it into a whole model (--merge-adapter) and start from that"
            )
    if config.use_dora:
        raise ValueError("a second LoRA adapter: expected plain LoRA, got use_dora=True")


def add_second(model: Any, config: Any) -> Any:
    """Add a second adapter, the only trained one, and return ``model``; both are saved and loaded as one adapter.

    Args:
        model: a ``peft.PeftModel`` with one plain LoRA adapter; changed in place.
        config: a ``peft.LoraConfig`` for the second adapter.

    Raises:
        ValueError: if the first adapter is of another kind, or the model has no layer that the config names.
    """
    check_second(model, config)
    attach(base_of(model), config)
    own = type(model)
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    model.__class__ = type(own.__name__, (_TwoAdapters, own), names)
    return model


def is_second(model: Any) -> bool:
    """Return whether ``model`` has a second adapter from ``add_second``."""
    return isinstance(model, _TwoAdapters)


@contextmanager
def without_second(model: Any) -> Iterator[None]:
    """Switch the second adapter off while the block runs; every ``requires_grad`` keeps its value."""
    active = {
        layer: list(layer.active_adapters)
        for layer in adapted_layers(base_of(model)).values()
        if SECOND in layer.active_adapters
    }
    try:
        for layer, names in active.items():
            # set_adapter would make the adapters that it activates trainable.
            layer._active_adapter = [name for name in names if name != SECOND]  # noqa: SLF001
        yield
    finally:
        for layer, names in active.items():
            layer._active_adapter = names  # noqa: SLF001


class _TwoAdapters:
    """Mixin that ``add_second`` puts before the model's own class; saves and loads both adapters as one."""

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        is_main_process: bool = True,
        **_: Any,
    ) -> None:
        """Write one adapter that equals the sum of both."""
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
        """Load the second adapter from a folder that ``save_pretrained`` wrote, to resume a run.

        Raises:
            ValueError: if the folder contains another first adapter than the model.
        """
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
            raise ValueError(
                f"{str(model_id)!r}: expected an adapter that this run wrote, got one whose first adapter differs"
            )
        with torch.no_grad():
            for part in parts:
                if part.second:
                    a, b = (saved[key] for key in part.keys)
                    layer_a, layer_b = (_weight(part.layer, kind, SECOND) for kind in part.kinds)
                    layer_a.copy_(a[-part.second :])
                    layer_b.copy_(b[:, -part.second :])


class _Part:
    """The two adapters' ranks at one layer, and the keys of their combined weights in the saved adapter."""

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
    """Return the weights (on the CPU) and the configuration of one adapter that equals both adapters of ``model``.

    Args:
        model: a model from ``add_second``.
        state_dict: full state dict of the model, for a model whose own tensors are sharded; None reads the model's.
    """
    peft = import_peft()
    weights: dict[str, Tensor] = {}
    ranks, alphas = {}, {}
    for part in _parts(model):
        both = []
        for adapter in (FIRST, SECOND)[: None if part.second else 1]:
            if adapter == FIRST and not part.first:
                continue
            a, b = (_on_cpu(state_dict, part, kind, adapter) for kind in part.kinds)
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


def _on_cpu(state_dict: Mapping[str, Tensor] | None, part: _Part, kind: str, adapter: str) -> Tensor:
    if state_dict is None:
        return _weight(part.layer, kind, adapter).detach().cpu()
    ending = "" if kind.startswith("lora_embedding") else ".weight"
    return state_dict[f"base_model.model.{part.name}.{kind}.{adapter}{ending}"].detach().cpu()


def _alpha(scaling: float, rank: int) -> float:
    """Return the lora_alpha that, divided by the rank, gives the scaling bit for bit, if there is one."""
    alpha = scaling * rank
    near = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return next((value for value in near if value / rank == scaling), alpha)
