"""Three short sections about the loss at the head on this device.

``trial`` runs the library's own comparison of Triton with torch, which decides what ``backend="auto"`` selects.
``products`` times the matrix products as the library calls them, by rows per chunk, to find the sizes that the vendor's
GEMMs handle best. ``profile`` lists the time per kernel of one call, from torch's profiler.
"""

import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor, profiler

from benchmarks.expected import SHAPES
from benchmarks.gpu.section import Run
from benchmarks.harness.timing import medians
from benchmarks.loss.inputs import KL, LossShape, make_inputs
from benchmarks.loss.providers import OURS, ours
from efface_kernels import backends, resolve_backend
from efface_kernels.memory import accumulate_product, accumulates_in_float32, aligned

ROWS = (2048, 2080, 4096, 8192)
_ROUNDS = 7
_CALLS = 3
_LISTED = 12
_SAID = 0.03  # share of the time below which a kernel is written to the results but not printed
_HEADS = {"Llama-3.2-1B": (2048, 128256), "Llama-2-7B": (4096, 32000)}


def trial(run: Run) -> None:
    """Append the result of the trial and the seconds of its first run, which compiles every kernel.

    Raises:
        ArithmeticError: a pass differs from torch, or "auto" does not select Triton.
    """
    device = torch.device(run.device, 0) if run.device == "cuda" else torch.device(run.device)
    dtypes = (torch.float32,) if run.smoke else (torch.bfloat16, torch.float16, torch.float32)
    faults = {}
    for dtype in dtypes:
        begin = time.perf_counter()
        fault = backends.disagreement(device, (dtype,), *((101,) if run.smoke else ()))
        seconds = time.perf_counter() - begin
        said = f"{dtype}: {fault or 'every pass agrees with torch'}; {seconds:.1f} s with compilation"
        run.row(said, dtype=str(dtype), fault=fault, seconds=seconds)
        if fault is not None:
            faults[dtype] = fault
    chosen = resolve_backend("auto", device)
    run.row(f'"auto" selects {chosen}', auto=chosen)
    if faults or (chosen != "triton" and not run.smoke):
        raise ArithmeticError(
            f'expected passes that agree with torch and "auto" to select "triton", got {faults}, {chosen}'
        )


def products(run: Run) -> None:
    """Append a row for each head and number of rows.

    Z = h Wᵀ, dh = P W, dW = Pᵀ h. dW is timed in bf16, as for a single chunk, and in fp32, for the first chunk (write)
    and for later ones (add).
    """
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
            took = _products_of(rows, d, v, device)
            rates = {key: 2 * rows * d * v / (1e9 * ms) for key, ms in took.items()}
            listed = ", ".join(f"{key} {took[key]:.2f} ms {rate:.0f}" for key, rate in rates.items())
            run.row(f"{name}, M {rows}: {listed} TFLOP/s", head=name, rows=rows, d=d, v=v, ms=took, tflops=rates)


def _products_of(rows: int, d: int, v: int, device: torch.device) -> dict[str, float]:
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


def profile(run: Run) -> None:
    """Append a row for each kernel of NPO with a live and a cached reference, for two heads, and of KL for one.

    Raises:
        ArithmeticError: the profiler recorded no kernel.
    """
    cases = [(head, "NPO", mode) for head in _HEADS for mode in ("live", "cached")] + [("Llama-3.2-1B", KL, "live")]
    for head, objective, mode in cases[:1] if run.smoke else cases:
        d, v = (32, 100) if run.smoke else _HEADS[head]
        dtype = torch.float32 if run.smoke else torch.bfloat16
        shape = LossShape(64 if run.smoke else 8192, d, v, dtype, objective, (mode,), device=run.device)
        inputs = make_inputs(shape).of(mode)
        backend = "native" if run.smoke else "triton"
        provider = next(each for each in ours(shape) if each.who == f"{OURS} {backend}")
        _profiled(run, f"{head}, {objective}, {mode}", functools.partial(provider.run, inputs))


def _profiled(run: Run, name: str, call: Callable[[], object]) -> None:
    gpu = run.device == "cuda"
    call()
    call()
    if gpu:
        torch.cuda.synchronize()
    with profiler.profile(
        activities=[profiler.ProfilerActivity.CPU, *[profiler.ProfilerActivity.CUDA] * gpu]
    ) as watched:
        for _ in range(_CALLS):
            call()
        if gpu:
            torch.cuda.synchronize()
    events = watched.key_averages()
    # On a GPU the events include torch's operators in addition to the kernels that they launch; count only the kernels.
    kind = "DeviceType.CUDA" if gpu else "DeviceType.CPU"
    spent = {
        event.key: (event.self_device_time_total if gpu else event.self_cpu_time_total, event.count)
        for event in events
        if str(event.device_type) == kind
    }
    if not spent:
        raise ArithmeticError(f"{name}: expected kernels, got none; the profiler does not work on this machine")
    total = sum(us for us, _ in spent.values())
    launches = sum(count for _, count in spent.values()) / _CALLS
    run.row(f"{name}: {total / _CALLS / 1e3:.2f} ms in {launches:.0f} kernels a call", call=name, kernels=launches)
    for key, (spent_us, count) in sorted(spent.items(), key=lambda item: -item[1][0])[:_LISTED]:
        share, each = spent_us / total, spent_us / count
        said = f"  {share:6.1%} {each:9.1f} us x {count / _CALLS:.0f}  {key[:70]}"
        run.row(said if share > _SAID else "", call=name, kernel=key, us=each, calls=count / _CALLS, share=share)
