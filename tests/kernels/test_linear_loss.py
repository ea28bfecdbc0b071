"""Tests of the loss op against the fp64 oracle, in every dtype, with every subset of gradients."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from efface_kernels import (
    Head,
    Kind,
    ReferenceRows,
    SequenceRule,
    Sequences,
    Term,
    linear_logprob,
    linear_sequence_loss,
    memory,
    release_workspaces,
)
from efface_kernels.linear_loss import chunks, fused_loss
from support import oracle
from support.oracle import CASES, Case, LargestTensor, Problem

BACKENDS = ("torch", "native")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BETA, DELTA = 0.3, 0.1
# DPO's margin is a difference of four sums. With the usual β the loss is large compared with their rounding, as in a
# run.
DPO_BETA = 0.1
DECLARED = (
    *("nll", "grad_ascent", "npo live", "npo cached", "dpo live", "dpo cached", "simnpo", "graddiff"),
    *("wga", "satimp", "ceu"),
)
OF_A_FUNCTION = ("npo live", "dpo cached", "graddiff")
OBJECTIVES = (*DECLARED, *(f"{name}, a function" for name in OF_A_FUNCTION))
EXPONENTS = {"wga": 1.5, "satimp": 2.0, "ceu": 1.0}  # of p
UPSTREAM = 0.7


def reference_sums(problem: Problem, softcap: float | None) -> list[Tensor]:
    """Return L_ref of every sequence, 0 for those without a reference."""
    m = problem.reference_hidden.shape[0]
    values = oracle.logprobs(problem.reference_hidden, problem.reference_weight, None, problem.targets[:m], softcap)
    padded = torch.cat([values, values.new_zeros(len(problem.targets) - m)])
    return oracle.sums(padded, problem.offsets)


def terms_of(objective: str, case: Case) -> list[Term]:
    """Return the term of each sequence."""
    n, sequences = sum(case.lengths), len(case.lengths)
    pairs = sequences // 2  # an odd sequence at the end is retained
    ascent, kept = Term(Kind.ASCENT, 1 / n), Term(Kind.NLL, 1 / n)
    match objective:
        case "graddiff":  # even sequences are forget, odd ones retain, with different weights
            return [Term(Kind.NLL, 2 / n) if i % 2 else ascent for i in range(sequences)]
        case "dpo live" | "dpo cached":
            return [Term(Kind.DPO, beta=DPO_BETA), Term(Kind.ALTERNATE)] * pairs + [kept] * (sequences % 2)
    one = {
        "nll": kept,
        "grad_ascent": ascent,
        "npo live": Term(Kind.NPO, 1 / sequences, beta=BETA),
        "npo cached": Term(Kind.NPO, 1 / sequences, beta=BETA),
        "simnpo": Term(Kind.SIMNPO, 1 / sequences, beta=BETA, delta=DELTA),
        "wga": Term(Kind.WGA, 1 / n, beta=EXPONENTS["wga"]),
        "satimp": Term(Kind.SATIMP, 1 / n, beta1=EXPONENTS["satimp"], beta2=0.5),
        "ceu": Term(Kind.CEU, 1 / n, ignored=1),
    }
    return [one[objective]] * sequences


def oracle_loss(objective: str, case: Case, problem: Problem, dtype: torch.dtype) -> Tensor:
    """Compute the loss. ``dtype`` is the original one of the problem, whose eps CE-U uses."""
    values = oracle.logprobs(problem.hidden, problem.weight, problem.bias, problem.targets, case.softcap)
    policy, frozen = oracle.sums(values, problem.offsets), reference_sums(problem, case.softcap)
    n, pairs = len(values), len(policy) // 2
    match objective:  # as explicit means; in a rule they are weights
        case "npo live, a function":
            return sum(oracle.npo(*each, BETA) for each in zip(policy, frozen, strict=True)) / len(policy)
        case "dpo cached, a function":
            both = list(zip(policy, frozen, strict=True))
            won = sum(oracle.dpo(both[i], both[i + 1], DPO_BETA) for i in range(0, 2 * pairs, 2))
            return won - sum(policy[2 * pairs :]) / n
        case "graddiff, a function":
            return torch.stack([-2 * each if i % 2 else each for i, each in enumerate(policy)]).sum() / n
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    return oracle.terms(terms_of(objective, case), oracle.split(values, problem.offsets), frozen, eps).sum()


def npo_terms(s: Sequences) -> Tensor:
    return -2 / BETA * logsigmoid(-BETA * (s.sums - s.reference_sums))


def declared(objective: str, case: Case) -> SequenceRule:
    terms = terms_of(objective, case)
    table = list(dict.fromkeys(terms))
    return SequenceRule.of(
        torch.tensor([table.index(each) for each in terms], dtype=torch.int8), dict(enumerate(table))
    )


def function(objective: str, case: Case) -> Callable[[Sequences], Tensor]:
    n, sequences = sum(case.lengths), len(case.lengths)
    even = torch.arange(sequences) % 2 == 0
    alone = torch.arange(sequences) >= sequences // 2 * 2

    def dpo(s: Sequences) -> Tensor:
        ratio = s.sums - s.reference_sums
        terms = -2 / DPO_BETA * logsigmoid(DPO_BETA * (s.following(ratio) - ratio))
        return torch.where(s.own(alone), -s.sums / n, terms.masked_fill(s.own(~even), 0))

    return {
        "npo live": lambda s: npo_terms(s) / sequences,
        "dpo cached": dpo,
        "graddiff": lambda s: torch.where(s.own(even), s.sums, -2 * s.sums) / n,
    }[objective]


def our_loss(objective: str, case: Case, problem: Problem, backend: str = "auto") -> Tensor:
    reference, cached = None, None
    name = objective.removesuffix(", a function")
    if name.endswith("live"):
        reference = ReferenceRows(problem.reference_hidden, Head(problem.reference_weight, None, case.softcap))
    if name.endswith("cached"):
        cached = torch.stack(reference_sums(problem, case.softcap))
    return linear_sequence_loss(
        problem.hidden,
        problem.weight,
        problem.targets,
        problem.offsets,
        declared(name, case) if name == objective else function(name, case),
        pairs=len(case.lengths) // 2 if name.startswith("dpo") else 0,
        bias=problem.bias,
        softcap=case.softcap,
        reference=reference,
        reference_sums=cached,
        chunk_rows=case.chunk_rows,
        backend=backend,
    ).loss


def gradients(loss: Tensor, problem: Problem) -> dict[str, Tensor]:
    leaves = problem.leaves()
    return dict(zip(leaves, torch.autograd.grad(UPSTREAM * loss, list(leaves.values())), strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_and_gradients_are_as_exact_as_eager(objective: str, case: Case) -> None:
    exponent = EXPONENTS.get(objective, 0)
    for dtype in DTYPES:
        problem = oracle.make(case, dtype)
        exact = oracle.exact(problem)
        gold = oracle_loss(objective, case, exact, dtype)
        eager = oracle_loss(objective, case, problem, dtype)
        gold_gradients, eager_gradients = gradients(gold, exact), gradients(eager, problem)
        for backend in BACKENDS:
            ours, where = our_loss(objective, case, problem, backend), f"{backend}, {dtype}"
            assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32), where
            # Half-precision logits are rounded, in eager as in ours, so the loss is exact only to eps of that dtype.
            oracle.assert_as_exact(f"loss, {where}", ours.detach(), eager.detach(), gold.detach(), dtype, exponent)
            for name, gradient in gradients(ours, problem).items():
                assert gradient.dtype == dtype, where
                expected = eager_gradients[name], gold_gradients[name]
                oracle.assert_as_exact(f"d{name}, {where}", gradient, *expected, dtype, exponent)


@pytest.mark.parametrize("case", [case for case in CASES if case.vocabulary < 100 and case.scale == 1], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_ceu_has_the_gradient_of_a_cross_entropy_to_the_other_tokens(backend: str, case: Case) -> None:
    problem = oracle.make(case, torch.float64)
    logits = oracle.capped_logits(problem.hidden, problem.weight, problem.bias, case.softcap)
    rows = zip(oracle.split(logits, problem.offsets), oracle.split(problem.targets, problem.offsets), strict=True)
    expected = sum(oracle.ceu_cross_entropy(each[1:], targets[1:]) for each, targets in rows) / len(logits)
    gold = gradients(expected + 0 * logits.sum(), problem)
    for name, gradient in gradients(our_loss("ceu", case, problem, backend), problem).items():
        torch.testing.assert_close(gradient, gold[name], rtol=1e-11, atol=1e-13, msg=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("objective", ["npo live", "npo cached", "dpo live"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_chunks_of_a_device_are_as_exact_as_eager(
    backend: str, objective: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three rows per chunk; in bf16 also the largest batch that is a single chunk, and one with one more row."""
    monkeypatch.setattr(chunks, "chunk_capacity", lambda *_: 3)
    taken = []
    for plan in ("plan_sequences", "plan_rows"):
        planned = getattr(fused_loss, plan)
        monkeypatch.setattr(fused_loss, plan, lambda *given, of=planned: taken.append(of(*given)) or taken[-1])
    d = 4
    most = 3 + (d if objective.endswith("live") else 2 * d)
    for n in (1, 3, most, most + 1):
        case = Case("own", (1,) * n, hidden_size=d, vocabulary=97, reference_sequences=n, bias=True)
        problem = oracle.make(case, dtype)
        exact = oracle.exact(problem)
        values = [oracle_loss(objective, case, each, dtype) for each in (exact, problem)]
        ours = our_loss(objective, case, problem, backend)
        assert (len(taken[-1]) == 1) == (n <= 3 or (n <= most and dtype == torch.bfloat16)), n
        oracle.assert_as_exact("loss", ours.detach(), values[1].detach(), values[0].detach(), dtype)
        gold, eager = gradients(values[0], exact), gradients(values[1], problem)
        for name, gradient in gradients(ours, problem).items():
            oracle.assert_as_exact(f"d{name}", gradient, eager[name], gold[name], dtype)


