"""Compile the Triton kernels for absent GPUs and print what they take: ``python -m benchmarks.compile_only``.

Not under TRITON_INTERPRET, which replaces the compiler. Exits with 1 where an NVIDIA kernel spills registers, or has
more instructions an element than its budget.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import sass
from efface_kernels.distribution_pass.kernel import distribution_pass_kernel
from efface_kernels.distribution_pass.launch import launch_config as distribution_config
from efface_kernels.row_pass.kernel import row_pass_kernel
from efface_kernels.row_pass.launch import launch_config as row_config
from efface_kernels.scale_pass.kernel import scale_kernel
from efface_kernels.scale_pass.launch import launch_config as scale_config
from efface_kernels.sequence_loss.kernel import sequence_loss_kernel
from efface_kernels.sequence_loss.launch import LAUNCH

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64"}


@dataclass(frozen=True)
class Row:
    """A named variant of a kernel: the figures that change its code."""

    kernel: str
    name: str
    dtype: torch.dtype = torch.bfloat16
    reference: torch.dtype | None = None
    gradient: bool = True
    softcap: float = 0.0
    shift: float = 0.0
    out: torch.dtype | None = None  # None: in place
    persistent: bool = False
    vocabulary: int = 128256
    budget: float | None = None  # instructions an element, all sweeps together

    @property
    def stride(self) -> int:
        """From row to row, as the loop's workspaces have them (``memory.aligned``)."""
        return -(-self.vocabulary // 16) * 16

    @property
    def sweeps(self) -> tuple[int, ...]:
        """The bytes of an element that each sweep over whole blocks reads."""
        own, other = self.dtype.itemsize, 0 if self.reference is None else self.reference.itemsize
        if self.kernel == "sequence_loss" or self.vocabulary < 64:  # a few numbers; no whole block
            return ()
        if self.kernel == "distribution_pass":
            return (own + other,) * 2
        if self.kernel == "scale_pass":
            return (own,)
        return (*[other] * (other > 0), *[own] * (2 if self.gradient else 1))

    def source(self, warp_size: int) -> tuple[ASTSource, int]:
        """Return what Triton compiles, and the number of warps."""
        return BUILDS[self.kernel](self, warp_size)


@dataclass(frozen=True)
class Measured:
    """What a compiled kernel takes of a GPU, as its own tools say."""

    registers: int
    spills: int  # registers or bytes kept in memory; 0 or not
    shared: int
    binary: int
    wide_loads: bool  # 16 bytes at once
    sweeps: tuple[sass.Sweep, ...] = ()  # of NVIDIA's

    @property
    def instructions(self) -> float:
        """An element, all sweeps together."""
        return sum(sweep.instructions for sweep in self.sweeps)


# Budgets are a little above what triton 3.7.1 makes of the kernels, the worst of the three NVIDIA targets.
_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
ROWS = (
    Row("row_pass", "bf16", _BF16, budget=16),
    Row("row_pass", "bf16 + bf16", _BF16, _BF16, budget=24),
    Row("row_pass", "bf16 + fp32", _BF16, _FP32, budget=24),
    Row("row_pass", "bf16 + bf16, no gradient", _BF16, _BF16, gradient=False, budget=16),
    Row("row_pass", "bf16 + bf16, soft-cap", _BF16, _BF16, softcap=30.0, budget=76),
    Row("row_pass", "fp16 + fp16", _FP16, _FP16, budget=24),
    Row("row_pass", "fp32 + fp32", _FP32, _FP32, budget=24),
    Row("row_pass", "fp32 + fp32, soft-cap", _FP32, _FP32, softcap=30.0, budget=76),
    Row("row_pass", "bf16, persistent", _BF16, persistent=True, budget=16),
    Row("row_pass", "bf16 + bf16, persistent", _BF16, _BF16, persistent=True, budget=24),
    Row("row_pass", "bf16, V = 50257", _BF16, vocabulary=50257, budget=16),
    Row("distribution_pass", "fp32 + fp32 to bf16", _FP32, _FP32, out=_BF16, budget=34),
    Row("distribution_pass", "fp32 + fp32 to bf16, shift", _FP32, _FP32, out=_BF16, shift=10.0, budget=46),
    Row("distribution_pass", "fp32 + fp32 to bf16, soft-cap", _FP32, _FP32, out=_BF16, softcap=30.0, budget=96),
    Row("distribution_pass", "fp32 + fp32 to bf16, V = 50257", _FP32, _FP32, out=_BF16, vocabulary=50257, budget=40),
    Row("distribution_pass", "fp32 + fp32", _FP32, _FP32, budget=34),
    Row("distribution_pass", "fp32 + fp32, no gradient", _FP32, _FP32, gradient=False, budget=30),
    Row("distribution_pass", "bf16 + bf16", _BF16, _BF16, budget=38),
    Row("distribution_pass", "fp16 + fp16", _FP16, _FP16, budget=38),
    Row("row_pass", "bf16 + bf16, V = 1", _BF16, _BF16, vocabulary=1),
    Row("scale_pass", "fp32 to bf16", _FP32, out=_BF16, budget=6),
    Row("scale_pass", "bf16, in place", _BF16, budget=6),
    Row("sequence_loss", "no reference", _FP32, reference=None),
    Row("sequence_loss", "live reference", _FP32, reference=_FP32),
    Row("sequence_loss", "cached reference", _FP32, reference=torch.float64),
)


def _source(kernel: Any, signature: dict[str, str], values: dict[str, Any], integers: dict[str, int]) -> ASTSource:
    # As the launcher specialises: 1 is a constant, multiples of 16 are known to be.
    names = list(signature) + list(values)
    names = sorted(names, key=kernel.arg_names.index)
    constants = {**values, **{name: 1 for name, value in integers.items() if value == 1}}
    full = {name: "constexpr" if name in constants else signature[name] for name in names}
    plain = {kernel.params[k].name for k in range(len(names)) if _is_plain(kernel.params[k])}
    aligned = [
        name
        for name, kind in full.items()
        if name not in plain and (kind.startswith("*") or (name in integers and integers[name] % 16 == 0))
    ]
    attributes = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned if name not in constants
    }
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    return ASTSource(kernel, full, places, attributes)


