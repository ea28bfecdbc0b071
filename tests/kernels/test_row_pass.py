"""Tests of the row pass alone: in place, in blocks, next to NaN."""

import os

import pytest
import torch

from efface_kernels import backends, native, row_pass
from efface_kernels import logits as logits_module


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_logits_become_minus_the_derivative_of_the_logprob(
    backend: str, dtype: torch.dtype, softcap: float | None
) -> None:
    logits = (torch.randn(3, 33) * 3).to(dtype)
    targets = torch.randint(33, (3,))
    exact = logits.double().clone().requires_grad_()
    capped = exact if softcap is None else softcap * torch.tanh(exact / softcap)
    expected = torch.log_softmax(capped, -1).gather(1, targets[:, None])[:, 0]
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    out = row_pass(logits, targets, softcap=softcap, backend=backend)
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-6} if dtype in (torch.float32, torch.float64) else {"rtol": 8e-3, "atol": 1e-4}
    )
    torch.testing.assert_close(out.logprobs.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.double(), -slope, **tolerance)


def test_the_target_entry_of_a_memorised_row_keeps_its_digits_in_bf16(backend: str) -> None:
    """At p = 0.999, p − 1 computed in bf16 is wrong by 100 %."""
    logits = torch.zeros(1, 2)
    logits[0, 1] = 6.90625  # p = 0.999, exact in bf16
    out = logits.bfloat16()
    row_pass(out, torch.tensor([1]), backend=backend)
    exact = torch.softmax(logits.double(), -1)[0, 1] - 1
    assert abs(out[0, 1].double() / exact - 1) < 2**-8


def test_without_gradient_logits_stay(backend: str) -> None:
    logits = torch.randn(4, 5)
    before = logits.clone()
    row_pass(logits, torch.zeros(4, dtype=torch.int64), gradient=False, backend=backend)
    assert torch.equal(logits, before)


def test_blocks_of_rows_are_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = torch.randn(7, 10), torch.randint(10, (7,))
    whole, cut = logits.clone(), logits.clone()
    expected = row_pass(whole, targets, backend="torch")
    monkeypatch.setattr(logits_module, "_BLOCK_ELEMENTS", 25)
    got = row_pass(cut, targets, backend="torch")
    assert torch.equal(got.logprobs, expected.logprobs)
    assert torch.equal(cut, whole)


def test_a_nan_row_does_not_spread(backend: str) -> None:
    logits, targets = torch.randn(3, 5), torch.tensor([0, 4, 2])
    alone = row_pass(logits[[0, 2]].clone(), targets[[0, 2]], backend=backend)
    logits[1] = float("nan")
    out = row_pass(logits, targets, backend=backend)
    assert torch.equal(out.logprobs[[0, 2]], alone.logprobs)
    assert out.logprobs[1].isnan()


def test_minus_infinity_is_a_class_without_probability(backend: str) -> None:
    logits = torch.tensor([[0.0, float("-inf"), 0.0]])
    out = row_pass(logits, torch.tensor([0]), backend=backend)
    torch.testing.assert_close(out.logprobs, torch.tensor([0.5]).log())
    torch.testing.assert_close(logits, torch.tensor([[-0.5, 0.0, 0.5]]))


def test_reference_logits_may_have_fewer_rows_another_dtype_and_vocabulary(backend: str) -> None:
    logits, reference_logits = torch.randn(5, 8), torch.randn(3, 12).half()
    targets = torch.randint(8, (5,))
    before = reference_logits.clone()
    out = row_pass(logits, targets, reference_logits=reference_logits, backend=backend)
    expected = torch.log_softmax(before.float(), -1).gather(1, targets[:3, None])[:, 0]
    torch.testing.assert_close(out.reference_logprobs, expected)
    assert torch.equal(reference_logits, before)
    with pytest.raises(ValueError, match="at most 2 rows"):
        row_pass(logits[:2], targets[:2], reference_logits=reference_logits, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocabulary", [1, 2, 7, 16, 33, 1024, 1031])
def test_any_stride(backend: str, vocabulary: int, dtype: torch.dtype) -> None:
    """Padded rows and non-contiguous columns; the memory between them is not changed."""
    padded = torch.full((2, vocabulary + 3), float("nan"), dtype=dtype)
    padded[:, :vocabulary] = torch.randn(2, vocabulary).to(dtype)
    targets = torch.randint(vocabulary, (2,))
    transposed = padded[:, :vocabulary].T.contiguous().T
    dense = padded[:, :vocabulary].clone()
    results = [row_pass(view, targets, backend=backend) for view in (dense, padded[:, :vocabulary], transposed)]
    for result, view in zip(results, (dense, padded[:, :vocabulary], transposed), strict=True):
        torch.testing.assert_close(result.logprobs, results[0].logprobs)
        torch.testing.assert_close(view, dense)
    assert padded[:, vocabulary:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_and_two_threads_give_the_same_bits(dtype: torch.dtype) -> None:
    logits, targets = (torch.randn(37, 5003) * 5).to(dtype), torch.randint(5003, (37,))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            copy = logits.clone()
            results.append((row_pass(copy, targets, backend="native").logprobs, copy))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_can_run_it() -> None:
    """Data loader workers are forks, in which an OpenMP thread team does not survive."""
    logits, targets = torch.randn(64, 501), torch.randint(501, (64,))
    expected = row_pass(logits.clone(), targets, backend="native").logprobs
    child = os.fork()
    if child == 0:
        out = row_pass(logits.clone(), targets, backend="native").logprobs
        os._exit(0 if torch.equal(out, expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_missing_extension_warns_once_and_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = torch.randn(3, 5), torch.tensor([0, 4, 2])
    expected = row_pass(logits.clone(), targets, backend="torch").logprobs
    monkeypatch.setattr(native, "IMPORT_ERROR", ImportError("no such module"))
    backends._warn_missing_extension.cache_clear()
    with pytest.warns(UserWarning, match="efface_native cannot be imported .* plain torch"):
        assert torch.equal(row_pass(logits.clone(), targets).logprobs, expected)
    row_pass(logits.clone(), targets)  # warnings are errors here, so a second one would fail
    with pytest.raises(ValueError, match="reinstall efface with a C"):
        row_pass(logits, targets, backend="native")
