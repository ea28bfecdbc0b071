"""A block that may train a model and leaves it as it was, bit for bit."""

import contextlib
import itertools
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from efface.hf.callbacks import undisturbed
from efface.hf.head import unfuse


@contextlib.contextmanager
def unchanged(model: PreTrainedModel) -> Iterator[None]:
    """Undo what the block does to weights, buffers, gradients, modes, attributes, the head's class and the attention.

    The random-number generators are afterwards what they were, too.

    Weights and buffers wait in main memory, once each, and are copied back into their place; nothing is written to
    disk. Whatever else holds them (tied weights, a wrapper) sees the old values again. Afterwards the model is as it
    was also if the block raises.
    """
    saved = [
        (tensor, tensor.detach().to("cpu", copy=True))
        for tensor in itertools.chain(model.parameters(), model.buffers())
    ]
    trained = [(weight, weight.requires_grad, weight.grad) for weight in model.parameters()]
    attributes, caching = set(vars(model)), getattr(model.config, "use_cache", None)
    own, attention, device = type(model), model.config._attn_implementation, model.device  # noqa: SLF001
    try:
        with undisturbed(model):
            yield
    finally:
        if type(model) is not own:
            unfuse(model, attention=None)
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
        for name in set(vars(model)) - attributes:  # such as accelerate's wrapper of `forward`
            delattr(model, name)
