"""A sweep of the passes' launch configurations: variant x block x warps x eviction, next to the library's choice.

TB/s count each byte once. Bytes that the second sweep reads again are not counted, so rows held in the L2 cache show as
a higher rate.
"""

import itertools
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.section import Run
from benchmarks.harness.report import said
from benchmarks.harness.timing import medians
from efface_kernels import Logits
from efface_kernels.distribution_pass.launch import distribution_pass_triton
from efface_kernels.distribution_pass.launch import launch_config as distribution_config
from efface_kernels.memory import aligned
from efface_kernels.row_pass.launch import launch_config as row_config
from efface_kernels.row_pass.launch import row_pass_triton
from efface_kernels.scale_pass.launch import launch_config as scale_config
from efface_kernels.scale_pass.launch import scale_pass_triton
from efface_kernels.triton_launch import LaunchConfig

_ROUNDS = 7
COMPARED = 8  # rows on which every configuration must give the same results as the library's own


@dataclass(frozen=True)
class PassCase:
    """A pass over (rows, V) logits as the loss runs it, in bf16 unless the op says otherwise.

    Attributes:
        name: in tables.
        op: "row", "row and reference", "KL" (fp32 logits; P in bf16 overwrites the reference's) or "scale" (fp32 to
            bf16).
    """

    name: str
    op: str
    rows: int
    vocabulary: int
    half: torch.dtype = torch.bfloat16

    @property
    def wide(self) -> bool:
        return self.op in ("KL", "scale")

    @property
    def moved(self) -> int:
        """Bytes moved, each counted once."""
        half = self.half.itemsize
        each = {"row": 2 * half, "row and reference": 3 * half, "KL": 8 + half, "scale": 4 + half}
        return each[self.op] * self.rows * self.vocabulary

    def default(self) -> LaunchConfig:
        """Return the library's launch configuration."""
        if self.op == "KL":
            return distribution_config(self.vocabulary, torch.float32, torch.float32)
        if self.op == "scale":
            return scale_config()
        return row_config(self.vocabulary, self.half, None if self.op == "row" else self.half)

    def configs(self) -> Iterator[LaunchConfig]:
        """Yield the library's configuration, then others: 4 to 32 warps, and 1, 2 or 4 loads of 16 bytes per thread."""
        yield self.default()
        entries = 16 // (4 if self.wide else self.half.itemsize)
        holds = (False,) if self.wide else (False, True)
        residents = {"KL": (0,), "scale": (4, 8, 16)}.get(self.op, (0, 1, 2))
        for warps, loads in itertools.product((8, 4, 16, 32), (2, 1, 4)):
            for resident, hold in itertools.product(residents, holds):
                if max(resident, 1) * warps <= 64:  # limit of a multiprocessor
                    yield LaunchConfig(32 * warps * entries * loads, warps, resident, hold)


# V 128256 and V 32000 share kernels, V 50257 needs its own. It comes last, because compilation takes most of the time.
CASES = (
    PassCase("row pass, V 128256", "row", 4096, 128256),
    PassCase("row pass, V 32000", "row", 8192, 32000),
    PassCase("row pass with a reference, V 128256", "row and reference", 4096, 128256),
    PassCase("KL, V 128256", "KL", 2048, 128256),
    PassCase("KL, V 32000", "KL", 8192, 32000),
    PassCase("scale, (128256, 2048)", "scale", 128256, 2048),
    PassCase("row pass, V 50257", "row", 8192, 50257),
)
_TINY = (
    PassCase("row pass, tiny", "row and reference", 5, 1000, torch.float16),
    PassCase("KL, tiny", "KL", 5, 1000, torch.float16),
    PassCase("scale, tiny", "scale", 5, 1000, torch.float16),
)


class Work:
    """A case's tensors and the pass over them. A second run on the overwritten tensors does the same amount of work."""

    def __init__(self, case: PassCase, rows: int, device: str) -> None:
        self.case = case
        where, dtype = torch.device(device), torch.float32 if case.wide else case.half
        generator = torch.Generator(device).manual_seed(0)
        self.logits, self.frozen = (
            aligned(rows, case.vocabulary, dtype, where).normal_(generator=generator) for _ in range(2)
        )
        self.targets = torch.randint(case.vocabulary, (rows,), device=where, generator=generator)
        self.factor = torch.tensor(0.5, device=where)

    def run(self, config: LaunchConfig) -> tuple[Tensor, ...]:
        """Run the pass; return everything that it writes."""
        case, logits = self.case, Logits(self.logits)
        if case.op == "scale":
            return (scale_pass_triton(self.logits, self.factor, case.half, True, config),)
        if case.op == "KL":
            over = self.frozen.view(case.half)[:, : case.vocabulary]
            outputs = distribution_pass_triton(logits, Logits(self.frozen), self.targets, 0.0, over, config)
            return (over, *outputs)
        frozen = None if case.op == "row" else Logits(self.frozen)
        return (self.logits, *row_pass_triton(logits, self.targets, frozen, True, config))


