"""NPO at the head, forward and backward, by everybody who offers it. Each provider says what it computes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from benchmarks.loss.inputs import LossInputs
from efface.objectives.npo import npo_terms
from efface_kernels import Head, ReferenceRows, linear_sequence_loss
from efface_kernels.linear_loss.sequences import segment_sums

BETA = 0.1
Gradients = tuple[Tensor, Tensor]  # dh (N, D), dW (V, D)


@dataclass(frozen=True)
class Provider:
    """A way to compute NPO's gradients; ``gemms`` counts products of 2 N D V floating-point operations."""

    name: str
    gemms: int
    computes: str
    run: Callable[[LossInputs], Gradients]


def _token_nll(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")


def _npo(inputs: LossInputs, nll: Callable[[Tensor, Tensor, Tensor], Tensor], *, live: bool) -> Gradients:
    """NPO from per-token losses, as open-unlearning writes it."""
    offsets = torch.tensor(inputs.row_offsets)
    sums = -segment_sums(nll(inputs.hidden, inputs.weight, inputs.targets).float(), offsets)
    reference = inputs.reference_sums
    if live:
        with torch.no_grad():
            reference_nll = nll(inputs.reference_hidden, inputs.reference_weight, inputs.targets).float()
        reference = -segment_sums(reference_nll, offsets)
    loss = -2 / BETA * F.logsigmoid(-BETA * (sums - reference)).mean()
    dh, dw = torch.autograd.grad(loss, [inputs.hidden, inputs.weight])
    return dh, dw


def _efface(backend: str, *, live: bool) -> Callable[[LossInputs], Gradients]:
    def run(inputs: LossInputs) -> Gradients:
        sequences = len(inputs.row_offsets) - 1
        loss = linear_sequence_loss(
            inputs.hidden,
            inputs.weight,
            inputs.targets,
            inputs.row_offsets,
            lambda s: npo_terms(s, beta=BETA) / sequences,
            reference=ReferenceRows(inputs.reference_hidden, Head(inputs.reference_weight)) if live else None,
            reference_sums=None if live else inputs.reference_sums,
            backend=backend,
        ).loss
        dh, dw = torch.autograd.grad(loss, [inputs.hidden, inputs.weight])
        return dh, dw

    return run


class _BareGemms:
    """The vendor's products alone, into a matrix of logits that is made once: what no implementation can undercut."""

    def __init__(self, *, live: bool) -> None:
        self._live = live
        self._logits: Tensor | None = None

    def __call__(self, inputs: LossInputs) -> Gradients:
        hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
        shape = (hidden.shape[0], weight.shape[0])
        if self._logits is None or self._logits.shape != shape or self._logits.dtype != hidden.dtype:
            self._logits = hidden.new_empty(shape)
        if self._live:
            torch.mm(inputs.reference_hidden, inputs.reference_weight.t(), out=self._logits)
        torch.mm(hidden, weight.t(), out=self._logits)
        return torch.mm(self._logits, weight), torch.mm(self._logits.t(), hidden)


def _torch_chunked(rows: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)

    def nll(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options)

    return nll


def floors() -> list[Provider]:
    """What the others are measured against."""
    return [
        Provider("bare GEMMs, live", 4, "Z, Zr, Z W, Zᵀ h", _BareGemms(live=True)),
        Provider("bare GEMMs, cached", 3, "Z, Z W, Zᵀ h", _BareGemms(live=False)),
    ]


def ours() -> list[Provider]:
    """Every backend of efface on this machine."""
    return [
        Provider("efface native, live", 4, "C++ row passes", _efface("native", live=True)),
        Provider("efface native, cached", 3, "C++ row pass", _efface("native", live=False)),
        Provider("efface torch, live", 4, "torch row passes", _efface("torch", live=True)),
    ]


def rivals() -> tuple[list[Provider], list[str]]:
    """The rivals that are installed, all with a live reference, and why others are missing."""
    found = [
        Provider("eager, live", 4, "cross_entropy on fp32 logits", lambda inputs: _npo(inputs, _token_nll, live=True)),
    ]
    missing = []
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        for rows in (256, 1024):
            nll = _torch_chunked(rows)
            name = f"torch linear_cross_entropy, chunks of {rows}"
            found.append(Provider(name, 5, 'reduction="none", twice', lambda i, nll=nll: _npo(i, nll, live=True)))
    else:
        missing.append(f"torch linear_cross_entropy: torch {torch.__version__} has no chunked one")
    try:
        from cut_cross_entropy import linear_cross_entropy  # noqa: PLC0415 - optional
    except ImportError as error:
        missing.append(f"cut-cross-entropy: {error}")
    else:

        def cut(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
            return linear_cross_entropy(
                hidden, weight, targets, reduction="none", impl="torch_compile", filter_eps=None
            )

        found.append(
            Provider(
                "cut-cross-entropy torch_compile",
                4,
                'reduction="none", twice',
                lambda inputs: _npo(inputs, cut, live=True),
            )
        )
    return found, missing
