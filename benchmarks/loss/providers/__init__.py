"""The objectives at the head, forward and backward, by everybody who offers them. A file a provider."""

from benchmarks.loss.inputs import Shape
from benchmarks.loss.providers import cut, eager, gemms, liger, liger_chunked, ours, quack, torch_chunked
from benchmarks.loss.providers.base import Found, Provider

__all__ = ["RIVALS", "Found", "Provider", "providers"]

RIVALS = (eager, torch_chunked, liger, liger_chunked, cut, quack)


def providers(shape: Shape) -> Found:
    """Return the floors, ours, every rival that is installed and can do the shape, and why others are missing."""
    found, missing = [*gemms.providers(shape)[0], *ours.providers(shape)[0]], []
    for rival in RIVALS:
        able, reasons = rival.providers(shape)
        found += able
        missing += reasons
    return found, missing
