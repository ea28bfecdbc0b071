"""The library's own trial of Triton on this device: what decides what ``backend="auto"`` takes."""

import time

import torch

from benchmarks.gpu.section import Run
from efface_kernels import backends, resolve_backend


def run(run: Run) -> None:
    """Append its answer, and the seconds of its first run, which compiles every kernel.

    Raises:
        ArithmeticError: a pass does not give what torch gives, or "auto" does not take Triton.
    """
    device = torch.device(run.device, 0) if run.device == "cuda" else torch.device(run.device)
    dtypes = (torch.float32,) if run.smoke else (torch.bfloat16, torch.float16, torch.float32)
    faults = {}
    for dtype in dtypes:
        begin = time.perf_counter()
        fault = backends.disagreement(device, (dtype,), *((101,) if run.smoke else ()))
        seconds = time.perf_counter() - begin
        said = f"{dtype}: {fault or 'every pass gives what torch gives'}; {seconds:.1f} s with compilation"
        run.row(said, dtype=str(dtype), fault=fault, seconds=seconds)
        if fault is not None:
            faults[dtype] = fault
    chosen = resolve_backend("auto", device)
    run.row(f'"auto" takes {chosen}', auto=chosen)
    if faults or (chosen != "triton" and not run.smoke):
        raise ArithmeticError(f'expected passes that give what torch gives, and "triton" of "auto": {faults}, {chosen}')
