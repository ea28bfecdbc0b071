"""Tests of efface.functional against Hugging Face's own loss and the papers' formulas, padded and packed."""

import doctest

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
    """Return padded hidden states, head and labels; prompts and padding are ignored."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(B, T, D, dtype=dtype), torch.randn(V, D, dtype=dtype)
    labels = torch.full((B, T), -100)
    for row, (length, prompt) in enumerate(zip(LENGTHS, PROMPTS, strict=True)):
        labels[row, prompt:length] = torch.randint(V, (length - prompt,))
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def packed(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same sequences without padding."""
    rows = torch.cat([hidden[i, :length] for i, length in enumerate(LENGTHS)])
    flat = torch.cat([labels[i, :length] for i, length in enumerate(LENGTHS)])
    return rows, flat, torch.tensor([0, 9, 13, 20, 22], dtype=torch.int32)


def token_logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return (L_s, n_s), computed eagerly."""
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
    from support.helpers import padded, random_store, tiny_llama

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
    """No hidden state predicts position 0: the row before it belongs to another sequence."""
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
        ({"hidden": torch.randn(T, D).double()}, ValueError, "pass `cu_seqlens`"),
        ({"cu_seqlens": torch.tensor([0, 9])}, ValueError, "omit `cu_seqlens`"),
        ({"weight": torch.randn(V, D)}, TypeError, "`weight`: expected dtype torch.float64"),
        ({"weight": torch.randn(V, D + 1).double()}, ValueError, r"`hidden`: expected shape \(N, 7\)"),
        ({"beta": 0.0}, ValueError, "`beta`: expected a positive number"),
        ({"reference_logprobs": None}, ValueError, "expected a reference for NPO, got none"),
        ({"reference_hidden": torch.randn(B, T, D).double()}, ValueError, "expected `reference_weight` as well"),
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


def labelled_rows(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits (N, V) of the positions that predict a label, and those labels, computed eagerly."""
    shifted = labels[:, 1:]
    return F.linear(hidden, weight)[:, :-1][shifted != -100], shifted[shifted != -100]


def first_labels(labels: Tensor, count: int) -> Tensor:
    """Return which of the N labels are among the first ``count`` of their sequence."""
    marks = []
    for row in labels[:, 1:].tolist():
        marks += [place < count for place in range(sum(label != -100 for label in row))]
    return torch.tensor(marks)


def token_formula(name: str, logits: Tensor, targets: Tensor, labels: Tensor, frozen: Tensor) -> Tensor:
    """Compute the papers' formulas from materialised logits."""
    logp = torch.log_softmax(logits, -1)
    true = F.one_hot(targets, V).bool()
    token = logp[true]
    match name:
        case "wga":
            return (token.detach().exp() ** 0.6 * token).mean()
        case "satimp":
            p = token.detach().exp()
            return (p**5 * (1 - p) ** 1.5 * token).mean()
        case "kl":
            q = torch.softmax(frozen, -1)
            return (q * (q.log() - logp)).sum(-1).mean()
        case "undial":
            q = torch.softmax(torch.where(true, frozen - 3.0, frozen), -1)
            return F.cross_entropy(logits, q)
        case "ceu 0" | "ceu 1" | "ceu 2":
            target = torch.softmax(logits.detach().masked_fill(true, float("-inf")), -1)
            entropy = torch.special.entr(target).sum(-1)
            counted = ~first_labels(labels, int(name[-1]))
            return (F.cross_entropy(logits, target, reduction="none") - entropy)[counted].mean()
    raise AssertionError(name)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("name", ["wga", "satimp", "ceu 0", "ceu 1", "ceu 2", "kl", "undial"])
def test_token_losses_equal_the_formulas(name: str, layout: str) -> None:
    hidden, weight, labels = batch()
    frozen_hidden, frozen_weight = torch.randn(B, T, 3).double(), torch.randn(V, 3).double()
    frozen, _ = labelled_rows(frozen_hidden, frozen_weight, labels)
    expected = token_formula(name, *labelled_rows(hidden, weight, labels), labels, frozen)
    rows, flat, cu_seqlens, beside = hidden, labels, None, frozen_hidden
    if layout == "packed":
        rows, flat, cu_seqlens = packed(hidden, labels)
        beside = packed(frozen_hidden, labels)[0]
    arguments = (rows, weight, flat)
    reference = {"reference_hidden": beside, "reference_weight": frozen_weight}
    match name:
        case "wga":
            got = functional.wga_loss(*arguments, beta=0.6, cu_seqlens=cu_seqlens)
        case "satimp":
            got = functional.satimp_loss(*arguments, beta1=5.0, beta2=1.5, cu_seqlens=cu_seqlens)
        case "kl":
            got = functional.kl_loss(*arguments, **reference, cu_seqlens=cu_seqlens)
        case "undial":
            got = functional.undial_loss(*arguments, beta=3.0, **reference, cu_seqlens=cu_seqlens)
        case _:
            got = functional.ceu_loss(*arguments, ignore_first_n_answer_tokens=int(name[-1]), cu_seqlens=cu_seqlens)
    torch.testing.assert_close(got, expected)
    for left, right in zip(
        torch.autograd.grad(got, [hidden, weight]), torch.autograd.grad(expected, [hidden, weight]), strict=True
    ):
        torch.testing.assert_close(left, right)


