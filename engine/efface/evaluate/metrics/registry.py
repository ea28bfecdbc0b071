"""Metrics by name."""

import dataclasses
from typing import Any, TypeVar

from efface.evaluate.metrics.base import Metric

_METRICS: dict[str, type[Metric]] = {}

T = TypeVar("T", bound=type[Metric])


def register_metric(cls: T) -> T:
    """Class decorator: make a ``Metric`` subclass known under its ``name``.

    Raises:
        ValueError: the name is taken by another class.
    """
    taken = _METRICS.get(cls.name)
    if taken is not None and taken.__qualname__ != cls.__qualname__:
        raise ValueError(f"metric {cls.name!r}: already registered by {taken.__module__}.{taken.__qualname__}")
    _METRICS[cls.name] = cls
    return cls


def known_metrics() -> dict[str, type[Metric]]:
    """Return the registered classes by name."""
    return dict(sorted(_METRICS.items()))


def get_metric(name: str, **parameters: Any) -> Metric:
    """Return the metric called ``name`` with the given parameters.

    Raises:
        ValueError: an unknown name, or a parameter that this metric does not have; both list what is known.
    """
    cls = _METRICS.get(name)
    if cls is None:
        raise ValueError(f"metric: expected one of {', '.join(known_metrics())}, got {name!r}")
    fields = sorted(field.name for field in dataclasses.fields(cls))  # type: ignore[arg-type]
    if unknown := sorted(parameters.keys() - set(fields)):
        raise ValueError(f"metric {name!r}: has parameters {', '.join(fields) or 'none'}, got {', '.join(unknown)}")
    return cls(**parameters)
