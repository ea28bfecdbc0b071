"""The row pass alone: in place, in blocks, with poisoned neighbours."""

import pytest
import torch

from efface_kernels import row_pass
from efface_kernels.row_pass import reference


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_logits_become_minus_the_derivative_of_the_logprob(dtype: torch.dtype, softcap: float | None) -> None:
    logits = (torch.randn(9, 33) * 3).to(dtype)
    targets = torch.randint(33, (9,))
    exact = logits.double().clone().requires_grad_()
    capped = exact if softcap is None else softcap * torch.tanh(exact / softcap)
    expected = torch.log_softmax(capped, -1).gather(1, targets[:, None])[:, 0]
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    out = row_pass(logits, targets, softcap=softcap)
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-6} if dtype in (torch.float32, torch.float64) else {"rtol": 8e-3, "atol": 1e-4}
    )
    torch.testing.assert_close(out.logprobs.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.double(), -slope, **tolerance)


def test_the_target_entry_of_a_memorised_row_keeps_its_digits_in_bf16() -> None:
    """At p = 0.999 the subtraction p − 1 taken in bf16 is 100 % wrong."""
    logits = torch.zeros(1, 2)
    logits[0, 1] = 6.90625  # p = 0.999, exact in bf16
    out = logits.bfloat16()
    row_pass(out, torch.tensor([1]))
    exact = torch.softmax(logits.double(), -1)[0, 1] - 1
    assert abs(out[0, 1].double() / exact - 1) < 2**-8


def test_without_gradient_logits_stay() -> None:
    logits = torch.randn(4, 5)
    before = logits.clone()
    row_pass(logits, torch.zeros(4, dtype=torch.int64), gradient=False)
    assert torch.equal(logits, before)


def test_blocks_of_rows_are_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = torch.randn(7, 10), torch.randint(10, (7,))
    whole, cut = logits.clone(), logits.clone()
    expected = row_pass(whole, targets)
    monkeypatch.setattr(reference, "_BLOCK_ELEMENTS", 25)
    got = row_pass(cut, targets)
    assert torch.equal(got.logprobs, expected.logprobs)
    assert torch.equal(cut, whole)


def test_a_nan_row_does_not_spread() -> None:
    logits, targets = torch.randn(3, 5), torch.tensor([0, 4, 2])
    alone = row_pass(logits[[0, 2]].clone(), targets[[0, 2]])
    logits[1] = float("nan")
    out = row_pass(logits, targets)
    assert torch.equal(out.logprobs[[0, 2]], alone.logprobs)
    assert out.logprobs[1].isnan()


def test_minus_infinity_is_a_class_without_probability() -> None:
    logits = torch.tensor([[0.0, float("-inf"), 0.0]])
    out = row_pass(logits, torch.tensor([0]))
    torch.testing.assert_close(out.logprobs, torch.tensor([0.5]).log())
    torch.testing.assert_close(logits, torch.tensor([[-0.5, 0.0, 0.5]]))


def test_reference_logits_may_have_fewer_rows_another_dtype_and_vocabulary() -> None:
    logits, reference_logits = torch.randn(5, 8), torch.randn(3, 12).half()
    targets = torch.randint(8, (5,))
    before = reference_logits.clone()
    out = row_pass(logits, targets, reference_logits=reference_logits)
    expected = torch.log_softmax(before.float(), -1).gather(1, targets[:3, None])[:, 0]
    torch.testing.assert_close(out.reference_logprobs, expected)
    assert torch.equal(reference_logits, before)
    with pytest.raises(ValueError, match="at most 2 rows"):
        row_pass(logits[:2], targets[:2], reference_logits=reference_logits)
