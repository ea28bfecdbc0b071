"""efface.functional against Hugging Face's own loss and the formulas of the papers, padded and packed."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import efface
from efface import functional

B, T, D, V = 4, 9, 6, 17
LENGTHS = (9, 4, 7, 2)
PROMPTS = (3, 1, 0, 0)


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Padded hidden states, head and labels: prompts and padding ignored."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(B, T, D, dtype=dtype), torch.randn(V, D, dtype=dtype)
    labels = torch.full((B, T), -100)
    for row, (length, prompt) in enumerate(zip(LENGTHS, PROMPTS, strict=True)):
        labels[row, prompt:length] = torch.randint(V, (length - prompt,))
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def packed(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same sequences without padding."""
    rows = torch.cat([hidden[i, :length] for i, length in enumerate(LENGTHS)])
    flat = torch.cat([labels[i, :length] for i, length in enumerate(LENGTHS)])
    return rows, flat, torch.tensor([0, 9, 13, 20, 22], dtype=torch.int32)


def token_logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Eager: (L_s, n_s)."""
    logits = F.linear(hidden, weight)[:, :-1]
    nll = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none")
    return -nll.sum(1), (labels[:, 1:] != -100).sum(1)


def eager(name: str, sums: Tensor, lengths: Tensor, reference: Tensor) -> Tensor:
    match name:
        case "nll":
            return -sums.sum() / lengths.sum()
        case "grad_ascent":
            return sums.sum() / lengths.sum()
        case "npo":
            return -2 / 0.3 * F.logsigmoid(-0.3 * (sums - reference)).mean()
        case "simnpo":
            return -2 / 2.5 * F.logsigmoid(2.5 * (-sums / lengths - 0.2)).mean()
    raise AssertionError(name)


def ours(name: str, hidden: Tensor, weight: Tensor, labels: Tensor, reference: Tensor, cu_seqlens: Tensor | None):  # type: ignore[no-untyped-def]
    options = {"cu_seqlens": cu_seqlens}
    match name:
        case "nll":
            return functional.nll_loss(hidden, weight, labels, **options)
        case "grad_ascent":
            return functional.grad_ascent_loss(hidden, weight, labels, **options)
        case "npo":
            return functional.npo_loss(hidden, weight, labels, beta=0.3, reference_logprobs=reference, **options)
        case "simnpo":
            return functional.simnpo_loss(hidden, weight, labels, beta=2.5, delta=0.2, **options)
    raise AssertionError(name)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("name", ["nll", "grad_ascent", "npo", "simnpo"])
def test_losses_and_gradients_equal_the_formulas(name: str, layout: str) -> None:
    hidden, weight, labels = batch()
    reference = torch.randn(B, dtype=torch.float64)
    expected = eager(name, *token_logprobs(hidden, weight, labels), reference)
    if layout == "packed":
        rows, flat, cu_seqlens = packed(hidden, labels)
        got = ours(name, rows, weight, flat, reference, cu_seqlens)
    else:
        got = ours(name, hidden, weight, labels, reference, None)
    torch.testing.assert_close(got, expected)
    for left, right in zip(
        torch.autograd.grad(got, [hidden, weight]), torch.autograd.grad(expected, [hidden, weight]), strict=True
    ):
        torch.testing.assert_close(left, right)


def test_nll_is_the_loss_of_a_hugging_face_model() -> None:
    from helpers import padded, random_store, tiny_llama

    model = tiny_llama()
    ids, labels, mask = padded(random_store(5), [0, 1, 2, 3, 4])
    expected = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(functional.nll_loss(hidden, model.lm_head.weight, labels), expected)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_sequence_logprobs_takes_any_upstream_gradient(layout: str) -> None:
    hidden, weight, labels = batch()
    expected, _ = token_logprobs(hidden, weight, labels)
    rows, flat, cu_seqlens = packed(hidden, labels) if layout == "packed" else (hidden, labels, None)
    got = functional.sequence_logprobs(rows, weight, flat, cu_seqlens=cu_seqlens)
    torch.testing.assert_close(got, expected)
    upstream = torch.randn(B, dtype=torch.float64)
    for left, right in zip(
        torch.autograd.grad(got, [hidden, weight], upstream),
        torch.autograd.grad(expected, [hidden, weight], upstream),
        strict=True,
    ):
        torch.testing.assert_close(left, right)


def test_a_live_reference_equals_a_cached_one() -> None:
    hidden, weight, labels = batch()
    reference_hidden, reference_weight = torch.randn(B, T, 3).double(), torch.randn(V + 2, 3).double()
    bias = torch.randn(V + 2).double()
    logprobs = functional.sequence_logprobs(reference_hidden, reference_weight, labels, bias=bias)
    cached = functional.npo_loss(hidden, weight, labels, beta=0.1, reference_logprobs=logprobs)
    live = functional.npo_loss(
        hidden,
        weight,
        labels,
        beta=0.1,
        reference_hidden=reference_hidden,
        reference_weight=reference_weight,
        reference_bias=bias,
    )
    torch.testing.assert_close(live, cached)


def test_results_are_float32_for_half_precision() -> None:
    hidden, weight, labels = batch(torch.bfloat16)
    assert functional.sequence_logprobs(hidden, weight, labels).dtype == torch.float32
    loss = functional.simnpo_loss(hidden, weight, labels, beta=1.0)
    assert loss.dtype == torch.float32
    loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16


def test_empty_batch() -> None:
    _, weight, _ = batch()
    hidden, labels = torch.randn(0, T, D).double(), torch.empty(0, T, dtype=torch.int64)
    assert functional.nll_loss(hidden, weight, labels) == 0
    assert functional.sequence_logprobs(hidden, weight, labels).shape == (0,)
    assert functional.npo_loss(hidden, weight, labels, beta=1.0, reference_logprobs=torch.empty(0)) == 0


def test_the_first_token_of_a_packed_sequence_is_never_predicted() -> None:
    """A label on position 0 belongs to no hidden state; the row before it is another sequence's."""
    hidden, weight = torch.randn(4, D).double(), torch.randn(V, D).double()
    labels, cu_seqlens = torch.tensor([1, 2, 3, 4]), torch.tensor([0, 2, 4])
    got = functional.sequence_logprobs(hidden, weight, labels, cu_seqlens=cu_seqlens)
    expected = torch.log_softmax(hidden @ weight.T, -1)
    torch.testing.assert_close(got, torch.stack([expected[0, 2], expected[2, 4]]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": torch.zeros(B, T)}, TypeError, "`labels`: expected dtype torch.int64"),
        ({"labels": torch.zeros(B, T - 1, dtype=torch.int64)}, ValueError, r"`labels`: expected shape \(4, 9\)"),
        ({"labels": torch.full((B, T), -100)}, ValueError, "got none in sequence 0"),
        ({"labels": torch.full((B, T), V)}, ValueError, r"token ids in 0 .. 16 .* got 17"),
        ({"hidden": torch.randn(T, D).double()}, ValueError, "need `cu_seqlens`"),
        ({"cu_seqlens": torch.tensor([0, 9])}, ValueError, "take no `cu_seqlens`"),
        ({"weight": torch.randn(V, D)}, TypeError, "`weight`: expected dtype torch.float64"),
        ({"weight": torch.randn(V, D + 1).double()}, ValueError, r"`hidden`: expected shape \(N, 7\)"),
        ({"beta": 0.0}, ValueError, "`beta`: expected a positive number"),
        ({"reference_logprobs": None}, ValueError, "got neither"),
        ({"backend": "tpu"}, ValueError, "`backend`"),
    ],
)
def test_bad_input_is_refused(change: dict[str, object], error: type[Exception], message: str) -> None:
    hidden, weight, labels = batch()
    options = {"hidden": hidden, "weight": weight, "labels": labels, "beta": 1.0, "reference_logprobs": torch.zeros(B)}
    with pytest.raises(error, match=message):
        functional.npo_loss(**{**options, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize("bounds", [[0, 3], [1, 4], [0, 3, 2, 4], []])
def test_cu_seqlens_must_cover_the_tokens(bounds: list[int]) -> None:
    with pytest.raises(ValueError, match="`cu_seqlens`: expected ascending offsets from 0 to 4"):
        functional.nll_loss(
            torch.randn(4, D), torch.randn(V, D), torch.ones(4, dtype=torch.int64), cu_seqlens=torch.tensor(bounds)
        )


def test_a_sequence_of_one_token_has_no_label() -> None:
    with pytest.raises(ValueError, match="got none in sequence 1"):
        functional.nll_loss(
            torch.randn(4, D),
            torch.randn(V, D),
            torch.ones(4, dtype=torch.int64),
            cu_seqlens=torch.tensor([0, 3, 4]),
        )


def test_the_contract_is_exported() -> None:
    for name in ("NPO", "SimNPO", "GradDiff", "GradAscent", "UnlearnTrainer", "UnlearnArguments", "functional"):
        assert hasattr(efface, name)
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = efface.Nonsense
