"""The loss ops within torch's modes: what they compute and keep without gradients, and what they leave behind."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from efface_kernels import (
    Head,
    ReferenceRows,
    Sequences,
    linear_distribution_loss,
    linear_logprob,
    linear_sequence_loss,
    release_workspaces,
)
from efface_kernels.linear_loss.loop import Gradients

N, D, V = 12, 8, 40


def nll(sequences: Sequences) -> Tensor:
    return -sequences.sums


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, D, generator=generator).to(dtype).requires_grad_() for n in (N, V))
    return hidden, weight, torch.randint(V, (N,), generator=generator)


def logprob(hidden: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:
    return linear_logprob(hidden, weight, targets, chunk_rows=rows).sum()


def sequence(hidden: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:
    return linear_sequence_loss(hidden, weight, targets, [0, 5, N], nll, chunk_rows=rows).loss


def distribution(hidden: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:
    frozen = ReferenceRows(hidden.detach() + 1, Head(weight.detach()))
    return linear_distribution_loss(hidden, weight, targets, 1.0, frozen, chunk_rows=rows).loss


OPS: list[Callable[..., Tensor]] = [logprob, sequence, distribution]


@pytest.mark.parametrize("op", OPS)
def test_training_after_inference_mode(op: Callable[..., Tensor]) -> None:
    """What is kept for the next call must not be what inference mode makes: nothing may write to that outside."""
    release_workspaces()
    hidden, weight, targets = inputs()
    expected = torch.autograd.grad(op(hidden, weight, targets, 4), (hidden, weight))
    release_workspaces()
    with torch.inference_mode():
        op(hidden, weight, targets, 4)
    for got, wanted in zip(
        torch.autograd.grad(op(hidden, weight, targets, 4), (hidden, weight)), expected, strict=True
    ):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("rows", [4, N])
@pytest.mark.parametrize("op", OPS)
def test_no_gradient_is_formed_that_nobody_can_ask_for(
    op: Callable[..., Tensor], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    formed: list[Any] = []
    made = Gradients.__post_init__

    def noted(self: Gradients) -> None:
        formed.append(self.wanted)
        made(self)

    monkeypatch.setattr(Gradients, "__post_init__", noted)
    hidden, weight, targets = inputs()
    with torch.no_grad():
        value = op(hidden, weight, targets, rows)
    assert not any(wanted.any for wanted in formed)
    assert not value.requires_grad
    loss = op(hidden, weight, targets, rows)
    # pieces need not end with a sequence there: other shapes of a GEMM may be other bits
    torch.testing.assert_close(loss.detach(), value, rtol=1e-6, atol=0)
    assert any(wanted.any for wanted in formed) or op is logprob  # which forms them in the backward call


@pytest.mark.parametrize("op", [sequence, distribution])
def test_a_copy_of_the_head_does_not_outlive_the_call(op: Callable[..., Tensor]) -> None:
    """Under autocast the head is copied; while the decoder runs backward the copy would be the largest tensor."""
    hidden, weight, targets = inputs()
    copy = weight.to(torch.bfloat16)
    copies = weakref.ref(copy)
    loss = op(hidden.to(torch.bfloat16), copy, targets, 4)
    del copy
    gc.collect()
    assert copies() is None
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.shape == weight.shape


def test_the_callers_reference_sums_stay_in_their_graph() -> None:
    hidden, weight, targets = inputs()
    sums = torch.zeros(2, requires_grad=True) * 2
    out = linear_sequence_loss(hidden, weight, targets, [0, 5, N], nll, reference_sums=sums)
    assert sums.requires_grad
    assert out.reference_sums is not None
    assert not out.reference_sums.requires_grad
