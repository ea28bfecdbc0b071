"""Tests of logits as a pair of bf16 numbers: where they are used, their accuracy, and the loss with both kinds."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from efface_kernels import Head, ReferenceRows, linear_distribution_loss, memory
from efface_kernels.linear_loss import wide_logits
from efface_kernels.linear_loss.wide_logits import WideLogits
from support import oracle
from support.oracle import Case, Problem

CASES = (
    Case("one row", (1,)),
    Case("one row of many products", (1,), hidden_size=4096, vocabulary=300),
    Case("many products", (19,), hidden_size=4096, vocabulary=1000, chunk_rows=8),
    Case("several chunks", (11,), chunk_rows=4),
    Case("prime vocabulary", (7,), vocabulary=7, chunk_rows=5),
    Case("GPT-2's vocabulary", (3,), vocabulary=50257, hidden_size=8, chunk_rows=2),
    Case("soft-cap", (8,), softcap=2.0, chunk_rows=3),
    Case("memorised targets", (9,), scale=6.0, chunk_rows=6),
)


@pytest.fixture(params=["pairs", "fp32"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Force how bf16 heads without a bias compute their logits, independent of the machine."""
    if request.param == "pairs" and not wide_logits._subtracts_before_rounding(64):
        pytest.skip("this machine's bf16 GEMM rounds before it subtracts")
    monkeypatch.setattr(wide_logits, "_has_fast_bfloat16", lambda: request.param == "pairs")
    return str(request.param)


@pytest.fixture(params=["torch", "native"])
def cpu_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def loss_of(
    case: Case, problem: Problem, backend: str = "auto", *, shift: float = 0.0, bias: Tensor | None = None
) -> Tensor:
    reference = ReferenceRows(problem.reference_hidden, Head(problem.reference_weight, bias, 5.0))
    return linear_distribution_loss(
        problem.hidden,
        problem.weight,
        problem.targets,
        0.25,
        reference,
        shift=shift,
        cross_entropy=shift != 0,
        bias=problem.bias,
        softcap=case.softcap,
        chunk_rows=case.chunk_rows,
        backend=backend,
    ).loss


def gold_of(case: Case, problem: Problem, shift: float) -> Tensor:
    logits = oracle.capped_logits(problem.hidden, problem.weight, problem.bias, case.softcap)
    frozen = oracle.capped_logits(problem.reference_hidden, problem.reference_weight, None, 5.0)
    kl, entropy = oracle.divergences(logits, frozen, problem.targets, shift)
    return 0.25 * (kl + entropy if shift else kl).sum()


@pytest.mark.parametrize("shift", [0.0, 10.0])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_either_way_is_as_exact_as_eager(way: str, cpu_backend: str, case: Case, shift: float) -> None:
    problem = oracle.make(case, torch.bfloat16)
    exact = oracle.exact(problem)
    gold, eager = gold_of(case, exact, shift), gold_of(case, problem, shift)
    ours = loss_of(case, problem, cpu_backend, shift=shift)
    torch.testing.assert_close(ours.double(), gold, rtol=2e-5, atol=2e-6)
    results = [
        torch.autograd.grad(loss, list(given.leaves().values()))
        for loss, given in ((ours, problem), (eager, problem), (gold, exact))
    ]
    for name, mine, torchs, golds in zip(problem.leaves(), *results, strict=True):
        oracle.assert_as_exact(f"d{name}", mine, torchs, golds, torch.bfloat16)


@pytest.mark.parametrize(
    ("rows", "depth", "vocabulary"),
    [(1, 8, 7), (1, 4096, 500), (3, 5, 2), (16, 16, 16), (33, 4096, 1000), (64, 1000, 5025), (5, 64, 50257)],
)
def test_a_pair_has_17_bits(rows: int, depth: int, vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide_logits, "_has_fast_bfloat16", lambda: True)
    if not wide_logits._subtracts_before_rounding(depth):
        pytest.skip("this machine's bf16 GEMM rounds before it subtracts")
    hidden, weight = torch.randn(rows, depth).bfloat16(), torch.randn(vocabulary, depth).bfloat16()
    logits = WideLogits(hidden, Head(weight), memory.BufferPool(), rows, pairs=True)(slice(0, rows))
    assert logits.residual is not None
    exact = hidden.double() @ weight.double().t()
    error = (logits.values.double() + logits.residual.double() - exact).abs()
    # half of the residual's last place, plus the rounding of the fp32 sum
    assert (error <= 2**-17 * exact.abs() + 2**-20 * exact.abs().max()).all()


def test_models_of_two_ways_compare(way: str, cpu_backend: str) -> None:
    """A bias or another dtype: one model's logits are pairs, the other's fp32."""
    case = Case("mixed", (7,), vocabulary=501, hidden_size=32, chunk_rows=3)
    for policy_bias, reference_bias, other in (
        (True, False, torch.bfloat16),
        (False, True, torch.bfloat16),
        (False, False, torch.float32),
        (False, False, torch.float16),
    ):
        problem = oracle.make(replace(case, bias=policy_bias), torch.bfloat16)
        problem.reference_hidden = problem.reference_hidden.to(other)
        problem.reference_weight = problem.reference_weight.to(other)
        bias = torch.zeros(501, dtype=other) if reference_bias else None
        exact = oracle.exact(problem)
        gold = gold_of(case, exact, 0.0)
        ours = loss_of(case, problem, cpu_backend, bias=bias)
        torch.testing.assert_close(ours.double(), gold, rtol=2e-5, atol=2e-6)
        golds = torch.autograd.grad(gold, list(exact.leaves().values()))
        for mine, expected in zip(torch.autograd.grad(ours, list(problem.leaves().values())), golds, strict=True):
            assert oracle.rms(mine.double() - expected) < 8e-3 * oracle.rms(expected)


