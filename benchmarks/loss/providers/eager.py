"""Plain torch: all logits in memory, ``cross_entropy`` and ``kl_div`` on an fp32 copy; as is, and compiled."""

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from benchmarks.loss.inputs import LossInputs, Shape
from benchmarks.loss.objectives import KL
from benchmarks.loss.providers.base import Found, Gradients, Head, Provider, detached, from_nll, gradients, of_modes

NAME = "eager"
COMPILED = f"{NAME} + torch.compile"


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.float()


def _nll(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, targets: Tensor) -> Tensor:
    return F.cross_entropy(_logits(hidden, weight, bias, softcap), targets, reduction="none")


def _divergence(logits: Tensor, reference: Tensor) -> Tensor:
    logp, logq = torch.log_softmax(logits, -1), torch.log_softmax(reference, -1)
    return F.kl_div(logp, logq, reduction="batchmean", log_target=True)


def _of(who: str, computes: str, shape: Shape, wrap: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]) -> Found:
    if shape.objective == KL:
        return of_modes(who, 0, computes, _kl(wrap(_divergence)), shape), []
    nll = wrap(_nll)

    def with_head(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
        return nll(hidden, head.weight, head.bias, head.softcap, targets)

    return from_nll(who, 0, computes, with_head, shape), []


def _kl(divergence: Callable[..., Tensor]) -> Callable[[LossInputs, str], Gradients]:
    def run(inputs: LossInputs, _mode: str) -> Gradients:
        with torch.no_grad():
            reference = _logits(inputs.reference_hidden, inputs.reference_weight, detached(inputs.bias), inputs.softcap)
        logits = _logits(inputs.hidden, inputs.weight, inputs.bias, inputs.softcap)
        return gradients(divergence(logits, reference), inputs)

    return run


def providers(shape: Shape) -> Found:
    """Eager and torch.compile."""
    found: list[Provider] = _of(NAME, "all logits, a copy in fp32", shape, lambda f: f)[0]
    found += _of(COMPILED, "the same, compiled", shape, lambda f: torch.compile(f, dynamic=False))[0]
    return found, []
