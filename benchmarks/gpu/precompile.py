"""Triton kernels of the trial, the sweep and the loss, compiled ahead of time for a GPU that is not present.

``python -m benchmarks.gpu.precompile`` fills Triton's cache (``TRITON_CACHE_DIR``). ``pack`` makes the cache
relocatable, and ``unpack`` restores it on the other machine. Triton uses a cached kernel if its own build, the kernel's
source and all launch parameters are the same; otherwise it compiles the kernel.
"""

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_PLACE = "{cache}"  # placeholder for the cache's folder in a packed cache
CAPABILITY = 90  # H100 and H200


class _Absent:
    """A stand-in for the NVIDIA GPU driver that answers the queries of Triton's launcher."""

    utils = None

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget  # noqa: PLC0415 - pack and unpack work without Triton

        return GPUTarget("cuda", CAPABILITY, 32)


def fill(dtypes: Sequence[str], cases: int) -> int:
    """Compile all launches of the trial for these dtypes, and the first cases of the sweep; return their number.

    It runs the library's functions on the CPU, with launches that only compile.
    """
    import torch  # noqa: PLC0415
    from triton.runtime import driver  # noqa: PLC0415
    from triton.runtime.jit import JITFunction  # noqa: PLC0415

    from benchmarks.gpu.sections import sweep  # noqa: PLC0415
    from efface_kernels import backends  # noqa: PLC0415

    launch, launched = JITFunction.run, 0

    def compile_alone(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:  # noqa: ARG001
        nonlocal launched
        launched += 1
        return launch(self, *arguments, grid=grid, warmup=True, **options)

    def aligned(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.zeros(rows, -(-columns // 16) * 16, dtype=dtype, device=device)[:, :columns]  # as on a GPU

    driver.set_active(_Absent())
    JITFunction.run = compile_alone
    backends.aligned = sweep.aligned = aligned  # type: ignore[attr-defined]
    for name in dtypes:
        list(backends._results(torch.device("cpu"), getattr(torch, name), backends._VOCABULARY))  # noqa: SLF001
    for case in sweep.CASES[:cases]:
        work = sweep.Work(case, sweep.COMPARED, "cpu")
        for config in dict.fromkeys(case.configs()):
            work.run(config)
    return launched


def pack(cache: Path, target: Path) -> None:
    """Copy a cache and make the paths in its files relative."""
    _copy(cache, target, str(cache), _PLACE)


def unpack(packed: Path, cache: Path) -> None:
    """Copy a packed cache to ``cache``, where Triton will read it."""
    _copy(packed, cache, _PLACE, str(cache))


def _copy(source: Path, target: Path, old: str, new: str) -> None:
    shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.lock", "*.tmp*"))
    for path in target.rglob("__grp__*.json"):
        group = json.loads(path.read_text(encoding="utf-8"))
        children = {name: child.replace(old, new, 1) for name, child in group["child_paths"].items()}
        path.write_text(json.dumps(group | {"child_paths": children}), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.precompile", description=__doc__)
    parser.add_argument("--dtype", action="append", help="dtype of the trial; default: bfloat16, float16 and float32")
    parser.add_argument("--cases", type=int, default=1000, help="number of cases of the sweep (default: all)")
    options = parser.parse_args()
    begin = time.perf_counter()
    launches = fill(options.dtype or ("bfloat16", "float16", "float32"), options.cases)
    print(f"{launches} launches compiled in {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
