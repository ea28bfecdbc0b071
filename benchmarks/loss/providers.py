"""NPO at the head, forward and backward, by everybody who offers it. Each provider says what it computes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from benchmarks.loss.inputs import BETA, LossInputs
from efface_kernels import Head, ReferenceRows, linear_sequence_loss
from efface_kernels.linear_loss.sequences import segment_sums

Gradients = tuple[Tensor, ...]  # dh (N, D), and dW (V, D) unless the head is frozen
TokenNll = Callable[[Tensor, Tensor, Tensor], Tensor]

# The products of 2 N D V floating-point operations that a mode needs: Z, Zr, Z W, Zᵀ h.
FLOOR = {"live": 4, "cached": 3, "frozen, cached": 2}


@dataclass(frozen=True)
class Provider:
    """A way to compute NPO's gradients; ``gemms`` counts products of 2 N D V floating-point operations."""

    name: str
    mode: str  # of FLOOR
    gemms: int
    computes: str
    run: Callable[[LossInputs], Gradients]


def _token_nll(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")


def _gradients(loss: Tensor, inputs: LossInputs) -> Gradients:
    return torch.autograd.grad(loss, [each for each in (inputs.hidden, inputs.weight) if each.requires_grad])


def _npo(inputs: LossInputs, nll: TokenNll, mode: str) -> Gradients:
    """NPO from per-token losses, as open-unlearning writes it."""
    offsets = inputs.row_offsets.device
    sums = -segment_sums(nll(inputs.hidden, inputs.weight, inputs.targets).float(), offsets)
    reference = inputs.reference_sums
    if mode == "live":
        with torch.no_grad():
            reference_nll = nll(inputs.reference_hidden, inputs.reference_weight, inputs.targets).float()
        reference = -segment_sums(reference_nll, offsets)
    return _gradients(-2 / BETA * F.logsigmoid(-BETA * (sums - reference)).mean(), inputs)


def _from_nll(name: str, gemms: Mapping[str, int], computes: str, nll: TokenNll) -> list[Provider]:
    """Return a provider for each mode of ``gemms``."""
    return [
        Provider(f"{name}, {mode}", mode, count, computes, lambda inputs, mode=mode: _npo(inputs, nll, mode))
        for mode, count in gemms.items()
    ]


def _efface(backend: str, mode: str) -> Provider:
    def run(inputs: LossInputs) -> Gradients:
        live = mode == "live"
        loss = linear_sequence_loss(
            inputs.hidden,
            inputs.weight,
            inputs.targets,
            inputs.row_offsets,
            inputs.rule,
            reference=ReferenceRows(inputs.reference_hidden, Head(inputs.reference_weight)) if live else None,
            reference_sums=None if live else inputs.reference_sums,
            backend=backend,
        ).loss
        return _gradients(loss, inputs)

    return Provider(f"efface {backend}, {mode}", mode, FLOOR[mode], f"{backend} row passes", run)


class _BareGemms:
    """The vendor's products alone, into a matrix of logits that is made once: what no implementation can undercut."""

    def __init__(self, mode: str) -> None:
        self._mode = mode
        self._logits: Tensor | None = None

    def __call__(self, inputs: LossInputs) -> Gradients:
        hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
        shape = (hidden.shape[0], weight.shape[0])
        if self._logits is None or self._logits.shape != shape or self._logits.dtype != hidden.dtype:
            self._logits = hidden.new_empty(shape)
        if self._mode == "live":
            torch.mm(inputs.reference_hidden, inputs.reference_weight.t(), out=self._logits)
        torch.mm(hidden, weight.t(), out=self._logits)
        if self._mode.startswith("frozen"):
            return (torch.mm(self._logits, weight),)
        return torch.mm(self._logits, weight), torch.mm(self._logits.t(), hidden)


def _torch_chunked(rows: int) -> TokenNll:
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)

    def nll(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options)

    return nll


def floors(modes: tuple[str, ...]) -> list[Provider]:
    """What the others are measured against."""
    return [
        Provider(f"bare GEMMs, {mode}", mode, FLOOR[mode], "the products alone", _BareGemms(mode)) for mode in modes
    ]


def ours(device: str) -> list[Provider]:
    """Every backend of efface on this machine."""
    if device == "cpu":
        return [_efface("native", "live"), _efface("native", "cached"), _efface("torch", "live")]
    return [*(_efface("triton", mode) for mode in FLOOR), _efface("torch", "live")]


def rivals(device: str) -> tuple[list[Provider], list[str]]:
    """The rivals that are installed, and why others are missing."""
    found = _from_nll("eager", {"live": 4} if device == "cpu" else FLOOR, "cross_entropy on fp32 logits", _token_nll)
    missing: list[str] = []
    if device != "cpu":
        found += _from_nll("eager + torch.compile", {"live": 4}, "the same, compiled", torch.compile(_token_nll))
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        for rows in (256, 1024) if device == "cpu" else (2048,):
            found += _from_nll(
                f"torch linear_cross_entropy, chunks of {rows}", {"live": 5}, "none, twice", _torch_chunked(rows)
            )
    else:
        missing.append(f"torch linear_cross_entropy: torch {torch.__version__} has no chunked one")
    try:
        from cut_cross_entropy import linear_cross_entropy  # noqa: PLC0415 - optional
    except ImportError as error:
        missing.append(f"cut-cross-entropy: {error}")
    else:

        def cut(implementation: str, **options: object) -> TokenNll:
            return lambda hidden, weight, targets: linear_cross_entropy(
                hidden, weight, targets, reduction="none", impl=implementation, **options
            )

        if device == "cpu":
            exact = cut("torch_compile", filter_eps=None)
            found += _from_nll("cut-cross-entropy torch_compile", {"live": 4}, "none, twice", exact)
        else:
            found += _from_nll("cut-cross-entropy, exact", {"live": 5}, "none, twice", cut("cce", filter_eps=None))
            found += _from_nll("cut-cross-entropy, default", {"live": 5}, "none, twice, gradients filtered", cut("cce"))
    if device != "cpu":
        try:
            from liger_kernel.transformers import (  # noqa: PLC0415 - optional
                LigerFusedLinearCrossEntropyLoss,
            )
        except ImportError as error:
            missing.append(f"liger-kernel: {error}")
        else:
            fused = LigerFusedLinearCrossEntropyLoss(reduction="none")
            found += _from_nll(
                "liger-kernel FLCE",
                {"live": 5},
                "none, twice",
                lambda hidden, weight, targets: fused(weight, hidden, targets),
            )
    return found, missing