def test_fp32_and_fp16_policies_beside_a_bf16_reference(way: str, cpu_backend: str) -> None:
    """P overwrites the policy's logits or, in fp16, the reference's bf16 values."""
    case = Case("other", (7,), vocabulary=501, hidden_size=32, chunk_rows=3)
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float16, 2e-3)):
        problem = oracle.make(case, dtype)
        problem.reference_hidden = problem.reference_hidden.bfloat16()
        problem.reference_weight = problem.reference_weight.bfloat16()
        exact = oracle.exact(problem)
        gold, ours = gold_of(case, exact, 0.0), loss_of(case, problem, cpu_backend)
        golds = torch.autograd.grad(gold, list(exact.leaves().values()))
        for mine, expected in zip(torch.autograd.grad(ours, list(problem.leaves().values())), golds, strict=True):
            assert oracle.rms(mine.double() - expected) < tolerance * oracle.rms(expected)


def test_padded_rows_of_a_workspace_change_nothing(way: str, cpu_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("padded", (7,), vocabulary=33, softcap=3.0, chunk_rows=3)
    problem = oracle.make(case, torch.bfloat16)
    expected = loss_of(case, problem, cpu_backend, shift=1.0)
    wanted = torch.autograd.grad(expected, list(problem.leaves().values()))

    def padded(_pool: memory.BufferPool, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.full((rows, columns + 3), torch.nan, dtype=dtype, device=device)[:, :columns]

    monkeypatch.setattr(memory.BufferPool, "matrix", padded)
    got = loss_of(case, problem, cpu_backend, shift=1.0)
    torch.testing.assert_close(got, expected)
    eps = torch.finfo(torch.bfloat16).eps  # another stride can select another GEMM kernel
    for mine, before in zip(torch.autograd.grad(got, list(problem.leaves().values())), wanted, strict=True):
        torch.testing.assert_close(mine, before, rtol=4 * eps, atol=4 * eps * oracle.rms(before))


def test_a_model_beside_itself_has_no_gradient_at_all(way: str, cpu_backend: str) -> None:
    """Equal products are rounded to equal pairs."""
    hidden, weight = torch.randn(9, 32).bfloat16().requires_grad_(), torch.randn(999, 32).bfloat16().requires_grad_()
    frozen = ReferenceRows(hidden.detach(), Head(weight.detach()))
    loss = linear_distribution_loss(
        hidden, weight, torch.zeros(9, dtype=torch.int64), 1.0, frozen, chunk_rows=4, backend=cpu_backend
    ).loss
    assert loss.abs() < 1e-6
    for gradient in torch.autograd.grad(loss, [hidden, weight]):
        assert not gradient.any()


def test_nan_stays_in_its_row(way: str, cpu_backend: str) -> None:
    problem = oracle.make(Case("nan", (4,), vocabulary=50), torch.bfloat16)
    problem.reference_hidden[2, 0] = float("nan")
    reference = ReferenceRows(problem.reference_hidden, Head(problem.reference_weight))
    out = linear_distribution_loss(problem.hidden, problem.weight, problem.targets, 1.0, reference, backend=cpu_backend)
    assert out.divergence.isnan().tolist() == [False, False, True, False]
    gradient = torch.autograd.grad(out.loss, problem.hidden)[0]
    assert gradient.isnan().any(1).tolist() == [False, False, True, False]


def test_empty_batch(way: str, cpu_backend: str) -> None:
    hidden = torch.randn(0, 4).bfloat16().requires_grad_()
    weight = torch.randn(7, 4).bfloat16().requires_grad_()
    reference = ReferenceRows(torch.randn(0, 3).bfloat16(), Head(torch.randn(7, 3).bfloat16()))
    loss = linear_distribution_loss(
        hidden, weight, torch.zeros(0, dtype=torch.int64), 0.5, reference, backend=cpu_backend
    ).loss
    loss.backward()
    assert loss == 0
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_pairs_are_for_bf16_heads_without_a_bias_on_fast_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias = torch.randn(7, 4), torch.randn(7)
    monkeypatch.setattr(wide_logits, "_subtracts_before_rounding", lambda _: True)
    monkeypatch.setattr(wide_logits, "_has_fast_bfloat16", lambda: True)

    def residual(dtype: torch.dtype, *, biased: bool = False, pairs: bool = True) -> Tensor | None:
        head = Head(weight.to(dtype), bias.to(dtype) if biased else None)
        return WideLogits(torch.randn(2, 4).to(dtype), head, memory.BufferPool(), 2, pairs=pairs)(slice(0, 2)).residual

    assert residual(torch.bfloat16) is not None
    assert residual(torch.bfloat16, pairs=False) is None
    assert residual(torch.bfloat16, biased=True) is None
    assert residual(torch.float16) is None
    assert residual(torch.float32) is None
    monkeypatch.setattr(wide_logits, "_subtracts_before_rounding", lambda _: False)
    assert residual(torch.bfloat16) is None


def test_a_gemm_that_rounds_first_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounded(_head: Head, hidden: Tensor, logits: Tensor, workspace: Tensor) -> Tensor:
        return workspace.copy_(hidden @ _head.weight.t() - logits)

    monkeypatch.setattr(Head, "residual", rounded)
    assert not wide_logits._subtracts_before_rounding.__wrapped__(64)