def test_defaults_are_those_of_open_unlearning() -> None:
    hidden, weight, labels = batch()
    assert functional.wga_loss(hidden, weight, labels) == functional.wga_loss(hidden, weight, labels, beta=1)
    expected = functional.satimp_loss(hidden, weight, labels, beta1=5, beta2=1)
    assert functional.satimp_loss(hidden, weight, labels) == expected
    expected = functional.ceu_loss(hidden, weight, labels, ignore_first_n_answer_tokens=1)
    assert functional.ceu_loss(hidden, weight, labels) == expected


def test_wga_without_weights_is_gradient_ascent() -> None:
    hidden, weight, labels = batch()
    expected = functional.grad_ascent_loss(hidden, weight, labels)
    torch.testing.assert_close(functional.wga_loss(hidden, weight, labels, beta=0), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("margin", [1.0, 12.0, 17.0, 30.0, 1000.0])
def test_a_memorised_token_leaves_the_loss_finite_and_the_gradient_bounded(margin: float, dtype: torch.dtype) -> None:
    """For p → 1, −log(1 − p) → ∞, and so does the coefficient p / (1 − p)."""
    hidden = torch.ones(1, 3, 1, dtype=dtype, requires_grad=True)
    weight = torch.zeros(5, 1, dtype=dtype)
    weight[2] = margin
    weight.requires_grad_()
    labels = torch.tensor([[-100, 2, 2]])
    loss = functional.ceu_loss(hidden, weight, labels, ignore_first_n_answer_tokens=0)
    loss.backward()
    assert loss.isfinite()
    assert loss > 0
    assert weight.grad is not None
    assert weight.grad.isfinite().all()
    assert weight.grad.abs().max() <= 1.01  # the bound on the gradient of the logits, p − q
    for other in (functional.wga_loss, functional.satimp_loss):
        value = other(hidden, weight, labels)
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(value, [hidden, weight]))


def test_a_forgotten_token_has_next_to_no_ceu_loss() -> None:
    weight = torch.zeros(5, 1)
    weight[2] = -40.0
    loss = functional.ceu_loss(torch.ones(1, 2, 1), weight, torch.tensor([[-100, 2]]), ignore_first_n_answer_tokens=0)
    assert loss.abs() < 1e-6


def test_ceu_with_nothing_left_to_count_is_zero() -> None:
    hidden, weight = torch.randn(2, 2, D, requires_grad=True), torch.randn(V, D)
    loss = functional.ceu_loss(hidden, weight, torch.tensor([[-100, 3], [-100, 4]]))
    loss.backward()
    assert loss == 0
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


