"""Tests of the distribution loss against the fp64 oracle, in every dtype and on every backend."""

import itertools

import pytest
import torch
from torch import Tensor

from efface_kernels import Head, ReferenceRows, linear_distribution_loss, memory, release_workspaces
from efface_kernels.linear_loss import chunks, wide_logits
from efface_kernels.linear_loss.chunks import plan_pieces
from efface_kernels.linear_loss.distribution_loss import DistributionLossOutput
from efface_kernels.linear_loss.look import DistributionLook
from support import oracle
from support.oracle import Case, LargestTensor, Problem

# NumPy warns of −inf − −inf in lanes that the interpreted kernel masks afterwards
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
UPSTREAM = 0.7
CASES = (
    Case("one row", (1,)),
    Case("one chunk", (9,)),
    Case("several chunks", (11,), chunk_rows=4),
    Case("workspace of one row", (3,), chunk_rows=1),
    Case("vocabulary of two", (5,), vocabulary=2),
    Case("prime vocabulary", (7,), vocabulary=7, chunk_rows=5),
    Case("Llama-2's vocabulary", (3,), vocabulary=32000, hidden_size=8, chunk_rows=2),
    Case("bias and soft-cap", (8,), bias=True, softcap=2.0, chunk_rows=3),
    Case("memorised targets", (9,), scale=6.0, chunk_rows=6),
)
# (shift, cross entropy): the KL retain term, then UNDIAL
KINDS = ((0.0, False), (10.0, True))


def row_weights(problem: Problem) -> Tensor:
    g = torch.Generator().manual_seed(2)
    n = len(problem.targets)
    weights = torch.rand(n, generator=g, dtype=torch.float64, device="cpu") / n
    weights[1::5] = 0
    return weights.to(problem.targets.device)


def oracle_loss(case: Case, problem: Problem, shift: float, *, cross_entropy: bool) -> Tensor:
    logits = oracle.capped_logits(problem.hidden, problem.weight, problem.bias, case.softcap)
    frozen = oracle.capped_logits(problem.reference_hidden, problem.reference_weight, None, 5.0)
    kl, entropy = oracle.divergences(logits, frozen, problem.targets, shift)
    return (row_weights(problem).to(kl.dtype) * (kl + entropy if cross_entropy else kl)).sum()


def run(
    case: Case, problem: Problem, shift: float = 0.0, *, cross_entropy: bool = False, backend: str = "auto"
) -> DistributionLossOutput:
    return linear_distribution_loss(
        problem.hidden,
        problem.weight,
        problem.targets,
        row_weights(problem),
        ReferenceRows(problem.reference_hidden, Head(problem.reference_weight, None, 5.0)),
        shift=shift,
        cross_entropy=cross_entropy,
        bias=problem.bias,
        softcap=case.softcap,
        chunk_rows=case.chunk_rows,
        backend=backend,
    )


