"""Preflight checks of a run: argument values, missing packages, frozen models, and losses without a gradient."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import fields
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from efface.errors import reading
from efface.extras import check_extras

_BITSANDBYTES = ("bnb", "8bit", "paged", "ademamix", "lion")
"""Parts of the names of optimizers that transformers takes from bitsandbytes, unless the name contains "torch"."""

_OR_FILES = ("accelerator_config", "fsdp_config", "deepspeed")
"""Arguments that are JSON or the path of a JSON file."""

_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("seed", "data_seed"), (0, 2**32)),  # NumPy's
    "chunk_rows": (1, 2**31),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (0, 1)),
    **dict.fromkeys(("adam_epsilon", "learning_rate", "warmup_epochs", "weight_decay"), (0, math.inf)),
}
"""Arguments that transformers does not check before training: minimum (inclusive) and maximum (exclusive)."""


def check_numbers(args: Any) -> None:
    """Raise TypeError for a numeric argument that is not a number; convert integral floats to int where required."""
    for one in fields(args):
        kinds = set(re.findall(r"\w+", str(one.type))) - {"typing", "Optional", "Union", "class"}
        optional, value = kinds & {"None", "NoneType"}, getattr(args, one.name)
        if value == one.default or not kinds - optional or not kinds - optional <= {"int", "float"}:
            continue
        if value is None and optional:
            continue
        whole = "float" not in kinds
        if not isinstance(value, Real) or (whole and not float(value).is_integer()):
            raise TypeError(f"`{one.name}`: expected a {'whole ' if whole else ''}number, got {value!r}")
        if whole:
            setattr(args, one.name, value if isinstance(value, int) else int(float(value)))


def check_ranges(args: Any) -> None:
    """Raise ValueError for a number outside the range of its argument."""
    for name, (least, end) in _RANGES.items():
        value = getattr(args, name)
        if value is not None and not least <= value < end:
            expected = f"less than {end}" if value >= end else f"at least {least}"
            raise ValueError(f"`{name}`: expected {expected}, got {value}")


def check_optimizer(name: str) -> None:
    """Raise ImportError if the optimizer needs bitsandbytes, which is not installed."""
    wanted = any(part in name for part in _BITSANDBYTES) and "torch" not in name
    if wanted:
        check_extras(f"--optim {name}", "bitsandbytes", remedy="use adamw_torch_fused")


def check_reporters(names: Sequence[str]) -> None:
    """Raise ImportError if a tracker's package is not installed, and ValueError if transformers has no such tracker."""
    for name, callback in zip(names, get_reporting_integration_callbacks(list(names)), strict=True):
        try:
            callback()
        except (ImportError, RuntimeError) as error:  # noqa: PERF203 - the list has one entry, if any
            raise ImportError(f"--report-to {name}: {str(error).rstrip('.')}, or leave the flag out") from error


def check_texts(args: Any) -> None:
    """Raise ValueError for invalid JSON or name=value pairs, which transformers checks only when training starts."""
    for name in args._VALID_DICT_FIELDS:  # noqa: SLF001 - transformers lists them nowhere else
        text, remedy = getattr(args, name, None), 'write it as {"name": value}'
        if not isinstance(text, str) or (name in _OR_FILES and not text.startswith("{")):
            continue
        with reading(f"`{name}`", "a JSON object", remedy):
            content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError(f"`{name}`: expected a JSON object, got {text!r}; {remedy}")  # noqa: TRY004 - text of a command line
    pairs = [pair for pair in (args.optim_args or "").replace(" ", "").split(",") if pair]
    if wrong := [pair for pair in pairs if pair.count("=") != 1]:
        raise ValueError(f"`optim_args`: expected name=value[,name=value], got {wrong[0]!r}; correct it")


def check_trainable(model: nn.Module) -> None:
    """Raise ValueError if no parameter of the model requires a gradient."""
    if not any(weight.requires_grad for weight in model.parameters()):
        raise ValueError(
            f"{type(model).__name__}: expected trainable parameters, got a frozen model; set requires_grad on the "
            "parameters to train, or load the adapter with is_trainable=True"
        )


def check_schedule(scheduler: Any, steps: int) -> None:
    """Raise ValueError if the learning rate is 0 at every step."""
    if isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        rates = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        learns = any(rate != 0 and factor(step) != 0 for rate, factor in rates for step in range(steps))
    else:
        groups = getattr(getattr(scheduler, "optimizer", None), "param_groups", None)
        learns = groups is None or any(group["lr"] != 0 or group.get("initial_lr", 0) != 0 for group in groups)
    if not learns:
        raise ValueError(
            f"`learning_rate`: expected a learning rate above 0, got 0 at each of the {steps} steps, which would leave "
            "the model unchanged; set learning_rate, and a warm-up (warmup_steps, warmup_epochs) shorter than the run"
        )


def check_loss(loss: Tensor) -> None:
    """Raise ValueError if the loss does not require a gradient."""
    if torch.is_grad_enabled() and not loss.requires_grad:
        raise ValueError(
            "the loss does not depend on any trained parameter, so nothing would be trained: the autograd graph "
            "between them is cut, for example by reentrant gradient checkpointing over a frozen embedding. Call "
            "model.enable_input_require_grads() or set use_reentrant=False"
        )


@torch.no_grad()
def check_weights(model: nn.Module, step: int) -> None:
    """Raise FloatingPointError if a trained parameter is NaN or infinite after ``step``.

    Synchronises the device once.
    """
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad and weight.numel()]
    if not trained:
        return
    finite = torch.stack([weight.isfinite().all().to(trained[0][1].device) for _, weight in trained]).tolist()
    if not all(finite):
        raise FloatingPointError(
            f"the weights are not finite after step {step} ({trained[finite.index(False)][0]}), so the run stops; they "
            "were not saved. Try a lower --learning-rate, gradient clipping (--max-grad-norm 1.0), or --bf16 instead "
            "of --fp16"
        )


def check_gradients(trained: Sequence[nn.Parameter]) -> None:
    """Raise ValueError if no trained parameter has a nonzero gradient after a backward pass.

    Synchronises the device. A gradient that is not finite counts as nonzero; the loss scaler or ``LossWatch`` handles
    it.
    """
    gradients = [weight.grad for weight in trained if weight.grad is not None]
    if any(bool(gradient.any()) for gradient in gradients):
        return
    found = "all gradients are zero" if gradients else "no parameter has a gradient"
    raise ValueError(
        f"expected a gradient for some of the {len(trained)} trained parameters after the first step, got none "
        f"({found}), so the run stops. Either the loss is constant here (gamma and alpha 0, or a saturated objective), "
        "or the autograd graph is cut (detached activations, reentrant gradient checkpointing over a frozen embedding)"
    )


def prepare_checkpointing(model: Any, base: Any, args: Any) -> None:
    """Make checkpointing work over a frozen embedding, as with LoRA on a frozen model.

    Reentrant checkpointing, the default of transformers 4, gives no gradient if its input requires none.
    """
    # transformers 5 has both names.
    wanted = any(getattr(args, name, None) for name in ("gradient_checkpointing", "activation_checkpointing"))
    frozen = not any(weight.requires_grad for weight in base.get_input_embeddings().parameters())
    if wanted and frozen:
        model.enable_input_require_grads()
