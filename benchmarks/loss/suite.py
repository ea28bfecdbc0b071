"""The loss suite: NPO at the head, forward and backward, every provider in turn within one run.

On a GPU (``--device cuda``) with a live reference, a cached one, and a cached one with a frozen head.
"""

import argparse
import gc
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise

import torch
from torch import Tensor

from benchmarks.loss.inputs import BETA, LossInputs, memorised
from benchmarks.loss.providers import FLOOR, Gradients, Provider, floors, ours, rivals
from benchmarks.report import Report
from benchmarks.timing import interleaved, interleaved_on_gpu, median_ratio
from efface_kernels import row_pass

_GPU = "GPU: "
SHAPES = {
    # name: (N, D, V, dtype)
    "smoke": (64, 64, 512, torch.float32),
    "Llama-2 head, D 1024, bf16": (1024, 1024, 32000, torch.bfloat16),
    "Llama-3.2-1B head, bf16": (512, 2048, 128256, torch.bfloat16),
    "Llama-2 head, D 1024, fp32": (1024, 1024, 32000, torch.float32),
    "GPU: Llama-3.2-1B": (8192, 2048, 128256, torch.bfloat16),
    "GPU: Llama-3.2-3B": (8192, 3072, 128256, torch.bfloat16),
    "GPU: Llama-2-7B": (8192, 4096, 32000, torch.bfloat16),
    "GPU: Phi-1.5": (8192, 2048, 51200, torch.bfloat16),
    "GPU: Llama-3.2-1B, 64 rows": (64, 2048, 128256, torch.bfloat16),
    "GPU: Llama-3.2-1B, 256 rows": (256, 2048, 128256, torch.bfloat16),
    "GPU: Llama-3.2-1B, 1024 rows": (1024, 2048, 128256, torch.bfloat16),
}
ROUNDS = 7
# The rows on which gradients are compared with fp64 on a GPU, where all 8192 would take most of the time.
_COMPARED_ROWS = 1024


def default_shapes(options: argparse.Namespace) -> list[str]:
    """Return the shapes that are meant for the device."""
    return [name for name in SHAPES if name != "smoke" and name.startswith(_GPU) == (options.device == "cuda")]


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
    peak_gib: float | None = None  # of GPU memory, above inputs and gradients


def gold(inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """NPO's gradients with the live reference in fp64, a block of sequences at a time."""
    hidden, weight = inputs.hidden.detach().double(), inputs.weight.detach().double()
    reference_hidden, reference_weight = inputs.reference_hidden.double(), inputs.reference_weight.double()
    dh, dw = torch.empty_like(hidden), torch.zeros_like(weight)
    offsets = inputs.row_offsets.host.tolist()
    sequences = len(offsets) - 1
    for start, stop in pairwise(offsets):
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


def _given(provider: Provider, inputs: LossInputs) -> LossInputs:
    return inputs.frozen() if provider.mode.startswith("frozen") else inputs


def _works(provider: Provider, inputs: LossInputs) -> str | None:
    """Run a provider once; return what went wrong: one that cannot do a shape leaves the others their figures."""
    try:
        provider.run(_given(provider, inputs))
    except Exception as error:  # noqa: BLE001 - whatever a rival raises
        return f"{provider.name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def _peak_gib(provider: Provider, inputs: LossInputs) -> float:
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients: Gradients = provider.run(_given(provider, inputs))
    torch.cuda.synchronize()
    kept = sum(each.nbytes for each in gradients)
    return (torch.cuda.max_memory_allocated() - before - kept) / (1 << 30)


def measure(name: str, options: argparse.Namespace) -> tuple[list[Row], list[str]]:
    """Time every provider on a shape, interleaved: one call of each a round."""
    n, d, v, dtype = SHAPES[name]
    gpu = options.device == "cuda"
    inputs = memorised(n, d, v, dtype, device=options.device)
    others, missing = rivals(options.device)
    mine = ours(options.device)
    modes = tuple(mode for mode in FLOOR if any(provider.mode == mode for provider in [*mine, *others]))
    providers: list[Provider] = []
    for provider in [*floors(modes), *mine, *others]:
        problem = _works(provider, inputs)
        if problem is None:
            providers.append(provider)
        else:
            missing.append(f"{problem} ({name})")
    calls = {provider.name: (lambda _, p=provider: p.run(_given(p, inputs))) for provider in providers}
    times = (interleaved_on_gpu if gpu else interleaved)(calls, options.rounds, warm_up=2)
    compared = memorised(min(n, _COMPARED_ROWS), d, v, dtype, device=options.device) if gpu else inputs
    exact = gold(compared) if options.errors else None
    rows = []
    for provider in providers:
        own = times[provider.name]
        row = Row(
            name,
            provider.name,
            provider.gemms,
            statistics.median(own),
            min(own),
            max(own),
            median_ratio(own, times[f"bare GEMMs, {provider.mode}"]),
        )
        # the cached sums are another loss, the bare GEMMs none
        if exact is not None and provider.mode == "live" and "GEMM" not in provider.name:
            dh, dw = provider.run(compared)
            row.error_dh, row.error_dw = _relative(dh, exact[0]), _relative(dw, exact[1])
        if gpu and "GEMM" not in provider.name:
            row.peak_gib = _peak_gib(provider, inputs)
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
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")


def run(options: argparse.Namespace, report: Report) -> None:
    """Measure the chosen shapes, then on the CPU the row pass alone."""
    rows, notes = [], set()
    for shape in options.shape:
        n, d, v, dtype = SHAPES[shape]
        measured, missing = measure(shape, options)
        rows += measured
        notes.update(missing)
        report.table(
            f"{shape}: NPO forward + backward, N {n}, D {d}, V {v}, {dtype}, {options.rounds} rounds",
            ("provider", "GEMMs", "median ms", "low", "high", "x floor", "error dh", "error dW", "peak GiB"),
            [_cells(row) for row in measured],
        )
        report.save(loss=[asdict(row) for row in rows], not_measured=sorted(notes))
    for note in sorted(notes):
        report.note(f"not measured: {note}")
    if options.device == "cpu" and options.shape != ["smoke"]:
        alone = row_pass_alone(options.rounds)
        for name, value in alone.items():
            report.note(f"{name}, (1024, 32000) bf16: {value:.2f} ms")
        report.save(row_pass_ms=alone)


def _cells(row: Row) -> list[str]:
    times = [f"{value:.2f}" for value in (row.median_ms, row.low_ms, row.high_ms)]
    errors = ["" if e is None else f"{e:.1e}" for e in (row.error_dh, row.error_dw)]
    peak = "" if row.peak_gib is None else f"{row.peak_gib:.2f}"
    return [row.provider, str(row.gemms), *times, f"{row.against_floor:.2f}", *errors, peak]
