"""Objectives by name."""

from typing import Any, TypeVar

from efface.objectives.base import Objective
from efface.registry import Registry

_OBJECTIVES: Registry[Objective] = Registry("objective")

T = TypeVar("T", bound=type[Objective])


def register_objective(cls: T) -> T:
    """Class decorator: make an ``Objective`` subclass known under its ``name``.

    Raises:
        ValueError: the name is taken by another class.
    """
    return _OBJECTIVES.register(cls)


def known_objectives() -> dict[str, type[Objective]]:
    """Return the registered classes by name."""
    return _OBJECTIVES.known()


def get_objective(name: str, **parameters: Any) -> Objective:
    """Return the objective called ``name`` with the given parameters; case and underscores do not matter.

    Raises:
        ValueError: an unknown name, or a parameter that this objective does not have; both list what is known.
    """
    return _OBJECTIVES.make(name, **parameters)
