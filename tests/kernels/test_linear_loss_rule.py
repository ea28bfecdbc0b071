"""Tests of ``linear_sequence_loss`` with a declared rule: the fused launch, torch's formulas and a term function agree.

They run on every backend and with any chunks, in the interpreter and, if available, on a GPU.
"""

import pytest
import torch
from torch import Tensor

from efface_kernels import (
    Head,
    Kind,
    ReferenceRows,
    RowOffsets,
    SequenceLossOutput,
    SequenceRule,
    Term,
    linear_logprob,
    linear_sequence_loss,
)
from support import oracle
from support.oracle import CASES, Case, Problem

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BETA = 0.3
SMALL = [case for case in CASES if case.vocabulary < 100]


def oracle_loss(case: Case, problem: Problem) -> Tensor:
    """Return NPO's mean over the even sequences, plus half of the mean NLL over the rows of the odd ones."""
    values = oracle.logprobs(problem.hidden, problem.weight, problem.bias, problem.targets, case.softcap)
    m = problem.reference_hidden.shape[0]
    frozen = oracle.logprobs(
        problem.reference_hidden, problem.reference_weight, None, problem.targets[:m], case.softcap
    )
    frozen = torch.cat([frozen, frozen.new_zeros(len(values) - m)])
    sums, reference = (oracle.sums(each, problem.offsets) for each in (values, frozen))
    forget = [oracle.npo(*each, BETA) for each in zip(sums[::2], reference[::2], strict=True)]
    return torch.stack(forget).mean() - torch.stack([*sums[1::2], 0 * sums[0]]).sum() / 2 / len(values)


