"""Resident memory of the loss, measured in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from efface_kernels.linear_loss.wide_logits import _has_fast_bfloat16

SCRIPT = """
import json, torch
from efface_kernels import Head, Kind, ReferenceRows, SequenceRule, Term, linear_sequence_loss

def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

def loss(n, d, v, chunk_rows):
    hidden, reference = (torch.randn(n, d).bfloat16() for _ in range(2))
    weight, frozen = (torch.randn(v, d).bfloat16() for _ in range(2))
    hidden.requires_grad_(), weight.requires_grad_()
    targets, offsets = torch.randint(v, (n,)), list(range(0, n + 1, 32))
    terms = SequenceRule.of(torch.zeros(len(offsets) - 1, dtype=torch.int8), {0: Term(Kind.NPO, beta=0.1)})
    def run():
        out = linear_sequence_loss(hidden, weight, targets, offsets, terms,
                                   reference=ReferenceRows(reference, Head(frozen)), chunk_rows=chunk_rows)
        return torch.autograd.grad(out.loss, [hidden, weight])
    return run

loss(64, 16, 64, None)()  # libraries and thread stacks
run = loss(N, D, V, CHUNK)
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = status("VmRSS")
gradients = run()
print(json.dumps(status("VmHWM") - before))
"""


SLACK = 32 << 20  # the GEMM library's own buffers


def peak(n: int, d: int, v: int, chunk_rows: int | None) -> int:
    code = SCRIPT.replace("loss(N, D, V, CHUNK)", f"loss({n}, {d}, {v}, {chunk_rows})")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(json.loads(done.stdout))


LINUX = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")


@LINUX
@pytest.mark.parametrize("chunk_rows", [1024, 256])
def test_peak_memory_is_two_chunks_and_the_gradients(chunk_rows: int) -> None:
    n, d, v = 1024, 128, 32000
    chunk = chunk_rows * v * 2  # bf16; policy and reference
    gradients = v * d * 2 + n * d * 2
    # several chunks sum dW in fp32, from a product in bf16
    sums = 0 if chunk_rows >= n else v * d * (4 + 2)
    assert peak(n, d, v, chunk_rows) <= 2 * chunk + gradients + sums + SLACK


@LINUX
@pytest.mark.skipif(
    not _has_fast_bfloat16(), reason="without bf16 instructions another GEMM runs, for minutes, with buffers of its own"
)
def test_one_chunk_takes_no_more_than_chunks_would() -> None:
    """R + D rows with a live reference, all in one chunk, within what chunks of R = 2048 rows are allowed."""
    n, d, v = 2048 + 512, 512, 32000
    assert peak(n, d, v, None) <= 2 * 2048 * v * 2 + v * d * (4 + 2) + n * d * 2 + SLACK