# gradcheck perturbs every entry of every input, so D and V are small.
GRADCHECKED = [
    replace(case, hidden_size=5, vocabulary=min(case.vocabulary, 13)) for case in CASES if case.vocabulary < 100
]


@pytest.mark.parametrize("case", GRADCHECKED, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str, case: Case) -> None:
    problem = oracle.make(case, torch.float64)
    leaves = problem.leaves()

    def loss(*tensors: Tensor) -> Tensor:
        given = dict(zip(leaves, tensors, strict=True))
        mixed = Problem(**{**vars(problem), **given})
        return our_loss("npo live", case, mixed, backend) + our_loss("simnpo", case, mixed, backend)

    assert torch.autograd.gradcheck(loss, tuple(leaves.values()), fast_mode=backend == "native")


@pytest.mark.parametrize("case", GRADCHECKED, ids=str)
def test_gradcheck_of_pairs(case: Case) -> None:
    problem = oracle.make(case, torch.float64)
    leaves = problem.leaves()

    def loss(*tensors: Tensor) -> Tensor:
        return our_loss("dpo live", case, Problem(**{**vars(problem), **dict(zip(leaves, tensors, strict=True))}))

    assert torch.autograd.gradcheck(loss, tuple(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("case", GRADCHECKED, ids=str)
def test_gradcheck_of_linear_logprob(case: Case) -> None:
    problem = oracle.make(case, torch.float64)
    leaves = problem.leaves()

    def logprobs(*tensors: Tensor) -> Tensor:
        given = dict(zip(leaves, tensors, strict=True))
        return linear_logprob(
            given["hidden"],
            given["weight"],
            problem.targets,
            bias=given.get("bias"),
            softcap=case.softcap,
            chunk_rows=case.chunk_rows,
        )

    assert torch.autograd.gradcheck(logprobs, tuple(leaves.values()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_linear_logprob_with_random_upstream_gradients(case: Case, dtype: torch.dtype) -> None:
    problem = oracle.make(case, dtype)
    exact = {name: leaf.detach().double().requires_grad_() for name, leaf in problem.leaves().items()}
    upstream = torch.randn(len(problem.targets), generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def oracle_of(leaves: dict[str, Tensor]) -> Tensor:
        return oracle.logprobs(leaves["hidden"], leaves["weight"], leaves.get("bias"), problem.targets, case.softcap)

    def gradients_of(value: Tensor, leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(value, list(leaves.values()), upstream.to(value.dtype))

    gold, eager = oracle_of(exact), oracle_of(problem.leaves())
    expected = gradients_of(eager, problem.leaves()), gradients_of(gold, exact)
    for backend in BACKENDS:
        ours = linear_logprob(
            problem.hidden,
            problem.weight,
            problem.targets,
            bias=problem.bias,
            softcap=case.softcap,
            chunk_rows=case.chunk_rows,
            backend=backend,
        )
        oracle.assert_as_exact(f"logprobs, {backend}", ours.detach(), eager.detach(), gold.detach(), ours.dtype)
        for name, *three in zip(exact, gradients_of(ours, problem.leaves()), *expected, strict=True):
            oracle.assert_as_exact(f"d{name}, {backend}", *three, dtype)


@pytest.mark.parametrize("wanted", list(itertools.product((False, True), repeat=3)), ids=str)
@pytest.mark.parametrize("chunk_rows", [None, 4])
def test_every_subset_of_gradients_is_the_same_gradient(wanted: tuple[bool, ...], chunk_rows: int | None) -> None:
    case = Case("subset", (2, 9, 3), bias=True, chunk_rows=chunk_rows)
    problem = oracle.make(case, torch.float64)
    everything = gradients(our_loss("npo live", case, problem), problem)
    chosen = {}
    for (name, leaf), want in zip(problem.leaves().items(), wanted, strict=True):
        leaf.requires_grad_(want)
        if want:
            chosen[name] = leaf
    loss = our_loss("npo live", case, problem)
    assert loss.requires_grad == any(wanted)
    if chosen:
        for name, gradient in zip(chosen, torch.autograd.grad(UPSTREAM * loss, list(chosen.values())), strict=True):
            torch.testing.assert_close(gradient, everything[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("chunk_rows", [1, 2, 3, 5, 8, 100])
def test_the_chunk_size_changes_nothing_beyond_rounding(chunk_rows: int) -> None:
    whole = Case("whole", (3, 6, 1, 4), bias=True, chunk_rows=None)
    cut = Case("cut", whole.lengths, bias=True, chunk_rows=chunk_rows)
    problem = oracle.make(whole, torch.float32)
    expected, got = our_loss("npo live", whole, problem), our_loss("npo live", cut, problem)
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=0)
    wanted = gradients(expected, problem)
    for name, gradient in gradients(got, problem).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("frozen_head", [False, True])
@pytest.mark.parametrize("chunk_rows", [1, 2, 3, 5, 8, 100])
def test_a_pair_is_never_separated(chunk_rows: int, frozen_head: bool) -> None:
    whole = Case("whole", (3, 6, 1, 4, 2), bias=True)
    cut = Case("cut", whole.lengths, bias=True, chunk_rows=chunk_rows)
    problem = oracle.make(whole, torch.float64)
    expected = our_loss("dpo live", whole, problem)
    expected_gradients = gradients(expected, problem)
    for leaf in (problem.weight, problem.bias) if frozen_head else ():
        leaf.requires_grad_(False)
    got = our_loss("dpo live", cut, problem)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)
    leaves = {name: leaf for name, leaf in problem.leaves().items() if leaf.requires_grad}
    for name, gradient in zip(leaves, torch.autograd.grad(UPSTREAM * got, list(leaves.values())), strict=True):
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-11, atol=1e-13)


def test_a_term_sees_the_sequence_behind_its_own() -> None:
    offsets = torch.tensor([0, 2, 3, 6])
    logprobs = torch.arange(6.0).requires_grad_()
    sequences = Sequences(logprobs, offsets)
    assert sequences.following(sequences.sums).tolist() == [2, 12, 1]
    sequences.following(sequences.sums)[0].backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [0, 0, 1, 0, 0, 0]
    assert len(sequences.following(torch.ones(0))) == 0


def test_rows_know_their_place_in_their_sequence() -> None:
    sequences = Sequences(torch.zeros(6), torch.tensor([0, 2, 3, 6]))
    assert sequences.places.tolist() == [0, 1, 0, 0, 1, 2]
    assert sequences.sums_of(sequences.places.float()).tolist() == [1, 0, 3]
    assert Sequences(torch.zeros(0), torch.tensor([0])).places.tolist() == []


def test_the_packing_order_changes_nothing_beyond_rounding() -> None:
    case = Case("order", (3, 6, 1, 4), chunk_rows=7)
    problem = oracle.make(case, torch.float64)
    order = [2, 0, 3, 1]
    rows = torch.cat([torch.arange(problem.offsets[s], problem.offsets[s + 1]) for s in order])
    shuffled_case = Case("shuffled", tuple(case.lengths[s] for s in order), chunk_rows=7)
    shuffled = oracle.make(shuffled_case, torch.float64)
    shuffled.weight = problem.weight
    shuffled.hidden, shuffled.targets = problem.hidden.detach()[rows].requires_grad_(), problem.targets[rows]
    shuffled.reference_hidden, shuffled.reference_weight = problem.reference_hidden[rows], problem.reference_weight
    expected, got = our_loss("npo live", case, problem), our_loss("npo live", shuffled_case, shuffled)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(
        gradients(got, shuffled)["hidden"], gradients(expected, problem)["hidden"][rows], rtol=1e-12, atol=1e-15
    )


def test_bitwise_repeatable() -> None:
    case = Case("repeat", (30, 50, 10, 45), vocabulary=997, hidden_size=64, chunk_rows=60)
    problem = oracle.make(case, torch.float32)
    losses = [our_loss("npo live", case, problem) for _ in range(3)]
    grads = [gradients(loss, problem) for loss in losses]
    for loss, grad in zip(losses[1:], grads[1:], strict=True):
        assert torch.equal(loss, losses[0])
        assert all(torch.equal(grad[name], grads[0][name]) for name in grad)


def test_coefficients_below_the_smallest_half_precision_number_survive() -> None:
    """A well forgotten sequence has c ~ 1e-9. With the usual loss scale its gradient can be represented in fp16."""
    case = Case("forgotten", (4, 3), chunk_rows=4)
    for dtype in (torch.float16, torch.float64):
        problem = oracle.make(case, dtype)
        loss = linear_sequence_loss(
            problem.hidden, problem.weight, problem.targets, problem.offsets, lambda s: s.sums * 1e-9, chunk_rows=4
        ).loss
        grads = torch.autograd.grad(loss * 2.0**24, [problem.hidden, problem.weight])
        if dtype == torch.float16:
            half = grads
        else:
            for got, expected in zip(half, grads, strict=True):
                torch.testing.assert_close(got.double(), expected, rtol=0.02, atol=2e-5)


@pytest.mark.parametrize("op", ["loss", "logprob"])
def test_no_tensor_of_all_logits_is_ever_alive(op: str) -> None:
    n, d, v, chunk_rows = 256, 4, 2000, 16
    hidden = torch.randn(n, d, requires_grad=True)
    weight = torch.randn(v, d, requires_grad=True)
    targets = torch.randint(v, (n,))
    offsets = list(range(0, n + 1, 8))
    with LargestTensor() as seen:
        if op == "loss":
            reference = ReferenceRows(hidden.detach(), Head(weight.detach()))
            loss = linear_sequence_loss(
                hidden,
                weight,
                targets,
                offsets,
                npo_terms,
                reference=reference,
                chunk_rows=chunk_rows,
            ).loss
        else:
            loss = linear_logprob(hidden, weight, targets, chunk_rows=chunk_rows).sum()
        loss.backward()
    models = 2 if op == "loss" else 1  # both models share a head, and so a GEMM
    assert seen.largest <= models * chunk_rows * v * 4
    assert weight.grad is not None


def test_backward_twice_and_a_stride_zero_upstream() -> None:
    case = Case("twice", (2, 3))
    problem = oracle.make(case, torch.float64)
    logprobs = linear_logprob(problem.hidden, problem.weight, problem.targets)
    first = torch.autograd.grad(logprobs.sum(), problem.weight, retain_graph=True)[0]
    second = torch.autograd.grad(logprobs, problem.weight, torch.ones(()).double().expand(5))[0]
    torch.testing.assert_close(first, second)
    loss = our_loss("simnpo", case, problem)
    first = torch.autograd.grad(loss, problem.weight, retain_graph=True)[0]
    second = torch.autograd.grad(3 * loss, problem.weight)[0]
    torch.testing.assert_close(3 * first, second)
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        torch.autograd.grad(loss, problem.weight)


def test_strided_inputs() -> None:
    case = Case("strided", (2, 3))
    problem = oracle.make(case, torch.float64)
    expected = gradients(our_loss("simnpo", case, problem), problem)
    wide = torch.zeros(5, 24, dtype=torch.float64)
    wide[:, ::2] = problem.hidden.detach()
    problem.hidden = wide[:, ::2].requires_grad_()
    problem.weight = problem.weight.detach().T.contiguous().T.requires_grad_()
    for name, gradient in gradients(our_loss("simnpo", case, problem), problem).items():
        torch.testing.assert_close(gradient, expected[name])


def test_empty_batch_is_a_zero_loss_with_zero_gradients() -> None:
    hidden, weight = torch.randn(0, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    targets = torch.zeros(0, dtype=torch.int64)
    out = linear_sequence_loss(hidden, weight, targets, [0], lambda s: s.sums)
    assert out.loss == 0
    assert out.terms.shape == (0,)
    logprobs = linear_logprob(hidden, weight, targets)
    (out.loss + logprobs.sum()).backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, 4)
    assert torch.equal(weight.grad, torch.zeros(7, 4))


def test_workspaces_are_reused_and_can_be_released() -> None:
    """Results do not depend on the old contents of a reused buffer. Nested calls get separate buffers."""
    case = Case("reuse", (3, 4))
    problem = oracle.make(case, torch.float32)
    release_workspaces()
    first = our_loss("npo live, a function", case, problem)
    for buffer in memory._idle.buffers:
        buffer.fill_(255)  # NaN
    assert torch.equal(our_loss("npo live, a function", case, problem), first)

    def nested(s: Sequences) -> Tensor:
        our_loss("simnpo", case, problem)
        return npo_terms(s) / 2

    out = linear_sequence_loss(
        problem.hidden,
        problem.weight,
        problem.targets,
        problem.offsets,
        nested,
        reference=ReferenceRows(problem.reference_hidden, Head(problem.reference_weight)),
    )
    assert torch.equal(out.loss, first)
    for got, expected in zip(gradients(out.loss, problem).values(), gradients(first, problem).values(), strict=True):
        assert torch.equal(got, expected)
    release_workspaces()
    assert not memory._idle.buffers


def test_closed_forms() -> None:
    """Equal logits give −log V, and a constant added to all logits changes nothing."""
    v = 11
    flat = linear_logprob(torch.zeros(3, 4), torch.randn(v, 4), torch.tensor([0, 5, v - 1]))
    torch.testing.assert_close(flat, torch.full((3,), -torch.log(torch.tensor(float(v)))))
    hidden, weight, targets = torch.randn(3, 4).double(), torch.randn(v, 4).double(), torch.tensor([0, 5, v - 1])
    shifted = linear_logprob(hidden, weight, targets, bias=torch.full((v,), 300.0).double())
    torch.testing.assert_close(shifted, linear_logprob(hidden, weight, targets))


def test_the_output_says_what_the_loss_was_made_of() -> None:
    case = Case("parts", (2, 3, 1), chunk_rows=3)
    problem = oracle.make(case, torch.float64)
    out = linear_sequence_loss(
        problem.hidden,
        problem.weight,
        problem.targets,
        torch.tensor(problem.offsets),
        npo_terms,
        reference=ReferenceRows(problem.reference_hidden, Head(problem.reference_weight)),
        chunk_rows=3,
    )
    values = oracle.logprobs(problem.hidden, problem.weight, None, problem.targets, None).detach()
    torch.testing.assert_close(out.logprobs, values)
    torch.testing.assert_close(out.sequence_logprobs, torch.stack(oracle.sums(values, problem.offsets)))
    torch.testing.assert_close(out.reference_sums, torch.stack(reference_sums(problem, None)))
    torch.testing.assert_close(out.terms.sum(), out.loss.detach())
    assert not out.terms.requires_grad


def test_a_loss_that_ignores_the_logprobs_has_no_gradient() -> None:
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    out = linear_sequence_loss(hidden, weight, torch.zeros(3, dtype=torch.int64), [0, 3], lambda s: s.lengths * 0 + 2)
    out.loss.backward()
    assert torch.equal(weight.grad, torch.zeros(7, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_linear_does(dtype: torch.dtype) -> None:
    hidden, weight = torch.randn(6, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    targets = torch.randint(50, (6,))
    with torch.autocast("cpu", dtype):
        ours = linear_sequence_loss(hidden, weight, targets, [0, 6], lambda s: -s.sums).loss
        logits = torch.nn.functional.linear(hidden, weight)
        assert logits.dtype == dtype
        eager = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
    torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)
    ours_gradients = torch.autograd.grad(ours, [hidden, weight])
    for got, expected in zip(ours_gradients, torch.autograd.grad(eager, [hidden, weight]), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dtype", [torch.float32, None], ids=["float32 head", "its own head"])
def test_a_float32_head_meets_half_precision_in_its_dtype(dtype: torch.dtype, head_dtype: torch.dtype | None) -> None:
    """As inside autocast. The head's gradient is float32."""
    weight, bias = torch.randn(50, 16).to(dtype), torch.randn(50).to(dtype)
    hidden, targets = torch.randn(6, 16).to(dtype).requires_grad_(), torch.randint(50, (6,))
    leaves = [each.to(head_dtype or dtype).requires_grad_() for each in (weight, bias)]
    reference = ReferenceRows(hidden.detach(), Head(leaves[0].detach(), leaves[1].detach()))
    loss = (
        linear_sequence_loss(hidden, leaves[0], targets, [0, 6], npo_terms, bias=leaves[1], reference=reference).loss
        + linear_logprob(hidden, leaves[0], targets, bias=leaves[1]).sum()
    )
    for got, leaf in zip(torch.autograd.grad(loss, [hidden, *leaves]), [hidden, *leaves], strict=True):
        assert got.dtype == leaf.dtype
    logits = torch.nn.functional.linear(hidden, weight, bias)
    values = torch.log_softmax(logits.float(), 1).gather(1, targets[:, None]).sum()
    torch.testing.assert_close(loss.detach(), values.detach() + 2 / BETA * math.log(2), rtol=1e-5, atol=1e-5)


def test_a_head_of_another_dtype_is_refused() -> None:
    with pytest.raises(TypeError, match="`weight`: expected dtype torch.float32, got torch.bfloat16"):
        linear_logprob(torch.randn(2, 3), torch.randn(5, 3).bfloat16(), torch.tensor([0, 1]))
    with pytest.raises(TypeError, match="`bias`: expected dtype torch.bfloat16, got torch.float32"):
        linear_logprob(
            torch.randn(2, 3).bfloat16(), torch.randn(5, 3).bfloat16(), torch.tensor([0, 1]), bias=torch.randn(5)
        )


def _arguments() -> dict[str, object]:
    return {
        "hidden": torch.randn(3, 4),
        "weight": torch.randn(7, 4),
        "targets": torch.tensor([0, 1, 6]),
        "row_offsets": [0, 3],
        "terms": lambda s: s.sums,
    }


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.randn(3, 5)}, ValueError, r"`hidden`: expected shape \(N, 4\), got \(3, 5\)"),
        ({"hidden": torch.randn(1, 3, 4)}, ValueError, "`hidden`: expected shape"),
        ({"hidden": torch.ones(3, 4, dtype=torch.int64)}, TypeError, "`hidden`: expected dtype"),
        ({"weight": torch.randn(7, 4).bfloat16()}, TypeError, "`weight`: expected dtype torch.float32, got torch.bf"),
        ({"bias": torch.randn(6)}, ValueError, r"`bias`: expected shape \(7\)"),
        ({"targets": torch.tensor([0, 1, 6], dtype=torch.int32)}, TypeError, "`targets`: expected dtype torch.int64"),
        ({"targets": torch.tensor([0, 1])}, ValueError, r"`targets`: expected shape \(3\)"),
        ({"targets": torch.tensor([0, 1, 7])}, ValueError, r"token ids in 0 .. 6 .* got 7"),
        ({"targets": torch.tensor([0, -100, 6])}, ValueError, r"token ids in 0 .. 6 .* got -100"),
        ({"row_offsets": [0, 2]}, ValueError, "`row_offsets`: expected offsets from 0 to 3"),
        ({"row_offsets": []}, ValueError, "got no entries"),
        ({"row_offsets": [0, 1, 1, 3]}, ValueError, "sequence 1; drop sequences without a label"),
        ({"terms": lambda s: s.logprobs}, ValueError, "one loss term for each of 1 sequences"),
        ({"reference_sums": torch.zeros(2)}, ValueError, "`reference_sums`: expected shape"),
        (
            {"reference": ReferenceRows(torch.randn(2, 4), Head(torch.randn(7, 4)))},
            ValueError,
            "first sequences, got 2 rows",
        ),
        (
            {
                "reference": ReferenceRows(torch.randn(3, 4), Head(torch.randn(7, 4))),
                "reference_sums": torch.zeros(1),
            },
            ValueError,
            "got both",
        ),
        (
            {"reference": ReferenceRows(torch.randn(3, 4), Head(torch.randn(5, 4)))},
            ValueError,
            r"token ids in 0 .. 4",
        ),
        ({"softcap": 0.0}, ValueError, "`softcap`: expected a positive finite number"),
        ({"pairs": 1}, ValueError, "`pairs`: expected at most half of the 1 sequences, got 1"),
        ({"pairs": -1}, ValueError, "`pairs`: .* got -1"),
        ({"chunk_rows": 0}, ValueError, "`chunk_rows`: expected at least 1"),
        ({"backend": "cuda"}, ValueError, "`backend`: expected one of 'auto'"),
    ],
)
def test_bad_input_is_refused(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        linear_sequence_loss(**{**_arguments(), **change})  # type: ignore[arg-type]
