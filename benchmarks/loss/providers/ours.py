"""efface: every backend of this machine. No product beyond the floor; one chunk of logits alive."""

from benchmarks.loss.inputs import LossInputs, Shape
from benchmarks.loss.objectives import KL
from benchmarks.loss.providers.base import Found, Gradients, Provider, detached, gradients, of_modes
from efface_kernels import Head, ReferenceRows, linear_distribution_loss, linear_sequence_loss

NAME = "efface"


def providers(shape: Shape) -> Found:
    """The native or the Triton backend, and plain torch."""
    backends = ("native" if shape.device == "cpu" else "triton", "torch")
    return [provider for backend in backends for provider in _of(backend, shape)], []


def _of(backend: str, shape: Shape) -> list[Provider]:
    def run(inputs: LossInputs, mode: str) -> Gradients:
        reference = None
        if mode == "live":
            frozen = Head(inputs.reference_weight, detached(inputs.bias), inputs.softcap)
            reference = ReferenceRows(inputs.reference_hidden, frozen)
        head = {"bias": inputs.bias, "softcap": inputs.softcap, "backend": backend}
        rows = (inputs.hidden, inputs.weight, inputs.targets)
        if inputs.objective == KL:
            return gradients(linear_distribution_loss(*rows, 1 / len(inputs.targets), reference, **head).loss, inputs)
        loss = linear_sequence_loss(
            *rows,
            inputs.row_offsets,
            inputs.rule,
            pairs=len(inputs.reference_sums) // 2 if inputs.objective == "DPO" else 0,
            reference=reference,
            reference_sums=inputs.reference_sums if mode.endswith("cached") else None,
            **head,
        ).loss
        return gradients(loss, inputs)

    return of_modes(f"{NAME} {backend}", 0, f"{backend} passes, gradients in the forward call", run, shape)
