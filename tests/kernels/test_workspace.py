"""Tests on the CPU of workspaces as a GPU has them: padded rows, one for both models, fp32 sums; and their memory."""

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from efface_kernels import Head, Kind, ReferenceRows, SequenceRule, Term, linear_sequence_loss, memory
from efface_kernels.linear_loss import chunks, look
from efface_kernels.linear_loss.wide_logits import _has_fast_bfloat16
from support import oracle
from support.oracle import Case, Problem

CASES = (
    Case("odd vocabulary", (3, 1, 5, 2), vocabulary=7, bias=True, chunk_rows=5),
    Case("GPT-2's", (3, 4), vocabulary=50257, hidden_size=8, softcap=3.0, chunk_rows=4),
    Case("pieces", (9, 2), vocabulary=33, chunk_rows=4, reference_sequences=1),
)


def run(case: Case, problem: Problem, backend: str) -> list[Tensor]:
    rule = SequenceRule.of(
        torch.zeros(len(case.lengths), dtype=torch.int8), {0: Term(Kind.NPO, 1 / len(case.lengths), beta=0.3)}
    )
    out = linear_sequence_loss(
        problem.hidden,
        problem.weight,
        problem.targets,
        problem.offsets,
        rule,
        bias=problem.bias,
        softcap=case.softcap,
        reference=ReferenceRows(problem.reference_hidden, Head(problem.reference_weight, None, case.softcap)),
        chunk_rows=case.chunk_rows,
        backend=backend,
    )
    return [out.loss.detach(), *torch.autograd.grad(out.loss, list(problem.leaves().values()))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_padded_rows_change_nothing(
    case: Case, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GEMMs write into a matrix with a row stride without touching the padding, so no temporary copy is made."""
    case = oracle.within_reach(case, backend)
    problem = oracle.make(case, dtype)
    expected, made = run(case, problem, backend), []

    def padded(_pool: memory.BufferPool, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        made.append(torch.full((rows, columns + 3), torch.nan, dtype=dtype, device=device))
        return made[-1][:, :columns]

    monkeypatch.setattr(memory.BufferPool, "matrix", padded)
    for got, want in zip(run(case, problem, backend), expected, strict=True):
        eps = torch.finfo(got.dtype).eps  # another stride can select another GEMM kernel
        torch.testing.assert_close(got, want, rtol=4 * eps, atol=4 * eps * oracle.rms(want))
    assert len(made) == 2
    for each in made:
        assert each[:, -3:].isnan().all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_workspace_for_both_models_changes_no_bit(
    case: Case, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = oracle.within_reach(case, backend)
    problem = oracle.make(case, torch.float32)
    lent, matrix = [], memory.BufferPool.matrix

    def noted(*arguments: object) -> Tensor:
        lent.append(arguments)
        return matrix(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(memory.BufferPool, "matrix", noted)
    results = []
    for shares in (False, True):
        monkeypatch.setattr(look, "shares_workspace", lambda *_, shares=shares: shares)
        results.append(run(case, problem, backend))
    assert len(lent) == 2 + 1
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_shared_head_sees_both_models_in_one_gemm(case: Case, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tied, frozen or adapter-free base head gives the same gradients as a copy of the head."""
    case = oracle.within_reach(case, backend)
    problem, calls, logits = oracle.make(case, torch.float64), [], Head.logits
    monkeypatch.setattr(Head, "logits", lambda *a: calls.append(1) or logits(*a))
    frozen = torch.randn(len(problem.reference_hidden), case.hidden_size, dtype=torch.float64)
    rule = SequenceRule.of(torch.zeros(len(case.lengths), dtype=torch.int8), {0: Term(Kind.NPO, beta=0.3)})
    results, counts = [], []
    bias = None if problem.bias is None else problem.bias.detach()
    for weight in (problem.weight.detach().clone(), problem.weight.detach()):
        calls.clear()
        out = linear_sequence_loss(
            problem.hidden, problem.weight, problem.targets, problem.offsets, rule,
            bias=problem.bias, softcap=case.softcap, reference=ReferenceRows(frozen, Head(weight, bias, 5.0)),
            chunk_rows=case.chunk_rows, backend=backend,
        )  # fmt: skip
        counts.append(len(calls))
        results.append([*out, *torch.autograd.grad(out.loss, list(problem.leaves().values()))])
    assert counts[1] < counts[0]
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-13)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "case", [*CASES, Case("reference for some", (3, 2, 4), reference_sequences=1, chunk_rows=4)], ids=str
)
def test_fresh_memory_full_of_nan_changes_nothing(case: Case, backend: str) -> None:
    case = oracle.within_reach(case, backend)
    problem = oracle.make(case, torch.float32)
    expected = run(case, problem, backend)
    memory.release_workspaces()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills every torch.empty with NaN
    try:
        assert torch.empty(3).isnan().all()
        got = run(case, problem, backend)
    finally:
        torch.use_deterministic_algorithms(False)
    for one, two in zip(got, expected, strict=True):
        assert torch.equal(one, two)


