"""The Triton kernels compile for GPUs that are not here, and spill no registers there."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.mark.slow
def test_every_kernel_compiles_without_spills_and_with_wide_loads() -> None:
    """In a process of its own: under TRITON_INTERPRET, as these tests run, there is no compiler."""
    path = os.pathsep.join(str(ROOT / folder) for folder in ("engine", "kernels", "."))
    environment = {**os.environ, "PYTHONPATH": path}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "benchmarks.compile_only"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("|")]
    kernels = {"row_pass", "distribution_pass", "sequence_loss"}
    rows = [line for line in lines if line[0] in kernels]
    assert {(line[0], line[2]) for line in rows} == set(
        itertools.product(kernels, ("sm_80", "sm_90", "sm_100", "gfx942"))
    )
    for kernel, name, target, _registers, spills, _shared, _size, wide in rows:
        assert spills == "0", (kernel, name, target)
        # The rows of an odd vocabulary are not aligned; those of a vocabulary that 8 divides have 16-byte loads.
        if kernel != "sequence_loss":  # which reads a few numbers
            assert (wide == "yes") == ("V =" not in name), (kernel, name, target)


def test_importing_the_passes_imports_no_triton() -> None:
    code = "import sys, efface_kernels.row_pass, efface_kernels.distribution_pass; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