def _is_plain(parameter: Any) -> bool:
    """Whether the launcher never looks at the argument's alignment."""
    return bool(parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)


def _row_pass(row: Row, warp_size: int) -> tuple[ASTSource, int]:
    config = row_config(row.vocabulary, row.dtype, row.reference, warp_size, persistent=row.persistent)
    integers = dict.fromkeys(("v", "reference_v"), row.vocabulary)
    integers |= dict.fromkeys(("stride", "reference_stride"), row.stride)
    integers |= {"rows": 4095, "reference_rows": 4095}
    signature = {"Logits": POINTERS[row.dtype], "Targets": "*i64", "Logprobs": "*fp32"}
    signature |= dict.fromkeys(integers, "i32")
    values: dict[str, Any] = {"SOFTCAP": row.softcap, "REFERENCE_SOFTCAP": row.softcap}
    values |= {"GRADIENT": row.gradient, "BLOCK": config.block, "PERSISTENT": config.resident > 0, "HOLD": config.hold}
    if row.reference is None:
        values |= {"Reference": None, "ReferenceLogprobs": None}
    else:
        signature |= {"Reference": POINTERS[row.reference], "ReferenceLogprobs": "*fp32"}
    return _source(row_pass_kernel, signature, values, integers), config.num_warps


def _distribution_pass(row: Row, warp_size: int) -> tuple[ASTSource, int]:
    reference = row.reference or row.dtype
    config = distribution_config(row.vocabulary, row.dtype, reference, warp_size)
    integers = {"stride": row.stride, "reference_stride": row.stride, "v": row.vocabulary}
    # P in half precision lies over the reference's rows
    integers["out_stride"] = row.stride * (1 if row.out is None else reference.itemsize // row.out.itemsize)
    signature = {"Logits": POINTERS[row.dtype], "Reference": POINTERS[reference], "Targets": "*i64"}
    signature |= {"Divergence": "*fp32", "Entropy": "*fp32"} | dict.fromkeys(integers, "i32")
    values: dict[str, Any] = {"SHIFT": row.shift, "SOFTCAP": row.softcap, "REFERENCE_SOFTCAP": row.softcap}
    values["BLOCK"] = config.block
    if row.gradient:
        signature["Out"] = POINTERS[row.out or row.dtype]
    else:
        values["Out"] = None
    return _source(distribution_pass_kernel, signature, values, integers), config.num_warps


def _sequence_loss(row: Row, warp_size: int) -> tuple[ASTSource, int]:  # noqa: ARG001 - one warp of any size
    integers = {"reference_rows": 4095}
    signature = {"Offsets": "*i64", "Roles": "*i8", "Table": "*fp64", "reference_rows": "i32"}
    signature |= dict.fromkeys(("Logprobs", "Terms", "Sums", "Coefficients"), "*fp32")
    given: dict[str, Any] = {"ReferenceLogprobs": None, "ReferenceSums": None}
    if row.reference is not None:  # fp64 stands for the sums of a cache
        signature["ReferenceSums"] = "*fp32"
        del given["ReferenceSums"]
    if row.reference == torch.float32:
        signature["ReferenceLogprobs"] = "*fp32"
        del given["ReferenceLogprobs"]
    values = {**given, "EPS": torch.finfo(torch.float32).eps, "BLOCK": LAUNCH.block}
    return _source(sequence_loss_kernel, signature, values, integers), LAUNCH.num_warps


def _scale_pass(row: Row, warp_size: int) -> tuple[ASTSource, int]:
    config = scale_config(warp_size)
    signature = {
        "Values": POINTERS[row.dtype],
        "Factor": "*fp32",
        "Out": POINTERS[row.out or row.dtype],
        "count": "i32",
    }
    values = {"IN_PLACE": row.out is None, "BLOCK": config.block}
    return _source(scale_kernel, signature, values, {"count": row.vocabulary * 2048}), config.num_warps


BUILDS = {
    "row_pass": _row_pass,
    "distribution_pass": _distribution_pass,
    "scale_pass": _scale_pass,
    "sequence_loss": _sequence_loss,
}


def measure(row: Row, target: GPUTarget) -> Measured:
    """Compile one kernel for one GPU."""
    source, warps = row.source(target.warp_size)
    compiled = triton.compile(source, target=target, options={"num_warps": warps})
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        number = {key: int(value) for key, value in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", text)}
        return Measured(
            number["vgpr_count"],
            number["vgpr_spill_count"],
            compiled.metadata.shared,
            len(compiled.asm["hsaco"]),
            "global_load_dwordx4" in text or "buffer_load_dwordx4" in text,
        )
    binary = sass.read(compiled.asm["cubin"])
    sweeps = binary.sweeps(row.sweeps) if row.sweeps else ()
    return Measured(
        binary.registers,
        binary.spills,
        compiled.metadata.shared,
        len(compiled.asm["cubin"]),
        all(sweep.load >= 16 for sweep in sweeps) and bool(sweeps),
        sweeps,
    )


def table() -> Iterator[tuple[Row, str, Measured]]:
    """Compile every named row for every target."""
    for row in ROWS:
        for name, target in TARGETS.items():
            yield row, name, measure(row, target)


def main() -> int:
    """Print the table; 1 where an NVIDIA kernel spills or is over its budget."""
    print(
        f"triton {triton.__version__}\n"
        "| kernel | variant | target | registers | spills | shared, B | binary, B | bytes a load "
        "| instructions an element | budget |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    faults = []
    for row, target, got in table():
        if target != "gfx942" and got.spills:
            faults.append(f"{row.kernel}, {row.name}, {target}: spills registers")
        if row.budget is not None and got.instructions > row.budget:
            faults.append(f"{row.kernel}, {row.name}, {target}: {got.instructions:.1f} instructions an element")
        loads = "/".join(str(sweep.load) for sweep in got.sweeps) or ("16" if got.wide_loads else "-")
        each = " + ".join(f"{sweep.instructions:.1f}" for sweep in got.sweeps) or "-"
        print(
            f"| {row.kernel} | {row.name} | {target} | {got.registers} | {got.spills} | {got.shared} | {got.binary} "
            f"| {loads} | {each} | {row.budget or '-'} |",
            flush=True,
        )
    print("\n".join(faults) or "no spills; every budget is kept")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
