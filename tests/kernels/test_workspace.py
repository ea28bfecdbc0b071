"""Workspaces as a GPU has them, tried on the CPU: padded rows, one for both models, fp32 sums within the GEMM."""

import pytest
import torch
from torch import Tensor

import oracle
from efface_kernels import Head, Kind, ReferenceRows, SequenceRule, Term, linear_sequence_loss, memory
from efface_kernels.linear_loss import models, workspace
from oracle import Case, Problem

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
    """GEMMs write into a matrix with a row stride and leave the padding alone: there is no temporary copy."""
    problem = oracle.make(case, dtype)
    expected, made = run(case, problem, backend), []

    def padded(_loan: memory.Loan, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        made.append(torch.full((rows, columns + 3), torch.nan, dtype=dtype, device=device))
        return made[-1][:, :columns]

    monkeypatch.setattr(memory.Loan, "matrix", padded)
    for got, want in zip(run(case, problem, backend), expected, strict=True):
        eps = torch.finfo(got.dtype).eps  # another stride may be another GEMM kernel
        torch.testing.assert_close(got, want, rtol=4 * eps, atol=4 * eps * oracle.rms(want))
    assert len(made) == 2
    for each in made:
        assert each[:, -3:].isnan().all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_workspace_for_both_models_changes_no_bit(
    case: Case, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = oracle.make(case, torch.float32)
    lent, matrix = [], memory.Loan.matrix

    def noted(*arguments: object) -> Tensor:
        lent.append(arguments)
        return matrix(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(memory.Loan, "matrix", noted)
    results = []
    for shares in (False, True):
        monkeypatch.setattr(models, "shares_workspace", lambda *_, shares=shares: shares)
        results.append(run(case, problem, backend))
    assert len(lent) == 2 + 1
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_shared_head_sees_both_models_in_one_gemm(case: Case, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tied, frozen, or the base model with its adapter off: the same gradients as with a copy of the head."""
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


def test_who_shares_a_workspace() -> None:
    assert not models.shares_workspace("cpu", 1 << 40)
    assert not models.shares_workspace("cuda", 512 << 20)
    assert models.shares_workspace("cuda", 1 << 30)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sums_within_the_gemm(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 chunks go through the GEMM's own fp32 sum, without a product of their own; fp16 ones have a scale."""
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
    # three chunks, each of dW and db
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


def test_rows_are_halved_where_the_device_refuses_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "_known", {})
    hidden, head, tried = torch.zeros(3000, 1), Head(torch.zeros(1000, 1)), []

    def refuse_beyond(limit: int) -> object:
        def run(rows: int) -> int:
            tried.append(rows)
            if min(rows, 3000) > limit:
                raise torch.OutOfMemoryError("no")
            return rows

        return run

    assert workspace.run_within_memory(refuse_beyond(800), None, hidden, head) == 750
    assert tried == [4096, 1500, 750]
    assert workspace.run_within_memory(refuse_beyond(800), None, hidden, head) == 750  # remembered
    with pytest.raises(torch.OutOfMemoryError):
        workspace.run_within_memory(refuse_beyond(100), None, hidden, head)
    assert tried[-1] == 256
    tried.clear()
    with pytest.raises(torch.OutOfMemoryError):  # what was asked for is kept to
        workspace.run_within_memory(refuse_beyond(800), 2000, hidden, head)
    assert tried == [2000]


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

    monkeypatch.setattr(torch, "get_device_module", lambda _: Module)
    assert workspace.free_bytes(torch.device("xpu")) == 130
    assert workspace.free_bytes(torch.device("cpu")) is None
    monkeypatch.setattr(torch, "get_device_module", lambda _: object)
    assert workspace.free_bytes(torch.device("mps")) is None


def test_aligned_rows() -> None:
    device = torch.device("meta")
    for dtype, columns, stride in [(torch.bfloat16, 50257, 50272), (torch.float32, 7, 16), (torch.float16, 16, 16)]:
        matrix = memory.aligned(3, columns, dtype, device)
        assert matrix.shape == (3, columns)
        assert matrix.stride() == (stride, 1)
    assert memory.aligned(3, 7, torch.float32, torch.device("cpu")).is_contiguous()
