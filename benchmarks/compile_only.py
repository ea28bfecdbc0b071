"""Compile the Triton kernels for absent GPUs and print their resources: ``python -m benchmarks.compile_only``.

For NVIDIA targets, the machine code (SASS) is read with ``cuobjdump``, which Triton ships. The command does not work
under TRITON_INTERPRET, which replaces the compiler. The exit code is 1 if an NVIDIA kernel spills registers or needs
more instructions per element than its budget.
"""

import itertools
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

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
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?);\s")
_BRANCH = re.compile(r"\bBRA\b.*?0x([0-9a-f]+)")
_LOAD = re.compile(r"\bLDG\.\S+")
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}  # bytes of a load; 4 without a suffix
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64"}


@dataclass(frozen=True)
class Sweep:
    """The cost of one innermost loop that sweeps over the elements of a row."""

    instructions: float  # per element
    load: int  # bytes of the narrowest load


@dataclass(frozen=True)
class Binary:
    """A compiled kernel as machine code for the GPU."""

    registers: int
    spills: int  # bytes of stack and local memory; a kernel without local arrays uses them only for spills
    loops: tuple[tuple[str, ...], ...]  # instructions of each innermost loop with loads, in program order

    def sweeps(self, element_bytes: Sequence[int]) -> tuple[Sweep, ...]:
        """Return the cost of each loop, given the bytes that each loop reads per element.

        The compiler can unroll a loop, so the elements per iteration are computed from the bytes that it loads.

        Raises:
            ValueError: the kernel has another number of loops with loads.
        """
        if len(self.loops) != len(element_bytes):
            raise ValueError(f"expected {len(element_bytes)} loops with loads, got {len(self.loops)}")
        sweeps = []
        for loop, size in zip(self.loops, element_bytes, strict=True):
            loads = [_width(load) for each in loop for load in _LOAD.findall(each)]
            sweeps.append(Sweep(len(loop) * size / sum(loads), min(loads)))
        return tuple(sweeps)


def read_binary(cubin: bytes, code: str) -> Binary:
    """Return the registers, spills and loops of a binary, given its disassembled code."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(cubin)
        usage = _tool("cuobjdump", "-res-usage", binary)
    registers, stack, local = (int(re.findall(rf"\b{name}:(\d+)", usage)[-1]) for name in ("REG", "STACK", "LOCAL"))
    return Binary(registers, stack + local, _loops(code))


def disassemble(cubins: Sequence[bytes], target: GPUTarget) -> list[str]:
    """Return the instructions of each binary, a line each.

    ``nvdisasm`` takes 0.6 s to start, so one call gets the code of all binaries in one file, one after the other.
    """
    codes = [_code(cubin) for cubin in cubins]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "code.bin"
        file.write_bytes(b"".join(codes))
        # from 9.0 on, Triton compiles for the variant of the architecture that has all features of the one GPU
        text = _tool("nvdisasm", "--binary", f"SM{target.arch}{'a' if target.arch >= 90 else ''}", file)
    lines = iter([line for line in text.splitlines(keepends=True) if _INSTRUCTION.search(line)])
    return ["".join(itertools.islice(lines, len(code) // 16)) for code in codes]  # an instruction has 16 bytes


def _tool(name: str, *words: str | Path) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([tool, *words], check=True, capture_output=True, text=True).stdout


def _code(cubin: bytes) -> bytes:
    """Return the ``.text`` section of a kernel's binary, a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    count, names = struct.unpack_from("<2H", cubin, 0x3C)
    # name, type, flags, address, offset, size
    sections = [struct.unpack_from("<2I4Q", cubin, table + 64 * place) for place in range(count)]
    start = sections[names][4]
    (code,) = [each for each in sections if cubin.startswith(b".text.", start + each[0])]
    return cubin[code[4] : code[4] + code[5]]


def _loops(code: str) -> tuple[tuple[str, ...], ...]:
    """Return the bodies of the innermost loops with loads; a body spans a backward branch and its target."""
    places = [(int(at, 16), text) for at, text in _INSTRUCTION.findall(code)]
    spans = [
        (int(branch[1], 16), at)
        for at, text in places
        if (branch := _BRANCH.search(text)) is not None and int(branch[1], 16) < at
    ]
    inner = [
        (start, end)
        for start, end in spans
        if not any((start, end) != other and start <= other[0] and other[1] <= end for other in spans)
    ]
    bodies = [tuple(text for at, text in places if start <= at <= end) for start, end in inner]
    return tuple(body for body in bodies if any(_LOAD.search(text) for text in body))


