"""A ``forward`` on the instance, which hides that of the class: what others put there, and what ``fuse`` does.

accelerate puts mixed precision and the moving of inputs there, Liger its loss. Swapping a module's class cannot reach
it, so a packed call is led past it: ``route``. That the model's logits are those of its head for all that is measured.
"""

import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

ROUTED = "_efface_forward"  # the attribute that keeps what was found; copies of the module have it, bound to them


def found_forward(module: nn.Module) -> Callable[..., Any] | None:
    """Return the ``forward`` of the instance that others have put there; None where there is none."""
    own = vars(module)
    found: Callable[..., Any] | None = own.get(ROUTED, own.get("forward"))
    return found


def unwrapped_forward(module: nn.Module) -> Callable[..., Any] | None:
    """Return what the mixed precision of ``Accelerator.prepare`` wraps; None where it wraps nothing.

    ``accelerate.utils.extract_model_from_parallel`` does not serve: it takes away the model's own decorators, too.
    """
    forward = vars(module).get("forward")
    outer: Any = getattr(forward, "__func__", forward)
    inner = outer
    while _is_mixed_precision(inner):
        inner = inner.__wrapped__
    if inner is outer:
        return None
    return MethodType(inner, module) if hasattr(forward, "__func__") else inner


def _is_mixed_precision(function: Any) -> bool:
    if not hasattr(function, "__wrapped__"):
        return False
    return hasattr(function, "__script_unsupported") or function.__module__ == "accelerate.utils.operations"


def release(module: nn.Module) -> None:
    """Undo what an earlier ``Accelerator.prepare`` did to a module: mixed precision around ``forward``, and its mark.

    A module with the mark is passed over by every later ``prepare``: without mixed precision, whatever is asked for.
    """
    vars(module).pop("_is_accelerate_prepared", None)
    forward = unwrapped_forward(module)
    if forward is None:
        return
    vars(module).pop("_original_forward", None)
    if getattr(forward, "__func__", None) is type(module).forward:
        del module.forward
    else:
        module.forward = forward


def route(module: nn.Module, signature: inspect.Signature | None = None) -> None:
    """Let the instance's ``forward`` take calls without ``batch`` alone, and the class's those with it.

    Does nothing where the instance has none, or was routed before.

    Args:
        module: of a class whose ``forward`` takes ``batch``.
        signature: what the new one shows of itself, ``self`` included; what stands there may show less.
    """
    found = vars(module).get("forward")
    if found is None or ROUTED in vars(module):
        return

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("batch") is None:
            return getattr(self, ROUTED)(*args, **kwargs)
        return type(self).forward(self, *args, **kwargs)

    if signature is not None:
        forward.__signature__ = signature  # type: ignore[attr-defined]
    setattr(module, ROUTED, found)
    module.forward = MethodType(forward, module)


def unroute(module: nn.Module) -> None:
    """Undo ``route``."""
    if ROUTED in vars(module):
        module.forward = vars(module).pop(ROUTED)
