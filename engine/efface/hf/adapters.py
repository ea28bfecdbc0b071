"""LoRA by peft: made, used as its own reference model, and merged. Without peft everything else works."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from efface.batching import TokenStore
from efface.hf.adapted_head import base_of, head_linears, import_peft
from efface.hf.callbacks import undisturbed
from efface.hf.live_reference import ModelReference
from efface.hf.second_adapter import SECOND, add_second, attach, is_second, linear_layers, without_second


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
    ranks that equals both; see ``second_adapter``.

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
            "it with efface.hf.loading.load_model, or peft.AutoPeftModelForCausalLM"
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
    ids = torch.arange(2 * _COMPARED, device=base.device).remainder(base.config.get_text_config().vocab_size)
    before = _logits(base, ids.view(2, -1))
    attach(base, lora_config(model, r=r))
    if not torch.equal(before, _logits(base, ids.view(2, -1))):
        kinds = ", ".join(sorted(str(config.peft_type) for config in base.peft_config.values()))
        raise ValueError(
            "a fresh LoRA adapter: expected the model to compute at first what it did without, got other logits: peft "
            f"cannot put one beside {kinds}; merge the model's own adapters first, or train all weights"
        )
    return model


@torch.no_grad()
def _logits(model: Any, ids: Tensor) -> Tensor:
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


class AdapterReference(ModelReference):
    """The reference model is the policy with the adapter that is trained switched off for a forward pass.

    It costs no second model. It is the model that the adapter was put on (with the first of two adapters on), so
    nothing but that adapter may be trained. ``check_start`` tells whether it is also the model that a run begins with.

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
        free = {name for name, weight in model.named_parameters() if weight.requires_grad}
        with self._switched_off():  # peft freezes what it switches off, and some versions free what lies under it
            trained = [name for name, weight in model.named_parameters() if weight.requires_grad and name in free]
        trained = [name for name in trained if not _ADAPTERS_OF_THEIR_OWN.intersection(name.split("."))]
        if trained:
            raise ValueError(
                f"reference 'adapter': expected a frozen base model, got one of which {trained[0]!r} is trained "
                f"({len(trained)} tensors), so that it would not stay the reference; freeze them (bias='none'), or use "
                "'cached' or 'live'"
            )

    @contextlib.contextmanager
    def running(self) -> Iterator[PreTrainedModel]:
        """Hand out the model without the adapter that is trained."""
        with self._switched_off():
            yield self._base

    def check_start(self, store: TokenStore) -> None:
        """Compare the reference with the policy as it is now, on the first two sequences of ``store``.

        Before the first step they have to be one model. They are not where an initialisation changed the base weights
        (PiSSA, OLoRA and the like), and where the adapter has been trained before; then "adapter" could mean two
        models. Does nothing for sharded models.

        Raises:
            ValueError: they differ, with the reason.
        """
        if any(weight.numel() == 0 or weight.is_meta for weight in self._model.parameters()):
            return
        configs = self._model.peft_config.values()
        for i in range(min(2, len(store))):
            ids = torch.from_numpy(store[i].astype("int64"))[None, :_COMPARED].to(self._model.device)
            policy = _logits(self._base, ids)
            with self._switched_off():
                reference = _logits(self._base, ids)
            apart = (policy - reference).abs().max().item()
            if all(map(_exact_at_first, configs)):
                # Nothing, unless the device's own sums come out otherwise each time.
                allowed = 0.0 if apart == 0 else 4 * (policy - _logits(self._base, ids)).abs().max().item()
            else:
                half = self._model.dtype in (torch.float16, torch.bfloat16)
                allowed = (_ROUNDING_HALF if half else _ROUNDING) * reference.abs().max().item()
            if not apart <= allowed:
                inits = [repr(getattr(config, "init_lora_weights", None)) for config in configs]
                raise ValueError(
                    "reference 'adapter': expected the model with its adapter switched off to be the model that this "
                    f"run begins with, got logits that differ by up to {apart:.3g}. Either the adapter's "
                    "initialisation changed the base weights or starts from noise (init_lora_weights="
                    f"{', '.join(inits)}), or the adapter has been trained before; so the reference could be either of "
                    "two models. For the model as it is now use 'cached', computed before the first step, or 'live', a "
                    "frozen copy; for its base model give that as the reference model of 'live' or 'cached'"
                )

    @contextlib.contextmanager
    def _switched_off(self) -> Iterator[None]:
        """Adapter and dropout off; afterwards every module's mode and every requires_grad is what it was.

        peft alone would leave trainable every adapter that it switches on again, those that were frozen among them.
        """
        modes = [(module, module.training) for module in self._model.modules()]
        trained = [(weight, weight.requires_grad) for weight in self._model.parameters()]
        self._model.eval()
        try:
            with without_second(self._model) if is_second(self._model) else self._model.disable_adapter():
                yield
        finally:
            for module, mode in modes:
                module.training = mode
            for weight, flag in trained:
                weight.requires_grad_(flag)


_ADAPTERS_OF_THEIR_OWN = {"modules_to_save", "token_adapter", SECOND}
"""Parts of the names of trainable weights that are switched off without being frozen."""

_COMPARED = 64
"""Tokens of a sequence on which the reference and the policy are compared."""

_ROUNDING, _ROUNDING_HALF = 1e-5, 0.06
"""Of the largest logit: what an adapter that multiplies by 1, or adds what it has subtracted, may change at first."""


def _exact_at_first(config: Any) -> bool:
    """Return whether a fresh adapter adds nothing but zeros: plain LoRA whose B is zero."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    plain = kind == "LORA" and not config.use_dora
    return plain and config.init_lora_weights in (True, "gaussian", "eva", "mica")