def pair_batch() -> tuple[Tensor, Tensor]:
    """Return alternate sequences for ``batch``, padded to another length."""
    torch.manual_seed(1)
    hidden, labels = torch.randn(B, 6, D, dtype=torch.float64, requires_grad=True), torch.full((B, 6), -100)
    for row, (length, prompt) in enumerate(((6, 2), (2, 1), (6, 0), (3, 1))):
        labels[row, prompt:length] = torch.randint(V, (length - prompt,))
    return hidden, labels


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("live", [False, True])
def test_dpo_and_its_gradients_equal_the_formula(layout: str, live: bool) -> None:
    hidden, weight, labels = batch()
    other, other_labels = pair_batch()
    frozen, frozen_other = torch.randn(B, T, 3).double(), torch.randn(B, 6, 3).double()
    frozen_weight = torch.randn(V + 2, 3).double()
    reference, other_reference = (
        token_logprobs(rows, frozen_weight, flat)[0] for rows, flat in ((frozen, labels), (frozen_other, other_labels))
    )
    lost = token_logprobs(hidden, weight, labels)[0] - reference
    won = token_logprobs(other, weight, other_labels)[0] - other_reference
    expected = -2 / 0.2 * F.logsigmoid(0.2 * (won - lost)).mean()
    options: dict[str, Tensor] = {}
    rows, flat, other_rows, other_flat = hidden, labels, other, other_labels
    if layout == "packed":
        rows, flat, options["cu_seqlens"] = packed(hidden, labels)
        frozen = packed(frozen, labels)[0]
        other_rows, other_flat = other.reshape(-1, D), other_labels.reshape(-1)
        frozen_other = frozen_other.reshape(-1, 3)
        options["alternate_cu_seqlens"] = torch.arange(0, B * 6 + 1, 6)
    if live:
        options |= {"reference_hidden": frozen, "alternate_reference_hidden": frozen_other}
        options |= {"reference_weight": frozen_weight}
    else:
        options |= {"reference_logprobs": reference, "alternate_reference_logprobs": other_reference}
    got = functional.dpo_loss(rows, weight, flat, other_rows, other_flat, beta=0.2, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(got, expected)
    leaves = [hidden, weight, other]
    for left, right in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(left, right)


def test_an_empty_batch_costs_nothing_in_any_loss() -> None:
    weight = torch.randn(V, D).double().requires_grad_()
    hidden, labels = torch.randn(0, T, D).double(), torch.empty(0, T, dtype=torch.int64)
    reference = {"reference_hidden": torch.randn(0, T, 3).double(), "reference_weight": torch.randn(V, 3).double()}
    nothing = torch.empty(0)
    losses = [
        functional.wga_loss(hidden, weight, labels),
        functional.satimp_loss(hidden, weight, labels),
        functional.ceu_loss(hidden, weight, labels),
        functional.kl_loss(hidden, weight, labels, **reference),
        functional.undial_loss(hidden, weight, labels, beta=10, **reference),
        functional.dpo_loss(
            hidden,
            weight,
            labels,
            hidden,
            labels,
            beta=0.1,
            reference_logprobs=nothing,
            alternate_reference_logprobs=nothing,
        ),
    ]
    assert losses == [0] * 6
    assert torch.equal(torch.autograd.grad(sum(losses), weight)[0], torch.zeros_like(weight))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"beta": 0.0}, ValueError, "`beta`: expected a positive number"),
        ({"alternate_labels": torch.zeros(B, T)}, TypeError, "`labels`: expected dtype torch.int64"),
        (
            {"alternate_hidden": torch.randn(1, T, D).double(), "alternate_labels": torch.ones(1, T).long()},
            ValueError,
            "`alternate_labels`: expected 4 sequences, one for each sequence of `labels`, got 1",
        ),
        ({"alternate_reference_logprobs": None}, ValueError, "expected `alternate_reference_logprobs` as well"),
        (
            {"alternate_reference_logprobs": None, "reference_logprobs": None},
            ValueError,
            "expected a reference for DPO, got none",
        ),
        ({"alternate_reference_logprobs": torch.zeros(3)}, ValueError, r"`alternate_reference_logprobs`: .* \(4\)"),
        (
            {
                "reference_hidden": torch.randn(B, T, 3).double(),
                "alternate_reference_hidden": torch.randn(B, T - 1, 3).double(),
                "reference_weight": torch.randn(V, 3).double(),
            },
            ValueError,
            "`alternate_reference_hidden`: expected shape",
        ),
        (
            {
                "reference_hidden": torch.randn(B, T, 3).double(),
                "alternate_reference_hidden": torch.randn(B, T, 3).double(),
                "reference_weight": torch.randn(V, 3).double(),
            },
            ValueError,
            "got both",
        ),
    ],
)
def test_bad_pairs_are_refused(change: dict[str, object], error: type[Exception], message: str) -> None:
    hidden, weight, labels = batch()
    options = {
        "hidden": hidden,
        "weight": weight,
        "labels": labels,
        "alternate_hidden": hidden,
        "alternate_labels": labels,
        "beta": 1.0,
        "reference_logprobs": torch.zeros(B),
        "alternate_reference_logprobs": torch.zeros(B),
    }
    with pytest.raises(error, match=message):
        functional.dpo_loss(**{**options, **change})  # type: ignore[arg-type]


def test_bad_parameters_of_token_losses_are_refused() -> None:
    hidden, weight, labels = batch()
    with pytest.raises(ValueError, match="`beta`: expected 0 or a positive number, got -1"):
        functional.wga_loss(hidden, weight, labels, beta=-1)
    with pytest.raises(ValueError, match="`beta2`: expected 0 or a positive number"):
        functional.satimp_loss(hidden, weight, labels, beta2=float("nan"))
    with pytest.raises(ValueError, match="`ignore_first_n_answer_tokens`"):
        functional.ceu_loss(hidden, weight, labels, ignore_first_n_answer_tokens=-1)
    reference = {"reference_hidden": hidden.detach(), "reference_weight": torch.randn(V + 1, D).double()}
    with pytest.raises(ValueError, match="`beta`: expected a positive number"):
        functional.undial_loss(hidden, weight, labels, beta=0, **reference)
    with pytest.raises(ValueError, match="the vocabulary of `weight`, got 18"):
        functional.kl_loss(hidden, weight, labels, **reference)
    reference["reference_hidden"] = hidden[:, 1:]
    with pytest.raises(ValueError, match="`reference_hidden`: expected shape"):
        functional.kl_loss(hidden, weight, labels, **reference)


@pytest.mark.parametrize("name", functional.__all__)
def test_the_docstring_has_an_example_that_runs(name: str) -> None:
    (example,) = doctest.DocTestFinder(recurse=False).find(getattr(functional, name), name, functional, globs={})
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0


def test_the_contract_is_exported() -> None:
    for name in ("NPO", "SimNPO", "GradDiff", "GradAscent", "UnlearnTrainer", "UnlearnArguments", "functional"):
        assert hasattr(efface, name)
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = efface.Nonsense
