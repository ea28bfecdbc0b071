"""A block that may train a model and leaves it as it was, bit for bit."""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from efface.hf.callbacks import undisturbed


@contextlib.contextmanager
def unchanged(model: PreTrainedModel) -> Iterator[None]:
    """Undo what the block does to weights, buffers, gradients, modes, attributes, classes, layers and the attention.

    The random-number generators are afterwards what they were, too.

    Weights and buffers wait in main memory, once each, and are copied back into their place; nothing is written to
    disk. Whatever else holds them (tied weights, a wrapper) sees the old values again. Adapters that the block adds are
    gone afterwards, and those that were there are what they were, down to which are active. Afterwards the model is as
    it was also if the block raises.
    """
    saved = [
        (tensor, tensor.detach().to("cpu", copy=True))
        for tensor in itertools.chain(model.parameters(), model.buffers())
    ]
    trained = [(weight, weight.requires_grad, weight.grad) for weight in model.parameters()]
    modules = [(module, type(module), _contents(vars(module))) for module in model.modules()]
    caching = getattr(model.config, "use_cache", None)
    attention, device = model.config._attn_implementation, model.device  # noqa: SLF001
    try:
        with undisturbed(model):
            yield
    finally:
        for module, own, attributes in modules:
            module.__class__ = own
            _restore(vars(module), attributes)
        model.set_attn_implementation(attention)
        if caching is not None:  # a Trainer switches it off
            model.config.use_cache = caching
        model.to(device)  # type: ignore[arg-type]
        with torch.no_grad():
            for tensor, before in saved:
                tensor.copy_(before)
        for weight, flag, grad in trained:
            weight.requires_grad_(flag)
            weight.grad = grad


def _contents(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return a module's attributes, each with a copy of what it holds if it is a dict, a list or a set."""
    return {
        name: (value, value.copy() if isinstance(value, (dict, list, set)) else None)
        for name, value in attributes.items()
    }


def _restore(attributes: dict[str, Any], before: dict[str, Any]) -> None:
    """Undo every change, within containers too, which others may hold as well."""
    attributes.clear()
    for name, (value, held) in before.items():
        attributes[name] = value
        if isinstance(value, list):
            value[:] = held
        elif isinstance(value, (dict, set)):
            value.clear()
            value.update(held)
