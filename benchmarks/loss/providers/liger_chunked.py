"""liger-kernel's chunked DPO, the only rival with a reference in its op: torch ops, a chunk of pairs at a time.

Default: one pair a chunk; tuned: pairs of 2048 rows. Both by ``torch.compile``, for which the first call of a batch's
size takes its time. It takes the chosen sequences before the rejected ones, so a call copies the hidden states. Its
loss is β/2 of ours. No soft-cap.
"""

import torch
from torch import Tensor

from benchmarks.loss.inputs import LENGTH, LossInputs, Shape
from benchmarks.loss.objectives import BETA
from benchmarks.loss.providers.base import Found, Gradients, detached, gradients, of_modes

NAME = "liger-kernel chunked DPO"
_TUNED_PAIRS = 2048 // (2 * LENGTH)


def providers(shape: Shape) -> Found:
    """Default and tuned; on a CPU not compiled, which takes half a minute."""
    if shape.objective != "DPO":
        return [], []
    if shape.softcap is not None:
        return [], [f"{NAME}: has no soft-cap"]
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss  # noqa: PLC0415 - optional
    except ImportError as error:
        return [], [f"{NAME}: {error}"]

    def made(**settings: object) -> object:
        loss = LigerFusedLinearDPOLoss(beta=BETA, **settings)

        def run(inputs: LossInputs, _mode: str) -> Gradients:
            head = (inputs.weight, *_chosen_first(inputs.hidden, inputs.targets))
            reference = _chosen_first(inputs.reference_hidden, inputs.targets)[0]
            value, *_ = loss(*head, inputs.bias, reference, inputs.reference_weight, detached(inputs.bias))
            return gradients(2 / BETA * value, inputs)

        return run

    settings: dict[str, dict[str, object]] = {"default": {}, "tuned": {"chunk_size": _TUNED_PAIRS}}
    if shape.device == "cpu":
        settings["tuned"]["compiled"] = False
        del settings["default"]
    missing = [f"{NAME}, default: compiles for half a minute on a CPU"] if shape.device == "cpu" else []
    found = []
    for name, given in settings.items():
        found += of_modes(f"{NAME}, {name}", 0, "torch ops in chunks of pairs", made(**given), shape, ("live",))
    return found, missing


def _chosen_first(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(2 P, T, D) and (2 P, T): all alternates, then all forget sequences."""
    h, t = hidden.view(-1, 2, LENGTH, hidden.shape[1]), targets.view(-1, 2, LENGTH)
    return torch.cat([h[:, 1], h[:, 0]]), torch.cat([t[:, 1], t[:, 0]])