def _width(load: str) -> int:
    return next((_WIDTHS[part] for part in load.split(".") if part in _WIDTHS), 4)


@dataclass(frozen=True)
class Variant:
    """A named variant of a kernel: the parameters that change its machine code."""

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
    budget: float | None = None  # instructions per element, summed over all sweeps

    @property
    def stride(self) -> int:
        """Elements from row to row, as in the workspaces of the loss (``memory.aligned``)."""
        return -(-self.vocabulary // 16) * 16

    @property
    def sweeps(self) -> tuple[int, ...]:
        """For each sweep over whole blocks, the bytes that it reads per element."""
        own, other = self.dtype.itemsize, 0 if self.reference is None else self.reference.itemsize
        if self.kernel == "sequence_loss" or self.vocabulary < 64:  # tiny inputs, no whole block
            return ()
        if self.kernel == "distribution_pass":
            return (own + other,) * 2
        if self.kernel == "scale_pass":
            return (own,)
        return (*[other] * (other > 0), *[own] * (2 if self.gradient else 1))

    def source(self, warp_size: int) -> tuple[ASTSource, int]:
        """Return the source for Triton to compile, and the number of warps."""
        return BUILDS[self.kernel](self, warp_size)


@dataclass(frozen=True)
class Measured:
    """The resources of a compiled kernel, as reported by the vendor's tools."""

    registers: int
    spills: int  # spills to memory, in registers or bytes depending on the tool; 0: none
    shared: int
    binary: int
    wide_loads: bool  # every load is 16 bytes wide
    sweeps: tuple[Sweep, ...] = ()  # only for NVIDIA targets

    @property
    def instructions(self) -> float:
        """Instructions per element, summed over all sweeps."""
        return sum(sweep.instructions for sweep in self.sweeps)


# Each budget is slightly above the instruction count with triton 3.7.1 on the worst of the three NVIDIA targets.
_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
ROWS = (
    Variant("row_pass", "bf16", _BF16, budget=16),
    Variant("row_pass", "bf16 + bf16", _BF16, _BF16, budget=24),
    Variant("row_pass", "bf16 + fp32", _BF16, _FP32, budget=24),
    Variant("row_pass", "bf16 + bf16, no gradient", _BF16, _BF16, gradient=False, budget=16),
    Variant("row_pass", "bf16 + bf16, soft-cap", _BF16, _BF16, softcap=30.0, budget=76),
    Variant("row_pass", "fp16 + fp16", _FP16, _FP16, budget=24),
    Variant("row_pass", "fp32 + fp32", _FP32, _FP32, budget=24),
    Variant("row_pass", "fp32 + fp32, soft-cap", _FP32, _FP32, softcap=30.0, budget=76),
    Variant("row_pass", "bf16, persistent", _BF16, persistent=True, budget=16),
    Variant("row_pass", "bf16 + bf16, persistent", _BF16, _BF16, persistent=True, budget=24),
    Variant("row_pass", "bf16, V = 50257", _BF16, vocabulary=50257, budget=16),
    Variant("distribution_pass", "fp32 + fp32 to bf16", _FP32, _FP32, out=_BF16, budget=34),
    Variant("distribution_pass", "fp32 + fp32 to bf16, shift", _FP32, _FP32, out=_BF16, shift=10.0, budget=46),
    Variant("distribution_pass", "fp32 + fp32 to bf16, soft-cap", _FP32, _FP32, out=_BF16, softcap=30.0, budget=96),
    Variant(
        "distribution_pass", "fp32 + fp32 to bf16, V = 50257", _FP32, _FP32, out=_BF16, vocabulary=50257, budget=40
    ),
    Variant("distribution_pass", "fp32 + fp32", _FP32, _FP32, budget=34),
    Variant("distribution_pass", "fp32 + fp32, no gradient", _FP32, _FP32, gradient=False, budget=30),
    Variant("distribution_pass", "bf16 + bf16", _BF16, _BF16, budget=38),
    Variant("distribution_pass", "fp16 + fp16", _FP16, _FP16, budget=38),
    Variant("row_pass", "bf16 + bf16, V = 1", _BF16, _BF16, vocabulary=1),
    Variant("scale_pass", "fp32 to bf16", _FP32, out=_BF16, budget=6),
    Variant("scale_pass", "bf16, in place", _BF16, budget=6),
    Variant("sequence_loss", "no reference", _FP32, reference=None),
    Variant("sequence_loss", "live reference", _FP32, reference=_FP32),
    Variant("sequence_loss", "cached reference", _FP32, reference=torch.float64),
)


def _source(kernel: Any, signature: dict[str, str], values: dict[str, Any], integers: dict[str, int]) -> ASTSource:
    # Specialise like the launcher: an integer 1 is a constant, and multiples of 16 are marked as divisible.
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
    """Return whether the launcher never specialises on the argument's alignment."""
    return bool(parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)


def _row_pass(row: Variant, warp_size: int) -> tuple[ASTSource, int]:
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


def _distribution_pass(row: Variant, warp_size: int) -> tuple[ASTSource, int]:
    reference = row.reference or row.dtype
    config = distribution_config(row.vocabulary, row.dtype, reference, warp_size)
    integers = {"stride": row.stride, "reference_stride": row.stride, "v": row.vocabulary}
    # with a half-precision output, P overwrites the reference's rows
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


def _sequence_loss(row: Variant, warp_size: int) -> tuple[ASTSource, int]:  # noqa: ARG001 - one warp on every target
    integers = {"reference_rows": 4095}
    signature = {"Offsets": "*i64", "Roles": "*i8", "Table": "*fp64", "reference_rows": "i32"}
    signature |= dict.fromkeys(("Logprobs", "Terms", "Sums", "Coefficients"), "*fp32")
    given: dict[str, Any] = {"ReferenceLogprobs": None, "ReferenceSums": None}
    if row.reference is not None:  # the cached reference sums are fp64
        signature["ReferenceSums"] = "*fp32"
        del given["ReferenceSums"]
    if row.reference == torch.float32:
        signature["ReferenceLogprobs"] = "*fp32"
        del given["ReferenceLogprobs"]
    values = {**given, "EPS": torch.finfo(torch.float32).eps, "BLOCK": LAUNCH.block}
    return _source(sequence_loss_kernel, signature, values, integers), LAUNCH.num_warps


def _scale_pass(row: Variant, warp_size: int) -> tuple[ASTSource, int]:
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


def measure(rows: Sequence[Variant], target: GPUTarget) -> list[Measured]:
    """Compile kernels for one GPU."""
    made = []
    for row in rows:
        source, warps = row.source(target.warp_size)
        made.append(triton.compile(source, target=target, options={"num_warps": warps}))
    if target.backend == "hip":
        return [_measured_of_amd(each) for each in made]
    codes = disassemble([each.asm["cubin"] for each in made], target)
    return [_measured(*each) for each in zip(rows, made, codes, strict=True)]


def _measured_of_amd(compiled: Any) -> Measured:
    text = compiled.asm["amdgcn"]
    number = {key: int(value) for key, value in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", text)}
    return Measured(
        number["vgpr_count"],
        number["vgpr_spill_count"],
        compiled.metadata.shared,
        len(compiled.asm["hsaco"]),
        "global_load_dwordx4" in text or "buffer_load_dwordx4" in text,
    )


def _measured(row: Variant, compiled: Any, code: str) -> Measured:
    binary = read_binary(compiled.asm["cubin"], code)
    sweeps = binary.sweeps(row.sweeps) if row.sweeps else ()
    return Measured(
        binary.registers,
        binary.spills,
        compiled.metadata.shared,
        len(compiled.asm["cubin"]),
        all(sweep.load >= 16 for sweep in sweeps) and bool(sweeps),
        sweeps,
    )


def table() -> Iterator[tuple[Variant, str, Measured]]:
    """Compile every named row for every target."""
    columns = [measure(ROWS, target) for target in TARGETS.values()]
    for row, *measured in zip(ROWS, *columns, strict=True):
        for name, each in zip(TARGETS, measured, strict=True):
            yield row, name, each


def main() -> int:
    """Print the table; return 1 if an NVIDIA kernel spills or exceeds its budget."""
    print(
        f"triton {triton.__version__}\n"
        "| kernel | variant | target | registers | spills | shared, B | binary, B | bytes per load "
        "| instructions per element | budget |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    faults = []
    for row, target, got in table():
        if target != "gfx942" and got.spills:
            faults.append(f"{row.kernel}, {row.name}, {target}: spills registers")
        if row.budget is not None and got.instructions > row.budget:
            faults.append(f"{row.kernel}, {row.name}, {target}: {got.instructions:.1f} instructions per element")
        loads = "/".join(str(sweep.load) for sweep in got.sweeps) or ("16" if got.wide_loads else "-")
        each = " + ".join(f"{sweep.instructions:.1f}" for sweep in got.sweeps) or "-"
        print(
            f"| {row.kernel} | {row.name} | {target} | {got.registers} | {got.spills} | {got.shared} | {got.binary} "
            f"| {loads} | {each} | {row.budget or '-'} |",
            flush=True,
        )
    print("\n".join(faults) or "no kernel spills or exceeds its budget")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