def our_loss(case: Case, problem: Problem, backend: str) -> Tensor:
    count = len(case.lengths)
    roles = (torch.arange(count) % 2).to(torch.int8)
    terms = {0: Term(Kind.NPO, 1 / ((count + 1) // 2), beta=BETA), 1: Term(Kind.NLL, 0.5 / len(problem.targets))}
    return linear_sequence_loss(
        problem.hidden,
        problem.weight,
        problem.targets,
        problem.offsets,
        SequenceRule.of(roles, terms),
        bias=problem.bias,
        softcap=case.softcap,
        reference=ReferenceRows(problem.reference_hidden, Head(problem.reference_weight, None, case.softcap)),
        chunk_rows=case.chunk_rows,
        backend=backend,
    ).loss


def gradients(loss: Tensor, problem: Problem) -> dict[str, Tensor]:
    leaves = problem.leaves()
    return dict(zip(leaves, torch.autograd.grad(0.7 * loss, list(leaves.values())), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_gradients_are_as_exact_as_eager(case: Case, dtype: torch.dtype, backend: str) -> None:
    case = oracle.within_reach(case, backend)
    problem = oracle.make(case, dtype)
    golden = oracle.exact(problem)
    gold, eager, ours = oracle_loss(case, golden), oracle_loss(case, problem), our_loss(case, problem, backend)
    oracle.assert_as_exact("loss", ours.detach(), eager.detach(), gold.detach(), dtype)
    gold_gradients, eager_gradients = gradients(gold, golden), gradients(eager, problem)
    for name, gradient in gradients(ours, problem).items():
        assert gradient.dtype == dtype
        oracle.assert_as_exact(f"d{name}", gradient, eager_gradients[name], gold_gradients[name], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case.chunk_rows or case.softcap or case.bias], ids=str)
def test_linear_logprob(case: Case, dtype: torch.dtype, triton_backend: str) -> None:
    problem = oracle.make(case, dtype)
    golden = oracle.exact(problem)
    upstream = torch.randn(len(problem.targets), dtype=torch.float64)
    results = []
    for one in (golden, problem):
        value = oracle.logprobs(one.hidden, one.weight, one.bias, one.targets, case.softcap)
        results.append((value, torch.autograd.grad(value, list(one.leaves().values()), upstream.to(value.dtype))))
    ours = linear_logprob(
        problem.hidden,
        problem.weight,
        problem.targets,
        bias=problem.bias,
        softcap=case.softcap,
        chunk_rows=case.chunk_rows,
        backend=triton_backend,
    )
    (gold, gold_gradients), (eager, eager_gradients) = results
    oracle.assert_as_exact("logprobs", ours.detach(), eager.detach(), gold.detach(), ours.dtype)
    got = torch.autograd.grad(ours, list(problem.leaves().values()), upstream.to(ours.dtype))
    for name, *three in zip(problem.leaves(), got, eager_gradients, gold_gradients, strict=True):
        oracle.assert_as_exact(f"d{name}", *three, dtype)


@pytest.mark.parametrize("case", [SMALL[0], SMALL[4], SMALL[8]], ids=str)
def test_gradcheck(case: Case, triton_backend: str) -> None:
    problem = oracle.make(case, torch.float64)
    leaves = problem.leaves()

    def loss(*tensors: Tensor) -> Tensor:
        return our_loss(case, Problem(**{**vars(problem), **dict(zip(leaves, tensors, strict=True))}), triton_backend)

    assert torch.autograd.gradcheck(loss, tuple(leaves.values()), fast_mode=True)


TABLES = {
    "dpo beside nll": {0: Term(Kind.DPO, 0.5, beta=BETA), 1: Term(Kind.ALTERNATE), 2: Term(Kind.NLL, 0.1)},
    "token weights": {0: Term(Kind.WGA, 0.5), 1: Term(Kind.SATIMP, 0.2, beta1=2.0), 2: Term(Kind.CEU, 0.1, ignored=1)},
    "simnpo, idle": {0: Term(Kind.SIMNPO, 0.5, beta=2.5, delta=0.1), 2: Term(Kind.ASCENT, 0.1)},
}


@pytest.mark.parametrize("chunk_rows", [2, 6, None])
@pytest.mark.parametrize("table", TABLES)
def test_a_rule_and_the_function_that_it_is_are_one_loss(table: str, chunk_rows: int | None, backend: str) -> None:
    """With pairs longer than the workspace, split into pieces, and a live reference for the pairs only."""
    case = Case("pairs", (3, 1, 4, 2, 5), bias=True, reference_sequences=4)
    problem = oracle.make(case, torch.float64)
    rule = SequenceRule.of(torch.tensor([0, 1, 0, 1, 2], dtype=torch.int8), TABLES[table])

    def run(terms: object, backend: str) -> SequenceLossOutput:
        return linear_sequence_loss(
            problem.hidden,
            problem.weight,
            problem.targets,
            problem.offsets,
            terms,  # type: ignore[arg-type]
            pairs=2,
            bias=problem.bias,
            reference=ReferenceRows(problem.reference_hidden, Head(problem.reference_weight)),
            chunk_rows=chunk_rows,
            backend=backend,
        )

    declared, called = run(rule, backend), run(lambda s: rule(s), "torch")  # noqa: PLW0108 - hides the rule
    for got, expected in zip(declared, called, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    expected_gradients = gradients(called.loss, problem)
    for name, gradient in gradients(declared.loss, problem).items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-11, atol=1e-14)


def test_offsets_may_be_given_in_both_places(backend: str) -> None:
    case = Case("both", (3, 1, 4))
    problem = oracle.make(case, torch.float32)
    rule = SequenceRule.of(torch.zeros(3, dtype=torch.int8), {0: Term(Kind.SIMNPO)})
    arguments = (problem.hidden, problem.weight, problem.targets)
    host = torch.tensor(problem.offsets, device="cpu")
    both = RowOffsets(host, host.to(problem.hidden.device))
    results = [
        linear_sequence_loss(*arguments, offsets, rule, chunk_rows=5, backend=backend).loss
        for offsets in (problem.offsets, host, both)
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    with pytest.raises(ValueError, match=r"`row_offsets.device`: expected shape \(4\)"):
        linear_sequence_loss(*arguments, RowOffsets(host, host[1:]), rule)
    with pytest.raises(TypeError, match=r"`row_offsets.device`: expected dtype torch.int64"):
        linear_sequence_loss(*arguments, RowOffsets(host, host.int()), rule)


def test_bad_rules_are_refused() -> None:
    hidden, weight, targets = torch.randn(4, 3), torch.randn(5, 3), torch.zeros(4, dtype=torch.int64)

    def run(terms: dict[int, Term], count: int = 2) -> None:
        rule = SequenceRule.of(torch.zeros(count, dtype=torch.int8), terms)
        linear_sequence_loss(hidden, weight, targets, [0, 2, 4], rule)

    with pytest.raises(ValueError, match=r"`terms.roles`: expected shape \(2\), got \(3,\)"):
        run({}, 3)
    with pytest.raises(ValueError, match="NPO and DPO need a reference, got none"):
        run({0: Term(Kind.NPO)})
    rule = SequenceRule.of(torch.tensor([0, 1], dtype=torch.int8), {0: Term(Kind.DPO), 1: Term(Kind.ALTERNATE)})
    with pytest.raises(ValueError, match="`pairs`: expected the number of DPO's pairs, got 0"):
        linear_sequence_loss(hidden, weight, targets, [0, 2, 4], rule, reference_sums=torch.zeros(2))
