"""Handling of a ``forward`` attribute on a module instance, which hides the ``forward`` method of the class.

Other libraries set this attribute: accelerate for mixed precision and for moving inputs, Liger for its loss. ``fuse``
swaps the class of a module, which does not change the attribute. So ``route`` makes calls with a packed batch go to the
class's ``forward``. ``read_packs`` measures whether the model's logits are still those of its head.
"""

import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

ROUTED = "_efface_forward"  # attribute that keeps the instance's original ``forward``; copied with the module


def found_forward(module: nn.Module) -> Callable[..., Any] | None:
    """Return the ``forward`` that another library has set on the instance, or None."""
    own = vars(module)
    found: Callable[..., Any] | None = own.get(ROUTED, own.get("forward"))
    return found


def unwrapped_forward(module: nn.Module) -> Callable[..., Any] | None:
    """Return the ``forward`` inside the mixed-precision wrapper of ``Accelerator.prepare``, or None without a wrapper.

    ``accelerate.utils.extract_model_from_parallel`` cannot be used: it also removes the model's own decorators.
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
    """Undo ``Accelerator.prepare`` on a module: remove the mixed-precision wrapper and the mark that it was prepared.

    A later ``prepare`` skips a module that still has the mark, and does not set up the mixed precision requested then.
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
    """Dispatch calls with a ``batch`` to the class's ``forward``, and other calls to the instance's ``forward``.

    A no-op if the instance has no ``forward`` of its own, or has been routed before.

    Args:
        module: a module whose class has a ``forward`` with the parameter ``batch``.
        signature: signature for the new ``forward``, including ``self``, as ``inspect.signature`` reports it; None sets
            none. The instance's ``forward`` may have a less specific signature.
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
    """Undo ``route``: restore the instance's original ``forward``; a no-op if the module was not routed."""
    if ROUTED in vars(module):
        module.forward = vars(module).pop(ROUTED)