def gradients(loss: Tensor, problem: Problem) -> dict[str, Tensor]:
    leaves = problem.leaves()
    return dict(zip(leaves, torch.autograd.grad(UPSTREAM * loss, list(leaves.values())), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_gradients_are_as_exact_as_eager(
    backend: str, case: Case, kind: tuple[float, bool], dtype: torch.dtype
) -> None:
    shift, cross_entropy = kind
    case = oracle.within_reach(case, backend)
    problem = oracle.make(case, dtype)
    exact = oracle.exact(problem)
    gold = oracle_loss(case, exact, shift, cross_entropy=cross_entropy)
    eager = oracle_loss(case, problem, shift, cross_entropy=cross_entropy)
    ours = run(case, problem, shift, cross_entropy=cross_entropy, backend=backend).loss
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    oracle.assert_as_exact("loss", ours.detach(), eager.detach(), gold.detach(), dtype)
    gold_gradients, eager_gradients = gradients(gold, exact), gradients(eager, problem)
    for name, gradient in gradients(ours, problem).items():
        assert gradient.dtype == dtype
        oracle.assert_as_exact(f"d{name}", gradient, eager_gradients[name], gold_gradients[name], dtype)


@pytest.mark.parametrize("case", [case for case in CASES if case.vocabulary < 100], ids=str)
def test_gradcheck(backend: str, case: Case) -> None:
    problem = oracle.make(case, torch.float64)
    leaves = problem.leaves()

    def loss(*tensors: Tensor) -> Tensor:
        mixed = Problem(**{**vars(problem), **dict(zip(leaves, tensors, strict=True))})
        return run(case, mixed, 2.0, cross_entropy=True, backend=backend).loss

    assert torch.autograd.gradcheck(loss, tuple(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_parts_are_those_of_fp32_logits(backend: str, dtype: torch.dtype) -> None:
    case = Case("parts", (7,), bias=True, chunk_rows=3)
    problem = oracle.make(case, dtype)
    exact = oracle.exact(problem)
    logits = oracle.capped_logits(exact.hidden, exact.weight, exact.bias, None).detach()
    frozen = oracle.capped_logits(exact.reference_hidden, exact.reference_weight, None, 5.0)
    kl, entropy = oracle.divergences(logits, frozen, problem.targets, 4.0)
    out = run(case, problem, 4.0, backend=backend)
    torch.testing.assert_close(out.divergence, kl.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.entropy, entropy.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.loss.detach(), (row_weights(problem) * kl).sum().float(), rtol=1e-5, atol=1e-6)
    assert not out.divergence.requires_grad
    assert not out.entropy.requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_model_beside_itself_has_neither_loss_nor_gradient(backend: str, dtype: torch.dtype) -> None:
    case = Case("itself", (9,), bias=True, vocabulary=999, hidden_size=32, chunk_rows=4)
    problem = oracle.make(case, dtype)
    assert problem.bias is not None
    frozen = ReferenceRows(problem.hidden.detach(), Head(problem.weight.detach(), problem.bias.detach()))
    out = linear_distribution_loss(
        problem.hidden, problem.weight, problem.targets, 1.0, frozen, bias=problem.bias, chunk_rows=4, backend=backend
    )
    assert out.loss.abs() < 1e-5
    for gradient in gradients(out.loss, problem).values():
        assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize(
    ("dtype", "apart", "pairs"),
    [
        (torch.float32, 1e-4, False),
        (torch.float16, 1e-4, False),
        (torch.bfloat16, 1e-4, False),
        (torch.bfloat16, 1e-3, True),  # a pair holds 17 bits of a logit, fp32 24
    ],
    ids=str,
)
def test_the_gradient_between_close_models_is_not_rounding(
    backend: str, dtype: torch.dtype, apart: float, pairs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logits differ by less than bf16 can resolve, and p − q is smaller than fp16 can represent."""
    if not pairs:
        monkeypatch.setattr(wide_logits, "_has_fast_bfloat16", lambda: False)
    case = Case("close", (12,), vocabulary=1500, hidden_size=24, chunk_rows=5)
    problem = oracle.make(case, dtype)
    frozen = problem.reference_hidden[:, :1] * 0 + problem.hidden.detach().float() * (1 + apart)
    problem.reference_hidden, problem.reference_weight = frozen.float(), problem.weight.detach().float()
    exact = oracle.exact(problem)
    results = []
    for given in (problem, exact):
        out = linear_distribution_loss(
            given.hidden,
            given.weight,
            given.targets,
            1.0,
            ReferenceRows(given.reference_hidden, Head(given.reference_weight)),
            chunk_rows=5,
            backend=backend,
        )
        scaled = out.loss * 2.0**14  # fp16's loss scale in mixed precision
        results.append(torch.autograd.grad(scaled, [given.hidden, given.weight]))
    for got, gold in zip(*results, strict=True):
        assert oracle.rms(got.double() - gold) < 0.02 * oracle.rms(gold)


@pytest.mark.parametrize("wanted", list(itertools.product((False, True), repeat=3)), ids=str)
def test_every_subset_of_gradients_is_the_same_gradient(wanted: tuple[bool, ...]) -> None:
    case = Case("subset", (9,), bias=True, chunk_rows=4)
    problem = oracle.make(case, torch.float64)
    everything = gradients(run(case, problem).loss, problem)
    chosen = {}
    for (name, leaf), want in zip(problem.leaves().items(), wanted, strict=True):
        leaf.requires_grad_(want)
        if want:
            chosen[name] = leaf
    loss = run(case, problem).loss
    assert loss.requires_grad == any(wanted)
    if chosen:
        for name, gradient in zip(chosen, torch.autograd.grad(UPSTREAM * loss, list(chosen.values())), strict=True):
            torch.testing.assert_close(gradient, everything[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("chunk_rows", [1, 2, 5, 100])
def test_the_chunk_size_changes_nothing_beyond_rounding(chunk_rows: int, dtype: torch.dtype) -> None:
    problem = oracle.make(Case("whole", (14,), bias=True), dtype)
    expected = run(Case("whole", (14,), bias=True), problem).loss
    got = run(Case("cut", (14,), bias=True, chunk_rows=chunk_rows), problem).loss
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=1e-6)
    wanted, eps = gradients(expected, problem), torch.finfo(dtype).eps
    for name, gradient in gradients(got, problem).items():
        assert oracle.rms((gradient - wanted[name]).double()) <= 4 * eps * oracle.rms(wanted[name])


def test_a_number_is_a_weight_for_every_row() -> None:
    case = Case("number", (5,))
    problem = oracle.make(case, torch.float64)
    reference = ReferenceRows(problem.reference_hidden, Head(problem.reference_weight))
    losses = [
        linear_distribution_loss(problem.hidden, problem.weight, problem.targets, weights, reference).loss
        for weights in (0.2, torch.full((5,), 0.2, dtype=torch.float64))
    ]
    assert torch.equal(*losses)


def test_the_reference_may_have_another_dtype_and_gets_no_gradient() -> None:
    case = Case("other", (5,), chunk_rows=2)
    for dtype, other in ((torch.bfloat16, torch.float32), (torch.float32, torch.float16), (torch.float64,) * 2):
        problem = oracle.make(case, dtype)
        problem.reference_hidden = problem.reference_hidden.to(other).requires_grad_()
        problem.reference_weight = problem.reference_weight.to(other).requires_grad_()
        loss = run(case, problem).loss
        gold = oracle_loss(case, oracle.exact(problem), 0.0, cross_entropy=False)
        torch.testing.assert_close(loss.double(), gold, rtol=1e-4, atol=1e-5)
        loss.backward()
        assert problem.weight.grad is not None
        assert problem.reference_hidden.grad is None
        assert problem.reference_weight.grad is None


def test_backward_twice() -> None:
    case = Case("twice", (5,), bias=True)
    problem = oracle.make(case, torch.float64)
    loss = run(case, problem).loss
    first = torch.autograd.grad(loss, problem.weight, retain_graph=True)[0]
    second = torch.autograd.grad(3 * loss, problem.weight)[0]
    torch.testing.assert_close(3 * first, second)
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        torch.autograd.grad(loss, problem.weight)


def test_bitwise_repeatable_whatever_a_reused_workspace_held() -> None:
    case = Case("repeat", (40,), vocabulary=997, hidden_size=64, bias=True, chunk_rows=13)
    problem = oracle.make(case, torch.bfloat16)
    release_workspaces()
    first = run(case, problem, 1.0).loss
    expected = gradients(first, problem)
    for buffer in memory._idle.buffers:
        buffer.fill_(255)  # NaN
    again = run(case, problem, 1.0).loss
    assert torch.equal(again, first)
    for name, gradient in gradients(again, problem).items():
        assert torch.equal(gradient, expected[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padded_rows_of_a_workspace_change_nothing(
    backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padded, as on a GPU. P overwrites the reference's logits, whose rows are not adjacent."""
    case = Case("padded", (7,), vocabulary=33, bias=True, chunk_rows=3)
    problem = oracle.make(case, dtype)
    expected = run(case, problem, 1.0, backend=backend).loss
    wanted = gradients(expected, problem)

    def padded(_pool: memory.BufferPool, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.full((rows, columns + 3), torch.nan, dtype=dtype, device=device)[:, :columns]

    monkeypatch.setattr(memory.BufferPool, "matrix", padded)
    got = run(case, problem, 1.0, backend=backend).loss
    torch.testing.assert_close(got, expected)
    eps = torch.finfo(dtype).eps  # another stride can select another GEMM kernel
    for name, gradient in gradients(got, problem).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=4 * eps, atol=4 * eps * oracle.rms(wanted[name]))


def test_rows_are_those_of_fp32_logits_and_halved_where_memory_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "_known", {})
    monkeypatch.setattr(chunks, "_refused", set())
    tried, matrix = [], memory.BufferPool.matrix

    def short(pool: memory.BufferPool, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        tried.append(rows * dtype.itemsize // 4)
        if tried[-1] > 300:
            raise torch.OutOfMemoryError("no")
        return matrix(pool, rows, columns, dtype, device)

    monkeypatch.setattr(memory.BufferPool, "matrix", short)
    case = Case("short", (600,), vocabulary=35000, hidden_size=1)
    assert run(case, oracle.make(case, torch.bfloat16)).loss.isfinite()
    assert tried == [600, 256, 256]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch reads .grad at graph breaks
def test_compiled_it_is_the_same(dtype: torch.dtype) -> None:
    """Also after a call that kept workspaces; a traced call once used the same workspace for both models."""
    hidden, weight = (torch.randn(size, 16).to(dtype).requires_grad_() for size in (6, 50))
    frozen = ReferenceRows(torch.randn(6, 16).to(dtype), Head(torch.randn(50, 16).to(dtype)))
    targets = torch.randint(50, (6,))

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_distribution_loss(hidden, weight, targets, 1.0, frozen).loss

    torch.compiler.reset()
    results = []
    for function in (loss, torch.compile(loss, backend="eager")):
        value = function(hidden, weight)
        results.append((value.detach(), *torch.autograd.grad(value, (hidden, weight))))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
        assert one.any()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_p_are_side_by_side(dtype: torch.dtype, bias: bool) -> None:
    """Leftover fp32 bits next to P can be NaN in bf16, and oneDNN multiplies what it reads after a row by 0."""
    hidden, weight = torch.randn(6, 8).to(dtype), torch.randn(50, 8).to(dtype)
    head = Head(weight, torch.randn(50).to(dtype) if bias else None)
    targets, chunks = torch.randint(50, (6,)), plan_pieces(6, 4)
    look = DistributionLook(
        hidden, head, targets, chunks, reference=ReferenceRows(hidden + 1, head), shift=0.0, backend="torch"
    )
    for start, stop in chunks[0].pieces:
        p = look(slice(start, stop), gradient=True)
        assert p.dtype == dtype
        assert p.is_contiguous()


def test_strided_inputs() -> None:
    case = Case("strided", (5,), chunk_rows=2)
    problem = oracle.make(case, torch.float64)
    expected = gradients(run(case, problem, 1.0).loss, problem)
    wide = torch.zeros(5, 24, dtype=torch.float64)
    wide[:, ::2] = problem.hidden.detach()
    problem.hidden = wide[:, ::2].requires_grad_()
    problem.weight = problem.weight.detach().T.contiguous().T.requires_grad_()
    problem.reference_hidden = problem.reference_hidden.T.contiguous().T
    for name, gradient in gradients(run(case, problem, 1.0).loss, problem).items():
        torch.testing.assert_close(gradient, expected[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_empty_batch_is_a_zero_loss_with_zero_gradients(dtype: torch.dtype) -> None:
    hidden = torch.randn(0, 4, dtype=dtype, requires_grad=True)
    weight = torch.randn(7, 4).to(dtype).requires_grad_()
    reference = ReferenceRows(torch.randn(0, 3), Head(torch.randn(7, 3)))
    out = linear_distribution_loss(hidden, weight, torch.zeros(0, dtype=torch.int64), 0.5, reference)
    assert out.loss == 0
    assert out.divergence.shape == out.entropy.shape == (0,)
    out.loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, 4)
    assert torch.equal(weight.grad, torch.zeros(7, 4, dtype=dtype))


def test_nan_comes_out() -> None:
    problem = oracle.make(Case("nan", (4,)), torch.float32)
    problem.reference_hidden[2, 0] = float("nan")
    out = run(Case("nan", (4,)), problem)
    assert out.divergence.isnan().tolist() == [False, False, True, False]
    assert out.loss.isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_the_operands_and_keeps_fp32_logits(dtype: torch.dtype) -> None:
    hidden, weight = torch.randn(6, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    targets = torch.randint(50, (6,))
    frozen = ReferenceRows(torch.randn(6, 16), Head(torch.randn(50, 16)))
    with torch.autocast("cpu", dtype):
        ours = linear_distribution_loss(hidden, weight, targets, 1.0, frozen, shift=1.0).loss
    rounded = ReferenceRows(frozen.hidden.to(dtype), Head(frozen.head.weight.to(dtype)))
    expected = linear_distribution_loss(hidden.to(dtype), weight.to(dtype), targets, 1.0, rounded, shift=1.0).loss
    assert torch.equal(ours, expected)
    got = torch.autograd.grad(ours, [hidden, weight])
    for left, right in zip(got, torch.autograd.grad(expected, [hidden, weight]), strict=True):
        assert left.dtype == torch.float32
        assert torch.equal(left, right)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_no_tensor_of_all_logits_is_ever_alive(dtype: torch.dtype) -> None:
    n, d, v, chunk_rows = 256, 4, 2000, 16
    hidden, weight = torch.randn(n, d).to(dtype).requires_grad_(), torch.randn(v, d).to(dtype).requires_grad_()
    frozen = ReferenceRows(hidden.detach(), Head(weight.detach()))
    release_workspaces()
    with LargestTensor() as seen:
        loss = linear_distribution_loss(hidden, weight, torch.randint(v, (n,)), 1.0, frozen, chunk_rows=chunk_rows).loss
        loss.backward()
    assert seen.largest <= chunk_rows * v * 4


def _arguments() -> dict[str, object]:
    return {
        "hidden": torch.randn(3, 4),
        "weight": torch.randn(7, 4),
        "targets": torch.tensor([0, 1, 6]),
        "row_weights": torch.ones(3),
        "reference": ReferenceRows(torch.randn(3, 5), Head(torch.randn(7, 5))),
    }


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.randn(3, 5)}, ValueError, r"`hidden`: expected shape \(N, 4\), got \(3, 5\)"),
        ({"weight": torch.randn(7, 4).bfloat16()}, TypeError, "`weight`: expected dtype torch.float32"),
        ({"targets": torch.tensor([0, 1, 7])}, ValueError, r"token ids in 0 .. 6 .* got 7"),
        ({"row_weights": torch.ones(2)}, ValueError, r"`row_weights`: expected shape \(3\)"),
        ({"row_weights": torch.ones(3, dtype=torch.int64)}, TypeError, "`row_weights`: expected dtype"),
        (
            {"reference": ReferenceRows(torch.randn(2, 5), Head(torch.randn(7, 5)))},
            ValueError,
            r"`reference_hidden`: expected shape \(3, D\), got \(2, 5\)",
        ),
        (
            {"reference": ReferenceRows(torch.randn(3, 5), Head(torch.randn(8, 5)))},
            ValueError,
            "`reference_weight`: expected 7 rows, the vocabulary of `weight`, got 8",
        ),
        (
            {"reference": ReferenceRows(torch.randn(3, 6), Head(torch.randn(7, 5)))},
            ValueError,
            r"`reference_hidden`: expected shape \(N, 5\)",
        ),
        (
            {"reference": ReferenceRows(torch.randn(3, 5).double(), Head(torch.randn(7, 5).double()))},
            TypeError,
            "`reference_hidden`: expected dtype",
        ),
        ({"bias": torch.randn(6)}, ValueError, r"`bias`: expected shape \(7\)"),
        ({"softcap": -1.0}, ValueError, "`softcap`: expected a positive finite number"),
        ({"chunk_rows": 0}, ValueError, "`chunk_rows`: expected at least 1"),
        ({"backend": "cuda"}, ValueError, "`backend`: expected one of 'auto'"),
    ],
)
def test_bad_input_is_refused(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        linear_distribution_loss(**{**_arguments(), **change})  # type: ignore[arg-type]
