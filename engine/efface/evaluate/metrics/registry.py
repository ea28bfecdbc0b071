"""Metrics by name."""

from typing import Any, TypeVar

from efface.evaluate.metrics.base import Metric
from efface.registry import Registry

_METRICS: Registry[Metric] = Registry("metric")

T = TypeVar("T", bound=type[Metric])


def register_metric(cls: T) -> T:
    """Class decorator: make a ``Metric`` subclass known under its ``name``.

    Raises:
        ValueError: the name is taken by another class.
    """
    return _METRICS.register(cls)


def known_metrics() -> dict[str, type[Metric]]:
    """Return the registered classes by name."""
    return _METRICS.known()


def get_metric(name: str, **parameters: Any) -> Metric:
    """Return the metric called ``name`` with the given parameters; case and underscores do not matter.

    Raises:
        ValueError: an unknown name, or a parameter that this metric does not have; both list what is known.
    """
    return _METRICS.make(name, **parameters)
