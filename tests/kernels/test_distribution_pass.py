"""Tests of the distribution pass against torch's softmax in fp64."""

import pytest
import torch
from torch import Tensor

from efface_kernels import distribution_pass, triton_launch

# NumPy warns of −inf − −inf in lanes that the interpreted kernel masks afterwards
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def gold(logits: Tensor, reference: Tensor, targets: Tensor, shift: float, cap: float | None) -> tuple[Tensor, ...]:
    """Return (KL, entropy, derivative) from materialised fp64 distributions and autograd."""
    z = logits.double().clone().requires_grad_()
    capped = z if cap is None else cap * torch.tanh(z / cap)
    frozen = reference.double() if cap is None else cap * torch.tanh(reference.double() / cap)
    frozen = frozen - shift * torch.nn.functional.one_hot(targets, logits.shape[1])
    q = torch.softmax(frozen, -1)
    kl = torch.nn.functional.kl_div(torch.log_softmax(capped, -1), q, reduction="none").sum(-1)
    entropy = torch.special.entr(q).sum(-1)
    return kl.detach(), entropy, torch.autograd.grad(kl.sum(), z)[0]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("cap", [None, 4.0])
@pytest.mark.parametrize("shift", [0.0, 10.0])
@pytest.mark.parametrize("vocabulary", [1, 7, 1031])
def test_equals_fp64(backend: str, vocabulary: int, shift: float, cap: float | None, dtype: torch.dtype) -> None:
    logits, reference = ((torch.randn(3, vocabulary) * 3).to(dtype) for _ in range(2))
    targets = torch.randint(vocabulary, (3,))
    kl, entropy, derivative = gold(logits, reference, targets, shift, cap)
    before = reference.clone()
    out = distribution_pass(
        logits, reference, targets, shift=shift, softcap=cap, reference_softcap=cap, backend=backend
    )
    torch.testing.assert_close(out.divergence.double(), kl, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(out.entropy.double(), entropy, rtol=2e-5, atol=2e-6)
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if dtype in FLOATS[:2] else {"rtol": 8e-3, "atol": 1e-6}
    torch.testing.assert_close(logits.double(), derivative, **tolerance)
    assert torch.equal(reference, before)


def test_equal_distributions_have_no_divergence(backend: str) -> None:
    logits = torch.randn(4, 999)
    out = distribution_pass(logits.clone(), logits, torch.zeros(4, dtype=torch.int64), backend=backend)
    assert out.divergence.abs().max() < 1e-6
    exact = distribution_pass(
        logits.double(), logits.double(), torch.zeros(4, dtype=torch.int64), gradient=False, backend=backend
    )
    torch.testing.assert_close(out.entropy.double(), exact.entropy, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("other", FLOATS[1:], ids=str)
def test_dtypes_may_differ(backend: str, dtype: torch.dtype, other: torch.dtype) -> None:
    logits, reference = torch.randn(3, 20).to(dtype), torch.randn(3, 20).to(other)
    targets = torch.randint(20, (3,))
    kl, _, _ = gold(logits, reference, targets, 0.0, None)
    out = distribution_pass(logits, reference, targets, gradient=False, backend=backend)
    torch.testing.assert_close(out.divergence.double(), kl, rtol=1e-5, atol=1e-6)


def test_a_class_that_the_reference_excludes_adds_nothing(backend: str) -> None:
    logits, reference = torch.randn(1, 5), torch.randn(1, 5)
    reference[0, 2] = float("-inf")
    kept = [0, 1, 3, 4]
    out = distribution_pass(logits.clone(), reference, torch.tensor([0]), backend=backend)
    q = torch.softmax(reference[0, kept].double(), -1)
    log_p = torch.log_softmax(logits[0].double(), -1)[kept]
    torch.testing.assert_close(out.divergence[0].double(), (q * (q.log() - log_p)).sum(), rtol=1e-5, atol=1e-6)


def test_nan_comes_out_and_stays_in_its_row(backend: str) -> None:
    logits, reference = torch.randn(3, 40), torch.randn(3, 40)
    reference[1, 7] = float("nan")
    out = distribution_pass(logits, reference, torch.zeros(3, dtype=torch.int64), backend=backend)
    assert out.divergence.isnan().tolist() == [False, True, False]
    assert logits[1].isnan().all()
    assert logits[[0, 2]].isfinite().all()


@pytest.mark.parametrize("over", ["nothing", "the reference"])
@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize(("rows", "vocabulary"), [(0, 5), (1, 7), (5, 1), (3, 1031), (2, 5003), (3, 50257)])
def test_the_derivative_may_go_elsewhere(
    backend: str, rows: int, vocabulary: int, dtype: torch.dtype, over: str
) -> None:
    """In any dtype that is not wider, with padded rows, and into the reference's logits, which are then lost."""
    if backend == "triton" and triton_launch.INTERPRETED and vocabulary > 5003:
        pytest.skip("the interpreter runs the same code as with 5003 logits, but for more blocks")
    logits = torch.randn(rows, vocabulary) * 3
    reference = torch.randn(rows, vocabulary + 3)[:, :vocabulary]
    targets = torch.randint(vocabulary, (rows,))
    kl, entropy, derivative = gold(logits, reference, targets, 2.0, 4.0)
    memory = reference if over == "the reference" else torch.full((rows, vocabulary + 1), torch.nan)
    out, before = memory.view(dtype)[:, :vocabulary], logits.clone()
    pair = distribution_pass(
        logits, reference, targets, shift=2.0, softcap=4.0, reference_softcap=4.0, out=out, backend=backend
    )
    torch.testing.assert_close(pair.divergence.double(), kl, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(pair.entropy.double(), entropy, rtol=2e-5, atol=2e-6)
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 8e-3, "atol": 1e-6}
    torch.testing.assert_close(out.double(), derivative, **tolerance)
    assert torch.equal(logits, before)


def test_a_derivative_that_goes_elsewhere_is_the_one_in_place(backend: str) -> None:
    logits, reference = torch.randn(4, 12).T, torch.randn(12, 4)  # transposed
    targets = torch.randint(4, (12,))
    out, again = torch.empty(4, 12).T, logits.clone()
    elsewhere = distribution_pass(logits.clone(), reference, targets, out=out, backend=backend)
    itself = distribution_pass(again, reference, targets, out=again, backend=backend)
    in_place = distribution_pass(logits, reference, targets, backend=backend)
    assert torch.equal(out, logits)
    assert torch.equal(again, logits)
    assert torch.equal(elsewhere.divergence, in_place.divergence)
    assert torch.equal(itself.divergence, in_place.divergence)


def test_the_value_does_not_depend_on_a_models_offset(backend: str) -> None:
    logits = torch.randn(3, 1000)
    reference = logits + torch.randn(3, 1000) / 100
    targets = torch.zeros(3, dtype=torch.int64)
    for offset in (0.0, 7.0, 100.0, 30000.0):
        moved = reference + offset
        kl, _, _ = gold(logits, moved, targets, 0.0, None)
        out = distribution_pass(logits.clone(), moved, targets, backend=backend)
        torch.testing.assert_close(out.divergence.double(), kl, rtol=0, atol=2e-6)


@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
def test_equal_models_are_exactly_equal(backend: str, dtype: torch.dtype, cap: float | None) -> None:
    logits = (torch.randn(4, 999) * 5).to(dtype)
    targets, other = torch.zeros(4, dtype=torch.int64), logits.clone()
    out = distribution_pass(logits, other, targets, softcap=cap, reference_softcap=cap, backend=backend)
    assert not out.divergence.any()
    assert not logits.any()


def test_an_unfit_out_is_refused() -> None:
    logits, reference, targets = torch.randn(2, 6), torch.randn(2, 6), torch.zeros(2, dtype=torch.int64)
    wide = torch.randn(2, 6, dtype=torch.float64)
    for out, error, message in (
        (torch.empty(2, 5), ValueError, r"`out`: expected shape \(2, 6\)"),
        (torch.empty(2, 6, dtype=torch.int32), TypeError, "`out`: expected dtype torch.float16"),
        (wide, TypeError, "`out`: expected dtype torch.float16"),
        (torch.empty(1, 6).expand(2, 6), ValueError, "`out`: expected disjoint entries"),
        (torch.empty(11).as_strided((2, 6), (5, 1)), ValueError, "`out`: expected disjoint entries"),
        (logits.view(torch.bfloat16)[:, :6], ValueError, "`out`: expected `logits` themselves"),
        (reference.view(torch.bfloat16)[:, 6:], ValueError, "`out`: expected separate memory, or rows that begin"),
        (reference.view(torch.bfloat16).view(4, 6)[1:3], ValueError, "`out`: expected separate memory, or rows"),
        (reference.view(torch.bfloat16).flatten()[:12].view(2, 6), ValueError, "`out`: expected separate memory"),
    ):
        with pytest.raises(error, match=message):
            distribution_pass(logits, reference, targets, out=out)
    with pytest.raises(ValueError, match="`out`: expected None with `gradient=False`"):
        distribution_pass(logits, reference, targets, gradient=False, out=torch.empty(2, 6))


def test_bad_input_is_refused() -> None:
    logits, targets = torch.randn(2, 5), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="same rows and vocabulary"):
        distribution_pass(logits, torch.randn(2, 6), targets)
    with pytest.raises(TypeError, match="`reference_logits`: expected dtype"):
        distribution_pass(logits, torch.randn(2, 5).double(), targets)
    with pytest.raises(ValueError, match="got 5"):
        distribution_pass(logits, logits, torch.tensor([0, 5]))
