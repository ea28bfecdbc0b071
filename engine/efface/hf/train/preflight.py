"""What is found out before a run costs time: a missing package, nothing to train, gradients that do not arrive."""

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
"""Parts of the names of the optimizers that transformers takes from bitsandbytes; those of "torch" it does not."""

_OR_FILES = ("accelerator_config", "fsdp_config", "deepspeed")
"""Arguments that hold JSON, or the path of a file of it."""

_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("seed", "data_seed"), (0, 2**32)),  # NumPy's
    "chunk_rows": (1, 2**31),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (0, 1)),
    **dict.fromkeys(("adam_epsilon", "learning_rate", "warmup_epochs", "weight_decay"), (0, math.inf)),
}
"""Arguments whose wrong numbers would be found when a run has begun: the least, and what they are less than."""


def check_numbers(args: Any) -> None:
    """Raise TypeError for an argument that is to be a number and is none; a whole float becomes an int."""
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
    """Raise ValueError for a number that its argument cannot have."""
    for name, (least, end) in _RANGES.items():
        value = getattr(args, name)
        if value is not None and not least <= value < end:
            expected = f"less than {end}" if value >= end else f"at least {least}"
            raise ValueError(f"`{name}`: expected {expected}, got {value}")


def check_optimizer(name: str) -> None:
    """Raise ImportError for an optimizer of bitsandbytes where that is not installed."""
    wanted = any(part in name for part in _BITSANDBYTES) and "torch" not in name
    if wanted:
        check_extras(f"--optim {name}", "bitsandbytes", remedy="use adamw_torch_fused")


def check_reporters(names: Sequence[str]) -> None:
    """Raise ImportError for a tracker whose package is not installed, ValueError for one that transformers has not."""
    for name, callback in zip(names, get_reporting_integration_callbacks(list(names)), strict=True):
        try:
            callback()
        except (ImportError, RuntimeError) as error:  # noqa: PERF203 - there is one, if any
            raise ImportError(f"--report-to {name}: {str(error).rstrip('.')}, or leave the flag out") from error


def check_texts(args: Any) -> None:
    """Raise ValueError for JSON and pairs that cannot be read; transformers looks when it is about to train."""
    for name in args._VALID_DICT_FIELDS:  # noqa: SLF001 - transformers lists them nowhere else
        text, remedy = getattr(args, name, None), 'write it as {"name": value}'
        if not isinstance(text, str) or (name in _OR_FILES and not text.startswith("{")):
            continue
        with reading(f"`{name}`", "a JSON object", remedy):
            content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError(f"`{name}`: expected a JSON object, got {text!r}; {remedy}")  # noqa: TRY004 - words of a command line are values
    pairs = [pair for pair in (args.optim_args or "").replace(" ", "").split(",") if pair]
    if wrong := [pair for pair in pairs if pair.count("=") != 1]:
        raise ValueError(f"`optim_args`: expected name=value[,name=value], got {wrong[0]!r}")


def check_trainable(model: nn.Module) -> None:
    """Raise ValueError for a model of which nothing is to be trained."""
    if not any(weight.requires_grad for weight in model.parameters()):
        raise ValueError(
            f"{type(model).__name__}: expected parameters to train, got a frozen model; set requires_grad on those "
            "meant, or load its adapter with is_trainable=True"
        )


def check_schedule(scheduler: Any, steps: int) -> None:
    """Raise ValueError for a learning rate that is 0 at every one of the steps."""
    if isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        rates = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        learns = any(rate != 0 and factor(step) != 0 for rate, factor in rates for step in range(steps))
    else:
        groups = getattr(getattr(scheduler, "optimizer", None), "param_groups", None)
        learns = groups is None or any(group["lr"] != 0 or group.get("initial_lr", 0) != 0 for group in groups)
    if not learns:
        raise ValueError(
            f"expected a learning rate above 0, got one that is 0 at every step of the run ({steps}), which would "
            "leave the model as it was; set learning_rate, and a warm-up (warmup_steps, warmup_epochs) shorter than "
            "the run"
        )


def check_loss(loss: Tensor) -> None:
    """Raise ValueError for a loss that no gradient can go back from."""
    if torch.is_grad_enabled() and not loss.requires_grad:
        raise ValueError(
            "the loss depends on no parameter that is trained, so nothing would be learnt: something cuts the graph "
            "between them. Reentrant gradient checkpointing over a frozen embedding does; call "
            "model.enable_input_require_grads() or set use_reentrant=False"
        )


@torch.no_grad()
def check_weights(model: nn.Module, step: int) -> None:
    """Raise FloatingPointError if a trained parameter is NaN or infinite after ``step``. Reads the device once."""
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
