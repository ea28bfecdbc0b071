"""LoRA by peft: made, used as its own reference model, and merged. Without peft everything else works."""

import contextlib
import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedModel

from efface.hf.adapted_head import base_of, head_linears
from efface.hf.live_reference import ModelReference


def add_lora(
    model: PreTrainedModel, *, r: int, alpha: float | None = None, dropout: float = 0.0, target: Sequence[str] = ()
) -> Any:
    """Return ``model`` within a ``peft.PeftModel`` with a fresh LoRA adapter; at the start it computes what it did.

    Args:
        model: is changed in place.
        r: rank.
        alpha: the adapter counts alpha / r; None is 2 r.
        dropout: of what enters the adapter.
        target: names of layers; none, or "all-linear", is every linear layer but the head.

    Raises:
        ImportError: without peft, with the command that installs it.
        ValueError: a rank below 1, a dropout outside 0 .. 1, a target that the model has not.
    """
    peft = _peft()
    if r < 1:
        raise ValueError(f"`lora_r`: expected at least 1, got {r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"`lora_dropout`: expected 0 .. 1, got {dropout}")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=2 * r if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules="all-linear" if list(target) in ([], ["all-linear"]) else list(target),
    )
    return peft.get_peft_model(model, config)


def _peft() -> Any:
    if importlib.util.find_spec("peft") is None:
        raise ImportError("LoRA needs the package peft, which is not installed; pip install 'efface[lora]'")
    return importlib.import_module("peft")


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


class AdapterReference(ModelReference):
    """The reference model is the policy's base model: its adapters are switched off for a forward pass.

    It costs no second model. It is the model that the adapters were put on, so nothing but adapters may be trained.

    Raises:
        ValueError: a model without adapters, or one whose base is trained too.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._base = base_of(model)
        if self._base is model:
            raise ValueError(
                "reference 'adapter' is the base model with its adapters switched off: expected a peft.PeftModel, got "
                f"{type(model).__name__}; give it LoRA (--lora_r 8, or peft.get_peft_model), or use 'cached' or 'live'"
            )
        with self._as_base():
            trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
        trained = [name for name in trained if not any(part in name for part in _ADAPTERS_OF_THEIR_OWN)]
        if trained:
            raise ValueError(
                f"reference 'adapter': expected a frozen base model, got one of which {trained[0]!r} is trained "
                f"({len(trained)} tensors), so that it would not stay the reference; freeze them (bias='none'), or use "
                "'cached' or 'live'"
            )

    @contextlib.contextmanager
    def running(self) -> Iterator[PreTrainedModel]:
        """Hand out the base model."""
        with self._as_base():
            yield self._base

    @contextlib.contextmanager
    def _as_base(self) -> Iterator[None]:
        """Adapters and dropout off; afterwards every module's mode and every requires_grad is what it was.

        peft alone would leave trainable every adapter that it switches on again, those that were frozen among them.
        """
        modes = [(module, module.training) for module in self._model.modules()]
        trained = [(weight, weight.requires_grad) for weight in self._model.parameters()]
        self._model.eval()
        try:
            with self._model.disable_adapter():
                yield
        finally:
            for module, mode in modes:
                module.training = mode
            for weight, flag in trained:
                weight.requires_grad_(flag)


_ADAPTERS_OF_THEIR_OWN = (".modules_to_save.", ".token_adapter.")
"""Trainable copies that peft switches off without freezing them."""
