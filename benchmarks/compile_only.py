"""Compile the Triton kernels for absent GPUs and print what they take: ``python -m benchmarks.compile_only``.

Not under TRITON_INTERPRET, which replaces the compiler. Exits with 1 where an NVIDIA kernel spills registers.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from efface_kernels.distribution_pass.config import launch_config as distribution_config
from efface_kernels.distribution_pass.kernel import distribution_pass_kernel
from efface_kernels.row_pass.config import launch_config as row_config
from efface_kernels.row_pass.kernel import row_pass_kernel
from efface_kernels.sequence_loss.config import LAUNCH
from efface_kernels.sequence_loss.kernel import sequence_loss_kernel

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
    vocabulary: int = 128256

    def source(self, warp_size: int) -> tuple[ASTSource, int]:
        """Return what Triton compiles, and the number of warps."""
        builds = {"row_pass": _row_pass, "distribution_pass": _distribution_pass, "sequence_loss": _sequence_loss}
        return builds[self.kernel](self, warp_size)


@dataclass(frozen=True)
class Measured:
    """What a compiled kernel takes of a GPU, as its own tools say."""

    registers: int
    spills: int  # registers or bytes kept in memory; 0 or not
    shared: int
    binary: int
    wide_loads: bool  # 16 bytes at once


ROWS = (
    Row("row_pass", "bf16", torch.bfloat16),
    Row("row_pass", "bf16 + bf16", torch.bfloat16, torch.bfloat16),
    Row("row_pass", "bf16 + fp32", torch.bfloat16, torch.float32),
    Row("row_pass", "bf16 + bf16, no gradient", torch.bfloat16, torch.bfloat16, gradient=False),
    Row("row_pass", "bf16 + bf16, soft-cap", torch.bfloat16, torch.bfloat16, softcap=30.0),
    Row("row_pass", "fp16 + fp16", torch.float16, torch.float16),
    Row("row_pass", "fp32 + fp32", torch.float32, torch.float32),
    Row("row_pass", "fp32 + fp32, soft-cap", torch.float32, torch.float32, softcap=30.0),
    Row("row_pass", "bf16, V = 50257", torch.bfloat16, vocabulary=50257),
    Row("distribution_pass", "fp32 + fp32", torch.float32, torch.float32),
    Row("distribution_pass", "fp32 + fp32, soft-cap", torch.float32, torch.float32, softcap=30.0),
    Row("distribution_pass", "fp32 + fp32, no gradient", torch.float32, torch.float32, gradient=False),
    Row("distribution_pass", "bf16 + bf16", torch.bfloat16, torch.bfloat16),
    Row("distribution_pass", "fp16 + fp16", torch.float16, torch.float16),
    Row("row_pass", "bf16 + bf16, V = 1", torch.bfloat16, torch.bfloat16, vocabulary=1),
    Row("sequence_loss", "no reference", torch.float32, reference=None),
    Row("sequence_loss", "live reference", torch.float32, reference=torch.float32),
    Row("sequence_loss", "cached reference", torch.float32, reference=torch.float64),
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
    config = row_config(row.vocabulary, row.dtype, row.reference, warp_size)
    integers = dict.fromkeys(("stride", "v", "reference_stride", "reference_v"), row.vocabulary)
    integers["reference_rows"] = 4095
    signature = {"Logits": POINTERS[row.dtype], "Targets": "*i64", "Logprobs": "*fp32"}
    signature |= dict.fromkeys(integers, "i32")
    values: dict[str, Any] = {"SOFTCAP": row.softcap, "REFERENCE_SOFTCAP": row.softcap}
    values |= {"GRADIENT": row.gradient, "BLOCK": config.block}
    if row.reference is None:
        values |= {"Reference": None, "ReferenceLogprobs": None}
    else:
        signature |= {"Reference": POINTERS[row.reference], "ReferenceLogprobs": "*fp32"}
    return _source(row_pass_kernel, signature, values, integers), config.num_warps


def _distribution_pass(row: Row, warp_size: int) -> tuple[ASTSource, int]:
    config = distribution_config(row.vocabulary, row.dtype, warp_size)
    integers = dict.fromkeys(("stride", "reference_stride", "v"), row.vocabulary)
    signature = {"Logits": POINTERS[row.dtype], "Reference": POINTERS[row.reference or row.dtype], "Targets": "*i64"}
    signature |= {"Divergence": "*fp32", "Entropy": "*fp32"} | dict.fromkeys(integers, "i32")
    values = {"SHIFT": 10.0, "SOFTCAP": row.softcap, "REFERENCE_SOFTCAP": row.softcap}
    values |= {"GRADIENT": row.gradient, "BLOCK": config.block}
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
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "-res-usage", binary], check=True, capture_output=True, text=True).stdout
    # a kernel without local arrays has stack and local memory only for what it spills
    registers, stack, local = (int(re.findall(rf"\b{name}:(\d+)", usage)[-1]) for name in ("REG", "STACK", "LOCAL"))
    wide = re.search(r"ld\.global[.\w]*\.v4\.(b32|u32|f32)|ld\.global[.\w]*\.v2\.(b64|u64)", compiled.asm["ptx"])
    return Measured(registers, stack + local, compiled.metadata.shared, len(compiled.asm["cubin"]), wide is not None)


def table() -> Iterator[tuple[Row, str, Measured]]:
    """Compile every named row for every target."""
    for row in ROWS:
        for name, target in TARGETS.items():
            yield row, name, measure(row, target)


def main() -> int:
    """Print the table; 1 where an NVIDIA kernel spills."""
    print(
        f"triton {triton.__version__}\n"
        "| kernel | variant | target | registers | spills | shared, B | binary, B | 16 B loads |"
    )
    print("|---|---|---|---|---|---|---|---|")
    spilled = 0
    for row, target, got in table():
        spilled += got.spills > 0 and target != "gfx942"
        print(
            f"| {row.kernel} | {row.name} | {target} | {got.registers} | {got.spills} | {got.shared} | {got.binary} "
            f"| {'yes' if got.wide_loads else 'no'} |",
            flush=True,
        )
    return int(spilled > 0)


if __name__ == "__main__":
    sys.exit(main())
