"""quack-kernels: CuTe-DSL GEMMs with the softmax fused, reduction mean or sum alone: NLL and GradDiff. GPUs only."""

from torch import Tensor

from benchmarks.loss.inputs import Shape
from benchmarks.loss.providers.base import Found, Head, from_mean

NAME = "quack-kernels"


def providers(shape: Shape) -> Found:
    """Its own settings; it tunes its GEMMs itself."""
    if shape.objective not in ("NLL", "GradDiff"):
        return [], []
    if shape.device == "cpu":
        return [], [f"{NAME}: its kernels need a GPU"]
    if shape.bias or shape.softcap is not None:
        return [], [f"{NAME}: has neither bias nor soft-cap"]
    try:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy  # noqa: PLC0415 - optional
    except Exception as error:  # noqa: BLE001 - whatever an import on a strange machine raises
        return [], [f"{NAME}: {type(error).__name__}: {error}"]

    def mean(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
        return chunked_linear_cross_entropy(hidden, head.weight, targets, reduction="mean")

    return from_mean(NAME, 0, "reduction mean", mean, shape), []
