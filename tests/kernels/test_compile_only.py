"""The Triton kernels compile for GPUs that are not here: no spills, and no more instructions than budgeted."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.mark.slow
def test_every_kernel_compiles_within_its_budget_of_instructions() -> None:
    """In a process of its own: under TRITON_INTERPRET, as these tests run, there is no compiler."""
    path = os.pathsep.join(str(ROOT / folder) for folder in ("engine", "kernels", "."))
    environment = {**os.environ, "PYTHONPATH": path}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "benchmarks.compile_only"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("|")]
    kernels = {"row_pass", "distribution_pass", "scale_pass", "sequence_loss"}
    rows = [line for line in lines if line[0] in kernels]
    assert {(line[0], line[2]) for line in rows} == set(
        itertools.product(kernels, ("sm_80", "sm_90", "sm_100", "gfx942"))
    )
    totals = {}
    for kernel, name, target, _registers, spills, _shared, _size, loads, instructions, budget in rows:
        case = (kernel, name, target)
        assert spills == "0", case
        if kernel == "sequence_loss" or name.endswith("V = 1"):  # which read a few numbers
            continue
        assert set(loads.split("/")) == {"16"}, case  # whatever the vocabulary: rows of a workspace are padded
        if target != "gfx942":
            totals[case] = sum(map(float, instructions.split(" + ")))
            assert totals[case] <= float(budget) + 0.1, case
    for target in ("sm_80", "sm_90", "sm_100"):
        assert totals["row_pass", "bf16", target] <= 16
        assert totals["row_pass", "bf16, persistent", target] <= 16
        assert totals["distribution_pass", "fp32 + fp32 to bf16", target] <= 34


SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;  /* 0x0 */
        /*0010*/                   LDG.E.64 R2, [R4.64] ;
        /*0020*/              @!P0 BRA 0x90 ;
        /*0030*/                   LDG.E.128 R8, [R2.64] ;
        /*0040*/                   LDG.E.EL.128 R12, [R2.64+0x10] ;
        /*0050*/                   FADD R0, R8, R12 ;
        /*0060*/              @P1  BRA 0x30 ;
        /*0070*/                   IADD3 R5, R5, 0x1, RZ ;
        /*0080*/              @P2  BRA 0x10 ;
        /*0090*/                   EXIT ;
        /*00a0*/                   BRA 0xa0;
"""


def test_loops_are_counted_by_what_they_load() -> None:
    from benchmarks import compile_only

    binary = compile_only.Binary(32, 0, compile_only._loops(SASS))
    (sweep,) = binary.sweeps([2])  # the inner loop: 4 instructions for 16 elements; the outer and the idle one are none
    assert (sweep.instructions, sweep.load) == (4 / 16, 16)
    with pytest.raises(ValueError, match="expected 2 loops that load, got 1"):
        binary.sweeps([2, 2])


def test_importing_the_passes_imports_no_triton() -> None:
    code = "import sys, efface_kernels.row_pass, efface_kernels.distribution_pass; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
