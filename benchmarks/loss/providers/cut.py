"""cut-cross-entropy: exact, and by default, with small gradients left out; on a CPU its ``torch_compile``.

Its kernel makes the logits anew in the backward pass, less what is filtered. No bias.
"""

from torch import Tensor

from benchmarks.loss.inputs import Shape
from benchmarks.loss.objectives import KL
from benchmarks.loss.providers.base import Found, Head, from_mean, from_nll

NAME = "cut-cross-entropy"


def providers(shape: Shape) -> Found:
    """What the device can run."""
    if shape.objective == KL:
        return [], []
    if shape.bias:
        return [], [f"{NAME}: has no bias"]
    try:
        from cut_cross_entropy import linear_cross_entropy  # noqa: PLC0415 - optional
    except Exception as error:  # noqa: BLE001 - whatever an import on a strange machine raises
        return [], [f"{NAME}: {type(error).__name__}: {error}"]
    settings: dict[str, dict[str, object]] = {"torch_compile": {"impl": "torch_compile"}}
    missing = [f"{NAME}, exact and default: their Triton kernels need a GPU"]
    again = 0
    if shape.device != "cpu":
        settings = {"exact": {"impl": "cce", "filter_eps": None}, "default": {"impl": "cce"}}
        missing, again = [], 1
    found = []
    for name, given in settings.items():

        def call(hidden: Tensor, head: Head, targets: Tensor, given: dict[str, object] = given) -> Tensor:
            return linear_cross_entropy(hidden, head.weight, targets, softcap=head.softcap, reduction="none", **given)

        def mean(hidden: Tensor, head: Head, targets: Tensor, given: dict[str, object] = given) -> Tensor:
            return linear_cross_entropy(hidden, head.weight, targets, softcap=head.softcap, reduction="mean", **given)

        of_mean = from_mean(f"{NAME}, {name}", again, "reduction mean", mean, shape)
        found += of_mean or from_nll(f"{NAME}, {name}", again, "reduction none", call, shape)
    return found, missing
