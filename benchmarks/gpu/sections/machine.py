"""The machine: versions, GPU and clocks, and its measured limits, copy bandwidth and matrix-product rate."""

import os
import platform
import shutil
import sysconfig
from pathlib import Path

import torch

from benchmarks.gpu.section import Run
from benchmarks.harness.report import gpu_says, machine, versions
from benchmarks.harness.timing import medians

_PACKAGES = ("torch", "triton", "transformers", "numpy", "accelerate", "peft", "datasets", "pybind11", "pytest-xdist")
_CARD = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,pstate"


def run(run: Run) -> None:
    """Append a row with versions, one with the measured limits, and one with the cost of a launch."""
    found = versions(_PACKAGES)
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    tools = {name: shutil.which(name) is not None for name in ("c++", "nvcc", "git")} | {"Python.h": header.is_file()}
    said = f"Python {platform.python_version()}, " + ", ".join(f"{name} {said}" for name, said in found.items())
    run.row(said, versions=found, tools=tools, cores=os.cpu_count(), libc=platform.libc_ver(), machine=machine(()))
    card = _card(run)
    run.row(f"{card}; {', '.join(name for name, there in tools.items() if there)}", card=card)

    gib = 1 << 30
    source = torch.ones(gib >> (12 if run.smoke else 0), dtype=torch.float32, device=run.device)  # 4 GiB
    target = torch.empty_like(source)
    side = 64 if run.smoke else 8192
    left, right = (torch.randn(side, side, device=run.device).bfloat16() for _ in range(2))
    out = torch.empty_like(left)
    took = medians(
        {"copy": lambda _: target.copy_(source), "product": lambda _: torch.mm(left, right, out=out)}, 9, run.device
    )
    terabytes = 2 * source.nbytes / (1e9 * took["copy"])
    tflops = 2 * side**3 / (1e9 * took["product"])
    clocks = _query(run, "clocks.sm,power.draw,temperature.gpu")
    run.row(
        f"copy {terabytes:.2f} TB/s, {side}^3 bf16 product {tflops:.0f} TFLOP/s; clocks afterwards {clocks}",
        copy_terabytes=terabytes,
        product_tflops=tflops,
        clocks=clocks,
    )

    tiny, count = torch.zeros(1, device=run.device), 200
    alone = medians({"launches": lambda _: [tiny.add_(1) for _ in range(count)]}, 9, "cpu")["launches"]
    run.row(f"a launch takes Python {1e3 * alone / count:.1f} µs", launch_us=1e3 * alone / count)


def _card(run: Run) -> str:
    if run.smoke:
        return "no GPU"
    own = torch.cuda.get_device_properties(0)
    cache = getattr(own, "L2_cache_size", 0) >> 20
    return f"{_query(run, _CARD)}; {own.multi_processor_count} multiprocessors, {cache} MiB of L2"


def _query(run: Run, fields: str) -> str:
    if run.smoke:
        return "no clocks"
    return gpu_says(fields) or "nvidia-smi reports nothing"
