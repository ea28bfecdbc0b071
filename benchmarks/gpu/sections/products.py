"""The loss's matrix products as the library calls them, by the rows of a chunk: which sizes the vendor's GEMMs like.

Z = h Wᵀ, dh = P W, dW = Pᵀ h: the last in bf16, as of a single chunk, and in fp32, written first and added to later.
"""

import torch
from torch import Tensor

from benchmarks.expected import SHAPES
from benchmarks.gpu.section import Run
from benchmarks.timing import medians
from efface_kernels.memory import accumulate_product, accumulates_in_float32, aligned

ROWS = (2048, 2080, 4096, 8192)
_ROUNDS = 7


def run(run: Run) -> None:
    """Append a row for each shape and number of rows."""
    heads = {shape.name: (shape.hidden_size, shape.vocabulary) for shape in SHAPES}
    if run.smoke:
        heads = {"tiny": (32, 100)}
    device = torch.device(run.device)
    run.row(
        f"a GEMM adds to fp32 in place: {accumulates_in_float32(device, torch.bfloat16)}",
        accumulates=accumulates_in_float32(device, torch.bfloat16),
    )
    for name, (d, v) in heads.items():
        for rows in (16, 32) if run.smoke else ROWS:
            took = _measure(rows, d, v, device)
            rates = {key: 2 * rows * d * v / (1e9 * ms) for key, ms in took.items()}
            listed = ", ".join(f"{key} {took[key]:.2f} ms {rate:.0f}" for key, rate in rates.items())
            run.row(f"{name}, M {rows}: {listed} TFLOP/s", head=name, rows=rows, d=d, v=v, ms=took, tflops=rates)


def _measure(rows: int, d: int, v: int, device: torch.device) -> dict[str, float]:
    hidden = torch.randn(rows, d, device=device).bfloat16()
    weight = torch.randn(v, d, device=device).bfloat16()
    z = aligned(rows, v, torch.bfloat16, device).normal_()
    dh, dw = torch.empty_like(hidden), torch.empty_like(weight)
    total = torch.zeros(v, d, device=device)

    def first(_: int) -> Tensor:
        return accumulate_product(None, z.t(), hidden, None, dw)[0]

    def later(_: int) -> Tensor:
        return accumulate_product(total, z.t(), hidden, None, dw)[0]

    calls = {
        "dh": lambda _: torch.mm(z, weight, out=dh),
        "dW": lambda _: torch.mm(z.t(), hidden, out=dw),
        "dW fp32": first,
        "dW fp32 added": later,
        "Z": lambda _: torch.mm(hidden, weight.t(), out=z),
    }
    return medians(calls, _ROUNDS, device.type)
