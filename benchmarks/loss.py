"""The loss suite: NPO at the head, forward and backward, every provider in turn within one run."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from benchmarks.inputs import LossInputs, memorised
from benchmarks.providers import BETA, Provider, floors, ours, rivals
from efface_kernels import row_pass

SHAPES = {
    # name: (N, D, V, dtype)
    "smoke": (64, 64, 512, torch.float32),
    "Llama-2 head, D 1024, bf16": (1024, 1024, 32000, torch.bfloat16),
    "Llama-3.2-1B head, bf16": (512, 2048, 128256, torch.bfloat16),
    "Llama-2 head, D 1024, fp32": (1024, 1024, 32000, torch.float32),
}


@dataclass
class Row:
    """One provider on one shape. Times in milliseconds; errors relative to rms of the fp64 gradient."""

    shape: str
    provider: str
    gemms: int
    median_ms: float
    low_ms: float
    high_ms: float
    against_floor: float  # median of the ratio to the bare GEMMs of the same round
    error_dh: float | None = None
    error_dw: float | None = None


def gold(inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """NPO's gradients with the live reference in fp64, a block of sequences at a time."""
    hidden, weight = inputs.hidden.detach().double(), inputs.weight.detach().double()
    reference_hidden, reference_weight = inputs.reference_hidden.double(), inputs.reference_weight.double()
    dh, dw = torch.empty_like(hidden), torch.zeros_like(weight)
    sequences = len(inputs.row_offsets) - 1
    for start, stop in zip(inputs.row_offsets, inputs.row_offsets[1:], strict=False):
        rows, pick = slice(start, stop), inputs.targets[start:stop, None]
        logprobs = torch.log_softmax(hidden[rows] @ weight.T, 1)
        reference = torch.log_softmax(reference_hidden[rows] @ reference_weight.T, 1).gather(1, pick).sum()
        slope = 2 * torch.sigmoid(BETA * (logprobs.gather(1, pick).sum() - reference)) / sequences
        p = -logprobs.exp()
        p.scatter_add_(1, pick, torch.ones_like(pick, dtype=torch.float64))
        dh[rows] = slope * (p @ weight)
        dw += slope * (p.T @ hidden[rows])
    return dh, dw


def _relative(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt())


def measure(name: str, rounds: int, *, errors: bool) -> tuple[list[Row], list[str]]:
    """Time every provider on a shape, interleaved: one call of each a round."""
    n, d, v, dtype = SHAPES[name]
    inputs = memorised(n, d, v, dtype)
    others, missing = rivals()
    providers: Sequence[Provider] = [*floors(), *ours(), *others]
    for provider in providers:  # warm-up, compilation
        provider.run(inputs)
        provider.run(inputs)
    times: dict[str, list[float]] = {provider.name: [] for provider in providers}
    for _ in range(rounds):
        for provider in providers:
            begin = time.perf_counter()
            provider.run(inputs)
            times[provider.name].append((time.perf_counter() - begin) * 1e3)
    exact = gold(inputs) if errors else None
    rows = []
    for provider in providers:
        floor = times["bare GEMMs, cached" if "cached" in provider.name else "bare GEMMs, live"]
        mine = times[provider.name]
        row = Row(
            name,
            provider.name,
            provider.gemms,
            statistics.median(mine),
            min(mine),
            max(mine),
            statistics.median(a / b for a, b in zip(mine, floor, strict=True)),
        )
        # the cached sums are another loss, the bare GEMMs none
        if exact is not None and "cached" not in provider.name and "GEMM" not in provider.name:
            dh, dw = provider.run(inputs)
            row.error_dh, row.error_dw = _relative(dh, exact[0]), _relative(dw, exact[1])
        rows.append(row)
    return rows, missing


def row_pass_alone(rounds: int) -> dict[str, float]:
    """The pass on (1024, 32000) bf16 against torch's ``log_softmax`` on fp32 logits and ``gather``, milliseconds."""
    logits = torch.randn(1024, 32000, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.zeros(1024, dtype=torch.int64)
    # The pass overwrites its logits. Run again on what it left it does the same work: no time depends on the values.
    work = logits.clone()
    calls = {
        "native row pass, gradient in place": lambda: row_pass(work, targets, backend="native"),
        "native row pass, log-probabilities only": lambda: row_pass(logits, targets, gradient=False, backend="native"),
        "torch log_softmax(float) + gather": lambda: torch.log_softmax(logits.float(), -1).gather(1, targets[:, None]),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if round_:
                times[name].append((time.perf_counter() - begin) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def as_json(rows: Sequence[Row]) -> list[dict[str, object]]:
    """Return the rows as JSON takes them."""
    return [asdict(row) for row in rows]
