"""liger-kernel's fused linear cross entropy: chunks by its own rule, and larger ones (``chunk_mem_const``).

Its chunk is the power of two at or above N / ceil(V / (chunk_mem_const · D)): 256 rows at N = 8192, D = 2048,
V = 128256. reduction "none" makes the logits anew in its backward pass; "mean" forms gradients in the forward call.
Triton kernels: GPUs only.
"""

import math

from torch import Tensor

from benchmarks.loss.inputs import Shape
from benchmarks.loss.objectives import KL
from benchmarks.loss.providers.base import Found, Head, from_mean, from_nll

NAME = "liger-kernel FLCE"
_TUNED_ROWS = 2048


def budget(n: int, d: int, v: int, rows: int = _TUNED_ROWS) -> int:
    """Return the least ``chunk_mem_const`` with which a chunk has ``rows`` rows, or all of fewer."""
    pieces = max(1, n // rows)
    return math.ceil(v / (pieces * d))


def providers(shape: Shape) -> Found:
    """Default and tuned."""
    if shape.objective == KL:
        return [], []
    if shape.device == "cpu":
        return [], [f"{NAME}: its Triton kernels need a GPU"]
    try:
        from liger_kernel.transformers.functional import (  # noqa: PLC0415 - optional
            liger_fused_linear_cross_entropy,
        )
    except Exception as error:  # noqa: BLE001 - whatever an import on a strange machine raises
        return [], [f"{NAME}: {type(error).__name__}: {error}"]
    found, missing = [], []
    settings: dict[str, dict[str, int]] = {"default": {}}
    if "chunk_mem_const" in liger_fused_linear_cross_entropy.__code__.co_varnames:
        settings["tuned"] = {"chunk_mem_const": budget(shape.n, shape.d, shape.v)}
    else:
        missing.append(f"{NAME}, tuned: this release has no chunk_mem_const")
    for name, given in settings.items():

        def call(
            hidden: Tensor, head: Head, targets: Tensor, reduction: str = "none", given: dict[str, int] = given
        ) -> Tensor:
            return liger_fused_linear_cross_entropy(
                hidden, head.weight, targets, bias=head.bias, softcap=head.softcap, reduction=reduction, **given
            )

        def mean(hidden: Tensor, head: Head, targets: Tensor, given: dict[str, int] = given) -> Tensor:
            return liger_fused_linear_cross_entropy(
                hidden, head.weight, targets, bias=head.bias, softcap=head.softcap, reduction="mean", **given
            )

        of_mean = from_mean(f"{NAME}, {name}", 0, "reduction mean", mean, shape)
        found += of_mean or from_nll(f"{NAME}, {name}", 1, "reduction none", call, shape)
    return found, missing
