"""The objectives at the head, forward and backward, by everybody who offers them. A file a provider."""

from collections.abc import Sequence

from benchmarks.loss.inputs import Shape
from benchmarks.loss.providers import cut, eager, gemms, liger, liger_chunked, ours, quack, torch_chunked
from benchmarks.loss.providers.base import Found, Provider
from benchmarks.options import left_out

__all__ = ["RIVALS", "Found", "Provider", "providers"]

RIVALS = (eager, torch_chunked, liger, liger_chunked, cut, quack)


def providers(shape: Shape, without: Sequence[str] = ()) -> Found:
    """Return the floors, ours, every rival that is installed and can do the shape, and why others are missing.

    Left out is who has a text of ``without`` in the name, the products excepted; such a rival is not imported.
    """
    found, missing = [*gemms.providers(shape)[0], *ours.providers(shape)[0]], []
    for rival in RIVALS:
        if left_out(rival.NAME, without):
            continue
        able, reasons = rival.providers(shape)
        found += able
        missing += reasons
    kept = [each for each in found if each.who == gemms.NAME or not left_out(each.name, without)]
    return kept, missing
