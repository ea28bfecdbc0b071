"""``torch.nn.functional.linear_cross_entropy`` in chunks: by its own rule ("auto"), and with more rows a chunk.

reduction "none" makes the logits anew in its backward pass; "mean", for NLL and GradDiff, does not. No soft-cap.
"""

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from benchmarks.loss.inputs import Shape
from benchmarks.loss.objectives import KL
from benchmarks.loss.providers.base import Found, Head, from_mean, from_nll

NAME = "torch linear_cross_entropy"
_TUNED = {"cpu": (256, 1024), "cuda": (2048,)}
_AUTO_ON_CPU = 1e10  # N D V: beyond, chunks of 128 rows take minutes a call in bf16


def providers(shape: Shape) -> Found:
    """Default and tuned."""
    if shape.objective == KL:
        return [], []
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return [], [f"{NAME}: torch {torch.__version__} has no chunked one"]
    if shape.softcap is not None:
        return [], [f"{NAME}: has no soft-cap"]
    options = {f"chunks of {rows}": {"batch_chunk_size": rows} for rows in _TUNED[shape.device] if rows <= shape.n}
    missing = []
    if shape.device == "cpu" and shape.dtype.itemsize < 4 and shape.n * shape.d * shape.v > _AUTO_ON_CPU:
        missing.append(f"{NAME}, auto: in half precision on a CPU its chunks take minutes a call; see the smaller rows")
    else:
        options = {"auto": {}, **options}
    found = []
    for name, given in options.items():
        by = torch.nn.LinearCrossEntropyOptions(**given)

        def call(hidden: Tensor, head: Head, targets: Tensor, reduction: str = "none", by: object = by) -> Tensor:
            return F.linear_cross_entropy(
                hidden, head.weight, targets, linear_bias=head.bias, reduction=reduction, options=by
            )

        def mean(hidden: Tensor, head: Head, targets: Tensor, by: object = by) -> Tensor:
            return F.linear_cross_entropy(
                hidden, head.weight, targets, linear_bias=head.bias, reduction="mean", options=by
            )

        of_mean = from_mean(f"{NAME}, {name}", 0, "reduction mean", mean, shape)
        found += of_mean or from_nll(f"{NAME}, {name}", 1, "reduction none", call, shape)
    return found, missing
