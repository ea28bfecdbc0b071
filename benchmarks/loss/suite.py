"""The loss suite: NPO at the head, forward and backward, every provider in turn within one run."""

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from benchmarks.loss.inputs import LossInputs, memorised
from benchmarks.loss.providers import BETA, Provider, floors, ours, rivals
from benchmarks.report import Report
from benchmarks.timing import interleaved, median_ratio
from efface_kernels import row_pass

SHAPES = {
    # name: (N, D, V, dtype)
    "smoke": (64, 64, 512, torch.float32),
    "Llama-2 head, D 1024, bf16": (1024, 1024, 32000, torch.bfloat16),
    "Llama-3.2-1B head, bf16": (512, 2048, 128256, torch.bfloat16),
    "Llama-2 head, D 1024, fp32": (1024, 1024, 32000, torch.float32),
}
ROUNDS = 7


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
    calls = {provider.name: (lambda _, run=provider.run: run(inputs)) for provider in providers}
    times = interleaved(calls, rounds, warm_up=2)  # compilation is in the first
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
            median_ratio(mine, floor),
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
    calls: dict[str, Callable[[int], object]] = {
        "native row pass, gradient in place": lambda _: row_pass(work, targets, backend="native"),
        "native row pass, log-probabilities only": lambda _: row_pass(
            logits, targets, gradient=False, backend="native"
        ),
        "torch log_softmax(float) + gather": lambda _: torch.log_softmax(logits.float(), -1).gather(
            1, targets[:, None]
        ),
    }
    return {name: statistics.median(times) for name, times in interleaved(calls, rounds, warm_up=1).items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what only this suite can be asked."""
    parser.add_argument("--errors", action="store_true", help="also compare every gradient with fp64 (slow)")


def run(options: argparse.Namespace, report: Report) -> None:
    """Measure the chosen shapes, then the row pass alone."""
    rows, notes = [], set()
    for shape in options.shape:
        n, d, v, dtype = SHAPES[shape]
        measured, missing = measure(shape, options.rounds, errors=options.errors)
        rows += measured
        notes.update(missing)
        report.table(
            f"{shape}: NPO forward + backward, N {n}, D {d}, V {v}, {dtype}, {options.rounds} rounds",
            ("provider", "GEMMs", "median ms", "low", "high", "x floor", "error dh", "error dW"),
            [_cells(row) for row in measured],
        )
        report.save(loss=[asdict(row) for row in rows])
    alone = row_pass_alone(options.rounds)
    for name, value in alone.items():
        report.note(f"{name}, (1024, 32000) bf16: {value:.2f} ms")
    for note in sorted(notes):
        report.note(f"not measured: {note}")
    report.save(row_pass_ms=alone)


def _cells(row: Row) -> list[str]:
    times = [f"{value:.1f}" for value in (row.median_ms, row.low_ms, row.high_ms)]
    errors = ["" if e is None else f"{e:.1e}" for e in (row.error_dh, row.error_dw)]
    return [row.provider, str(row.gemms), *times, f"{row.against_floor:.3f}", *errors]
