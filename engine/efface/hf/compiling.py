"""What torch.compile leaves alone: the parts that change with the lengths and losses of every batch."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def uncompiled(function: F) -> F:
    """Decorator: run ``function``, and all that it calls, as written."""
    decorated: F = torch.compiler.disable(function)
    return decorated


def uncompiled_frame(function: F) -> F:
    """Decorator: run ``function`` as written; what it calls may be compiled."""
    decorated: F = torch.compiler.disable(function, recursive=False)
    return decorated