def test_when_models_share_a_workspace() -> None:
    assert not look.shares_workspace("cpu", 1 << 40, 512 << 20)
    assert not look.shares_workspace("cuda", 512 << 20, 512 << 20)
    assert look.shares_workspace("cuda", 1 << 30, 512 << 20)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sums_within_the_gemm(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 chunks accumulate in the GEMM's own fp32 sum, without a separate product. fp16 ones have a scale."""
    case = CASES[0]
    problem, calls = oracle.make(case, dtype), []
    expected = run(case, problem, "torch")

    def in_gemm(total: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
        calls.append(first)
        assert total.dtype == torch.float32
        product = left.float() @ right.float()
        total.copy_(product if first else total + product)

    assert not memory.accumulates_in_float32(torch.device("cpu"), dtype)
    monkeypatch.setattr(memory, "accumulates_in_float32", lambda *_: True)
    monkeypatch.setattr(memory, "_add_in_gemm", in_gemm)
    for got, want in zip(run(case, problem, "torch"), expected, strict=True):
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(got.float(), want.float(), rtol=4 * eps, atol=4 * eps * oracle.rms(want))
    # three chunks, each with dW and db
    assert calls == ([] if dtype == torch.float16 else [True, True, False, False, False, False])


def test_a_device_without_such_a_gemm_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("self and mat2 must have the same dtype")

    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, **k: zeros(*a, **{**k, "device": "cpu"}))
    find_out = memory.accumulates_in_float32.__wrapped__
    monkeypatch.setattr(memory, "_add_in_gemm", refuse)
    assert not find_out(torch.device("cuda", 0), torch.bfloat16)
    monkeypatch.setattr(memory, "_add_in_gemm", lambda *_, **__: None)
    assert find_out(torch.device("cuda", 0), torch.bfloat16)


@pytest.fixture
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "_known", {})
    monkeypatch.setattr(chunks, "_refused", set())


def refusing(limit: int, tried: list[int], n: int = 3000) -> Callable[[int], int]:
    """Return a function that runs out of memory if it is called with more than ``limit`` rows."""

    def run(rows: int) -> int:
        tried.append(rows)
        if min(rows, n) > limit:
            raise torch.OutOfMemoryError("no")
        return rows

    return run


@pytest.mark.usefixtures("_nothing_known")
def test_rows_are_halved_where_the_device_refuses_the_memory() -> None:
    hidden, head, tried = torch.zeros(3000, 1), Head(torch.zeros(1000, 1)), []
    assert chunks.run_within_memory(refusing(800, tried), None, hidden, head) == 512
    assert tried == [4096, 1280, 512]
    assert chunks.run_within_memory(refusing(800, tried), None, hidden, head) == 512  # remembered
    with pytest.raises(torch.OutOfMemoryError):
        chunks.run_within_memory(refusing(100, tried), None, hidden, head)
    assert tried[-1] == 256
    tried.clear()
    with pytest.raises(torch.OutOfMemoryError):  # explicit ``chunk_rows`` are not reduced
        chunks.run_within_memory(refusing(800, tried), 2000, hidden, head)
    assert tried == [2000]


@pytest.mark.usefixtures("_nothing_known")
def test_all_rows_are_one_chunk_where_that_takes_no_more_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "chunk_capacity", lambda *_: 2048)

    def rows(
        n: int, d: int, dtype: torch.dtype = torch.bfloat16, given: int | None = None, *, sums: bool = True
    ) -> int:
        hidden, head = (
            torch.empty(n, d, dtype=dtype, device="meta"),
            Head(torch.empty(999, d, dtype=dtype, device="meta")),
        )
        logits_bytes = (lambda some: 2 * 999 * some) if sums else None
        return chunks.run_within_memory(lambda some: some, given, hidden, head, sums_weight=logits_bytes)

    assert rows(2048 + 2 * 64, 64) == 2176  # the device has no GEMM that adds in fp32, so the sum needs a product
    assert rows(2048 + 2 * 64 + 1, 64) == 2048
    assert rows(100, 64) == 2048
    assert rows(2100, 64, sums=False) == 2048  # a frozen head
    assert rows(2100, 64, given=2048) == 2048
    for dtype in (torch.float16, torch.float32, torch.float64):  # fp16: a single chunk's scale needs the fp32 sum too
        assert rows(2100, 64, dtype) == 2048