def run(run: Run) -> None:
    """Append a row for each case and configuration, and print the best ones.

    Raises:
        ArithmeticError: a configuration gives other results than the library's own.
    """
    faults = []
    for case in _TINY if run.smoke else CASES:
        begin = time.perf_counter()
        configs = list(dict.fromkeys(case.configs()))
        if run.smoke:
            configs = configs[:3]
        able, refused = _able(case, configs, run.device)
        compiled = time.perf_counter() - begin
        for config, why in refused.items():
            run.row(case=case.name, **vars(config), refused=why)
        faults += [f"{case.name}, {config}: {why}" for config, why in refused.items() if "other results" in why]
        _measure(run, case, able, compiled)
        if run.device == "cuda":
            torch.cuda.empty_cache()
    if faults:
        raise ArithmeticError("; ".join(faults))


def _able(
    case: PassCase, configs: list[LaunchConfig], device: str
) -> tuple[list[LaunchConfig], dict[LaunchConfig, str]]:
    """Compile all configurations in parallel and compare results; return those that run, and why others do not.

    Configurations that differ only in the number of programs share a kernel, so only one of them is compiled in the
    pool. The rest, and any that failed, run afterwards one by one. If two threads compile the same kernel at once, one
    of them can find the kernel while the other is still loading it, and fail.
    """

    def attempt(config: LaunchConfig) -> tuple[Tensor, ...] | str:
        if device == "cuda":
            torch.cuda.set_device(0)  # a new thread has no current device
        try:
            return tuple(each.clone() for each in Work(case, COMPARED, device).run(config))
        except Exception as error:  # noqa: BLE001 - errors of Triton and the driver about registers or memory
            return said(error)

    kernels = {replace(config, resident=min(config.resident, 1)): config for config in reversed(configs)}
    first = list(kernels.values())[::-1]
    with ThreadPoolExecutor(1 if device == "cpu" else min(12, os.cpu_count() or 1)) as pool:
        results = dict(zip(first, pool.map(attempt, first), strict=True))
    for config in configs:
        if isinstance(results.get(config, ""), str):
            results[config] = attempt(config)
    able: list[LaunchConfig] = []
    refused: dict[LaunchConfig, str] = {}
    expected = results[configs[0]]
    for config in configs:
        got = results[config]
        if isinstance(got, str):
            refused[config] = got
        elif isinstance(expected, str) or _same(got, expected):
            able.append(config)
        else:
            refused[config] = "other results than the library's own configuration"
    return able, refused


def _same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    """Return whether results differ by no more than the summation order explains."""
    return all(
        torch.allclose(one.float(), other.float(), rtol=max(2 * torch.finfo(one.dtype).eps, 1e-4), atol=1e-5)
        for one, other in zip(got, expected, strict=True)
    )


def _measure(run: Run, case: PassCase, configs: list[LaunchConfig], compiled: float) -> None:
    work = Work(case, case.rows, run.device)
    source = torch.ones(case.moved // 2, dtype=torch.uint8, device=run.device)
    target = torch.empty_like(source)

    def call(config: LaunchConfig | None) -> Callable[[int], object]:
        return lambda _: target.copy_(source) if config is None else work.run(config)

    times = medians({config: call(config) for config in (None, *configs)}, 1 if run.smoke else _ROUNDS, run.device)
    copy, took = times[None], {config: times[config] for config in configs}
    own = case.default()
    for config, ms in took.items():
        figures: dict[str, Any] = {
            "ms": ms,
            "terabytes": case.moved / (1e9 * ms),
            "of_copy": copy / ms,
            "own": config == own,
        }
        run.row(case=case.name, **vars(config), **figures)
    ranked = sorted(took, key=took.__getitem__)
    places = [config for config in (own, *ranked[:3]) if config in took]
    listed = "; ".join(
        f"{_said(config)} {took[config]:.3f} ms, {copy / took[config]:.0%} of the copy rate" for config in places
    )
    run.row(
        f"{case.name}: the library's {listed} ({len(took)} configurations, compiled in {compiled:.1f} s)",
        case=case.name,
        best=[vars(config) for config in ranked[:3]],
        copy_ms=copy,
    )


def _said(config: LaunchConfig) -> str:
    parts = [f"{config.block}/{config.num_warps}"]
    parts += [f"resident {config.resident}"] * (config.resident > 0) + ["hold"] * config.hold
    return " ".join(parts)
