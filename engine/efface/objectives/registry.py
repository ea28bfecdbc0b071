"""Objectives by name."""

import dataclasses
from typing import Any, TypeVar

from efface.objectives.base import Objective

_OBJECTIVES: dict[str, type[Objective]] = {}

T = TypeVar("T", bound=type[Objective])


def register_objective(cls: T) -> T:
    """Class decorator: make an ``Objective`` subclass known under its ``name``.

    Raises:
        ValueError: the name is taken by another class.
    """
    taken = _OBJECTIVES.get(cls.name)
    if taken is not None and taken.__qualname__ != cls.__qualname__:
        raise ValueError(f"objective {cls.name!r}: already registered by {taken.__module__}.{taken.__qualname__}")
    _OBJECTIVES[cls.name] = cls
    return cls


def known_objectives() -> dict[str, type[Objective]]:
    """Return the registered classes by name."""
    return dict(sorted(_OBJECTIVES.items()))


def get_objective(name: str, **parameters: Any) -> Objective:
    """Return the objective called ``name`` with the given parameters; case and underscores do not matter.

    Raises:
        ValueError: an unknown name, or a parameter that this objective does not have; both list what is known.
    """
    plain = {known.replace("_", ""): cls for known, cls in _OBJECTIVES.items()}
    cls = plain.get(name.lower().replace("_", ""))
    if cls is None:
        raise ValueError(f"objective: expected one of {', '.join(known_objectives())}, got {name!r}")
    fields = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(parameters.keys() - fields)
    if unknown:
        raise ValueError(
            f"objective {cls.name!r}: has parameters {', '.join(sorted(fields))}, got {', '.join(unknown)}"
        )
    return cls(**parameters)