@pytest.mark.usefixtures("_nothing_known")
def test_one_chunk_is_not_tried_again_where_it_was_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "default_chunk_rows", lambda *_: 2048)
    hidden, head = torch.zeros(3000, 512, dtype=torch.bfloat16), Head(torch.zeros(999, 512, dtype=torch.bfloat16))
    tried: list[int] = []

    def logits_bytes(rows: int) -> int:
        return 2 * 999 * rows

    for expected in ([3000, 2048, 1024], [1024]):
        tried.clear()
        assert chunks.run_within_memory(refusing(1500, tried), None, hidden, head, sums_weight=logits_bytes) == 1024
        assert tried == expected


@pytest.mark.parametrize("live", [False, True])
def test_the_layout_counts_what_the_loop_takes(live: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    lent, matrix = [], memory.BufferPool.matrix

    def noted(*arguments: object) -> Tensor:
        lent.append(matrix(*arguments))  # type: ignore[arg-type]
        return lent[-1]

    monkeypatch.setattr(memory.BufferPool, "matrix", noted)
    for shares, same, m in itertools.product((False, True), (False, True), (0, 3, 8)):
        lent.clear()
        monkeypatch.setattr(look, "shares_workspace", lambda *_, shares=shares: shares)
        hidden, head = torch.zeros(8, 4), Head(torch.zeros(11, 4))
        frozen = ReferenceRows(torch.zeros(m, 4), head if same else Head(torch.zeros(13, 4))) if live else None
        look.Models(hidden, head, frozen, 5, memory.BufferPool(), "torch")
        layout = look.Layout.of(5, hidden, head, frozen)
        assert layout.nbytes(hidden, head, frozen) == sum(each.nbytes for each in lent)


def test_free_memory_is_the_drivers_and_the_allocators(monkeypatch: pytest.MonkeyPatch) -> None:
    class Module:
        @staticmethod
        def mem_get_info(_device: torch.device) -> tuple[int, int]:
            return 100, 1000

        @staticmethod
        def memory_reserved(_device: torch.device) -> int:
            return 50

        @staticmethod
        def memory_allocated(_device: torch.device) -> int:
            return 20

        @staticmethod
        def get_device_properties(_device: torch.device) -> SimpleNamespace:
            return SimpleNamespace(total_memory=1000)

    monkeypatch.setattr(torch, "get_device_module", lambda _: Module)
    assert chunks.free_memory(torch.device("xpu")) == 130
    assert chunks.device_memory(torch.device("xpu")) == 1000
    assert chunks.free_memory(torch.device("cpu")) is chunks.device_memory(torch.device("cpu")) is None
    assert chunks.budget(torch.device("cpu")) == 128 << 20
    monkeypatch.setattr(torch, "get_device_module", lambda _: object)
    assert chunks.free_memory(torch.device("mps")) is chunks.device_memory(torch.device("mps")) is None
    assert chunks.budget(torch.device("mps")) == 512 << 20


def test_aligned_rows() -> None:
    device = torch.device("meta")
    for dtype, columns, stride in [(torch.bfloat16, 50257, 50272), (torch.float32, 7, 16), (torch.float16, 16, 16)]:
        matrix = memory.aligned(3, columns, dtype, device)
        assert matrix.shape == (3, columns)
        assert matrix.stride() == (stride, 1)
    assert memory.aligned(3, 7, torch.float32, torch.device("cpu")).is_contiguous()


# ---- resident memory of the loss, measured in a subprocess


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


SLACK = 32 << 20  # for buffers of the GEMM library


def peak(n: int, d: int, v: int, chunk_rows: int | None) -> int:
    code = SCRIPT.replace("loss(N, D, V, CHUNK)", f"loss({n}, {d}, {v}, {chunk_rows})")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(json.loads(done.stdout))


LINUX = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")


@LINUX
@pytest.mark.parametrize("chunk_rows", [1024, 256])
def test_peak_memory_is_two_chunks_and_the_gradients(chunk_rows: int) -> None:
    n, d, v = 1024, 32, 32000  # chunks dominate; d is small because a GEMM without bf16 instructions is slow
    chunk = chunk_rows * v * 2  # bf16, for policy and reference
    gradients = v * d * 2 + n * d * 2
    # several chunks sum dW in fp32, from a bf16 product
    sums = 0 if chunk_rows >= n else v * d * (4 + 2)
    assert peak(n, d, v, chunk_rows) <= 2 * chunk + gradients + sums + SLACK


@LINUX
@pytest.mark.skipif(
    not _has_fast_bfloat16(), reason="without bf16 instructions, another GEMM with its own buffers runs for minutes"
)
def test_one_chunk_takes_no_more_than_chunks_would() -> None:
    """R + D rows with a live reference in one chunk use no more memory than chunks of R = 2048 rows can."""
    n, d, v = 2048 + 512, 512, 32000
    assert peak(n, d, v, None) <= 2 * 2048 * v * 2 + v * d * (4 + 2) + n * d * 2 + SLACK
