"""What is found out before a run costs time: a missing package, nothing to train, gradients that do not arrive."""

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_BITSANDBYTES = ("bnb", "8bit", "paged", "ademamix", "lion")
"""Parts of the names of the optimizers that transformers takes from bitsandbytes; those of "torch" it does not."""


def check_optimizer(name: str) -> None:
    """Raise ImportError for an optimizer of bitsandbytes where that is not installed."""
    wanted = any(part in name for part in _BITSANDBYTES) and "torch" not in name
    if wanted and importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(
            f"--optim {name} needs the package bitsandbytes, which is not installed; pip install "
            "'efface[bitsandbytes]', or use adamw_torch_fused"
        )


def check_trainable(model: nn.Module) -> None:
    """Raise ValueError for a model of which nothing is to be trained."""
    if not any(weight.requires_grad for weight in model.parameters()):
        raise ValueError(
            f"{type(model).__name__}: expected parameters to train, got a frozen model; set requires_grad on those "
            "meant, or load its adapter with is_trainable=True"
        )


def check_loss(loss: Tensor) -> None:
    """Raise ValueError for a loss that no gradient can go back from."""
    if torch.is_grad_enabled() and not loss.requires_grad:
        raise ValueError(
            "the loss depends on no parameter that is trained, so nothing would be learnt: something cuts the graph "
            "between them. Reentrant gradient checkpointing over a frozen embedding does; call "
            "model.enable_input_require_grads() or set use_reentrant=False"
        )


def check_gradients(trained: Sequence[nn.Parameter]) -> None:
    """Raise ValueError if, after a backward pass, no trained parameter has a gradient but zero. Reads the device.

    One that is not finite counts: that is for the loss scaler, or for ``LossWatch``, to deal with.
    """
    gradients = [weight.grad for weight in trained if weight.grad is not None]
    if any(bool(gradient.any()) for gradient in gradients):
        return
    found = "all of them zero" if gradients else "none of them with a gradient"
    raise ValueError(
        f"the first step gives none of the {len(trained)} trained parameters anything to learn from ({found}), so the "
        "run stops. Either the loss is flat here (gamma and alpha 0, or an objective that is saturated), or something "
        "cuts the graph (detached activations, reentrant gradient checkpointing over a frozen embedding)"
    )


def prepare_checkpointing(model: Any, base: Any, args: Any) -> None:
    """Let gradients through checkpoints whose input nothing trained has touched, as with LoRA on a frozen model.

    Reentrant checkpointing, transformers 4's default, gives no gradient at all otherwise.
    """
    # transformers 5 has both names
    wanted = any(getattr(args, name, None) for name in ("gradient_checkpointing", "activation_checkpointing"))
    frozen = not any(weight.requires_grad for weight in base.get_input_embeddings().parameters())
    if wanted and frozen:
        model.enable_input_require_grads()
