"""The sequence loss against the engine's objectives, in fp64, differentiated by autograd."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from efface.batching.roles import StepTotals
from efface.objectives import CEU, DPO, NPO, WGA, GradAscent, GradDiff, IdkNLL, Objective, SatImp, SimNPO, StepTerms
from efface.objectives.base import nll_terms
from efface.objectives.ceu import ceu_terms
from efface.objectives.dpo import dpo_terms
from efface.objectives.grad_ascent import grad_ascent_terms
from efface.objectives.npo import npo_terms
from efface.objectives.satimp import satimp_terms
from efface.objectives.simnpo import simnpo_terms
from efface.objectives.wga import wga_terms
from efface_kernels import Kind, SequenceRule, Sequences, Term, sequence_loss

# NumPy warns of infinities that the interpreted kernel then leaves out
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow) encountered:RuntimeWarning")

DTYPES = (torch.float64, torch.float32)
LENGTHS = (3, 1, 150, 2, 7, 128, 1, 33, 4)  # less than, just and more than a block of the kernel
REFERENCE_ROWS = 163  # whole sequences
TERMS = {
    "nll": Term(Kind.NLL, 0.25),
    "grad ascent": Term(Kind.ASCENT, 0.5),
    "npo": Term(Kind.NPO, 0.7, beta=0.3),
    "simnpo": Term(Kind.SIMNPO, 0.4, beta=2.5, delta=0.2),
    "wga": Term(Kind.WGA, 0.6, beta=1.5),
    "satimp": Term(Kind.SATIMP, 0.9, beta1=5.0, beta2=0.5),
    "satimp of p alone": Term(Kind.SATIMP, 0.9, beta1=1.0, beta2=0.0),
    "ceu": Term(Kind.CEU, 0.3, ignored=2),
}


# The engine's objectives, whose formulas have tests of their own.
FUNCTIONS: dict[Kind, Callable[[Term, Sequences], Tensor]] = {
    Kind.NLL: lambda _, s: nll_terms(s),
    Kind.ASCENT: lambda _, s: grad_ascent_terms(s),
    Kind.NPO: lambda t, s: npo_terms(s, beta=t.beta),
    Kind.SIMNPO: lambda t, s: simnpo_terms(s, beta=t.beta, delta=t.delta),
    Kind.DPO: lambda t, s: dpo_terms(s, beta=t.beta),
    Kind.WGA: lambda t, s: wga_terms(s, beta=t.beta),
    Kind.SATIMP: lambda t, s: satimp_terms(s, beta1=t.beta1, beta2=t.beta2),
    Kind.CEU: lambda t, s: ceu_terms(s, ignore_first_n_answer_tokens=t.ignored),
}


def batch(dtype: torch.dtype, lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor, Tensor]:
    """ℓ, row offsets, ℓ_ref of the first rows; a third of the targets memorised."""
    g = torch.Generator().manual_seed(0)
    n = sum(lengths)
    logprobs = -torch.rand(n, generator=g, dtype=torch.float64, device="cpu") * 4 - 0.01
    logprobs[::3] *= 1e-3
    frozen = -torch.rand(n, generator=g, dtype=torch.float64, device="cpu")
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    device = offsets.device
    return logprobs.to(device, dtype), offsets, frozen[: min(n, REFERENCE_ROWS)].to(device, dtype)


def gold(terms: list[Term], logprobs: Tensor, offsets: Tensor, frozen: Tensor) -> tuple[Tensor, Tensor]:
    """Terms and c by the engine's functions, sequence by sequence, in fp64; CE-U's guard is the eps of the inputs."""
    leaf = logprobs.double().detach().requires_grad_()
    padded = torch.cat([frozen.double(), frozen.new_zeros(len(logprobs) - len(frozen), dtype=torch.float64)])
    bounds = offsets.tolist()
    values = []
    for i, term in enumerate(terms):
        if term.kind in (Kind.ALTERNATE, Kind.NONE):
            values.append(leaf[bounds[i]] * 0)
            continue
        own = bounds[i : i + (3 if term.kind == Kind.DPO else 2)]
        rows = slice(own[0], own[-1])
        own_offsets = torch.tensor(own) - own[0]
        reference = torch.segment_reduce(padded[rows], "sum", offsets=own_offsets)
        seen = leaf[rows].to(logprobs.dtype if term.kind == Kind.CEU else torch.float64)
        value = FUNCTIONS[term.kind](term, Sequences(seen, own_offsets, 0, reference))[0]
        values.append(term.weight * value.double())
    stacked = torch.stack(values)
    return stacked.detach(), torch.autograd.grad(stacked.sum(), leaf)[0]


def check(terms: list[Term], table: dict[int, Term], dtype: torch.dtype, backend: str) -> None:
    logprobs, offsets, frozen = batch(dtype)
    roles = torch.tensor([list(table.values()).index(term) for term in terms], dtype=torch.int8)
    rule = SequenceRule.of(roles, table)
    expected, slopes = gold(terms, logprobs, offsets, frozen)
    live = sequence_loss(logprobs, offsets, rule, reference_logprobs=frozen, backend=backend)
    assert live.reference_sums is not None
    cached = sequence_loss(logprobs, offsets, rule, reference_sums=live.reference_sums, backend=backend)
    seen = logprobs.clone().requires_grad_()  # the function that it is too
    called = rule(Sequences(seen, offsets, 0, live.reference_sums))
    # ℓ ≈ −1e-5 has few digits of 1 − p in fp32: 6e-8 of 1e-5
    rtol, atol = (1e-11, 1e-13) if dtype == torch.float64 else (2e-5, 2e-6)
    for got, c in [
        live[:2],
        cached[:2],
        (called.detach(), torch.autograd.grad(called.sum(), seen)[0]),
    ]:
        assert got.dtype == c.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=atol * LENGTHS[2])
        torch.testing.assert_close(c.double(), slopes, rtol=rtol, atol=atol)
    torch.testing.assert_close(live.sums, torch.segment_reduce(logprobs, "sum", offsets=offsets))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TERMS)
def test_one_kind(name: str, dtype: torch.dtype, backend: str) -> None:
    check([TERMS[name]] * len(LENGTHS), {0: TERMS[name]}, dtype, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kinds_mixed_in_one_launch(dtype: torch.dtype, backend: str) -> None:
    table = dict(enumerate([*[TERMS[name] for name in TERMS if name != "satimp of p alone"], Term(Kind.NONE)]))
    check([table[i % 8] for i in (4, 0, 1, 2, 3, 4, 5, 6, 7)], table, dtype, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dpo_pairs_beside_retained_sequences(dtype: torch.dtype, backend: str) -> None:
    table = {0: Term(Kind.DPO, 0.5, beta=0.2), 1: Term(Kind.NLL, 0.1), 2: Term(Kind.ALTERNATE)}
    check([table[i] for i in (0, 2, 0, 2, 0, 2, 1, 1, 1)], table, dtype, backend)
    # the alternates of the second pair are in no pair: they add nothing
    check([table[i] for i in (2, 0, 2, 2, 1, 0, 2, 2, 1)], table, dtype, backend)


OBJECTIVES = (
    NPO(beta=0.3, gamma=1.5, alpha=2.0),
    SimNPO(beta=2.5, delta=0.1),
    DPO(beta=0.2),
    WGA(beta=1.5),
    SatImp(gamma=0.4, beta2=0.5),
    CEU(ignore_first_n_answer_tokens=2, alpha=1.0),
    GradAscent(),
    GradDiff(gamma=0.5),
    IdkNLL(),
    None,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.name if objective else "fine-tuning")
def test_the_rule_of_an_objective_is_its_terms(objective: Objective | None, dtype: torch.dtype, backend: str) -> None:
    """Coefficients by autograd; alternates of no pair and idle sequences add nothing."""
    logprobs, offsets, frozen = batch(dtype)
    roles = torch.tensor([0, 2, 0, 2, 0, 2, 1, 1, 3], dtype=torch.int8)
    reference = torch.segment_reduce(
        torch.cat([frozen, frozen.new_zeros(len(logprobs) - len(frozen))]), "sum", offsets=offsets
    )
    step = StepTerms(objective, roles, StepTotals(3, 160, 2, 34, forget_label_counts=(3, 150, 7)))
    leaf = logprobs.clone().requires_grad_()
    expected = step(Sequences(leaf, offsets, 0, reference))
    (slopes,) = torch.autograd.grad(expected.sum(), leaf)
    rule = step.rule(forgets=True)
    assert rule is not None
    out = sequence_loss(logprobs, offsets, rule, reference_sums=reference, backend=backend)
    # sums of 150 addends in another order, which the sigmoid of a large margin magnifies
    rtol, atol = (1e-12, 1e-15) if dtype == torch.float64 else (2e-5, 1e-7)
    torch.testing.assert_close(out.terms, expected.detach(), rtol=rtol, atol=atol)
    torch.testing.assert_close(out.coefficients, slopes, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extremes(dtype: torch.dtype, backend: str) -> None:
    """Far beyond both ends of the sigmoid, and p = 1: everything stays finite, and small terms keep their digits."""
    offsets = torch.arange(5)
    logprobs = torch.tensor([-1e4, -30.0, -1e-30, 0.0], dtype=dtype)
    roles = torch.zeros(4, dtype=torch.int8)
    npo = sequence_loss(
        logprobs,
        offsets,
        SequenceRule.of(roles, {0: Term(Kind.NPO, beta=1.0)}),
        reference_sums=torch.tensor([0.0, 0.0, -1e4, 0.0], dtype=dtype),
        backend=backend,
    )
    exact = torch.tensor([0.0, 2 * math.exp(-30.0), 2e4, 2 * math.log(2)], dtype=dtype)
    torch.testing.assert_close(npo.terms, exact, rtol=3e-6, atol=0)
    slopes = torch.tensor([0.0, 2 * math.exp(-30.0), 2.0, 1.0], dtype=dtype)
    torch.testing.assert_close(npo.coefficients, slopes, rtol=3e-6, atol=0)
    ceu = sequence_loss(logprobs, offsets, SequenceRule.of(roles, {0: Term(Kind.CEU)}), backend=backend)
    eps = torch.finfo(dtype).eps
    assert ceu.terms.isfinite().all()
    torch.testing.assert_close(ceu.coefficients[2:], torch.full((2,), 1 / eps, dtype=dtype))
    torch.testing.assert_close(ceu.terms[3], torch.tensor(-math.log(eps), dtype=dtype))
    for kind in (Kind.WGA, Kind.SATIMP):
        out = sequence_loss(logprobs, offsets, SequenceRule.of(roles, {0: Term(kind)}), backend=backend)
        assert out.terms.isfinite().all()
        assert out.coefficients.isfinite().all()
    plain = SequenceRule.of(roles, {0: Term(Kind.SATIMP, beta1=0.0, beta2=0.0)})  # 0^0 is 1
    out = sequence_loss(logprobs[2:], offsets[:3], SequenceRule(roles[:2], plain.table, plain.kinds), backend=backend)
    assert out.coefficients.tolist() == [1.0, 1.0]


def test_a_nan_stays_in_its_sequence_and_a_lonely_first_is_nan(backend: str) -> None:
    logprobs, offsets, frozen = batch(torch.float32)
    logprobs[4:8] = torch.nan
    for term in TERMS.values():
        rule = SequenceRule.of(torch.zeros(9, dtype=torch.int8), {0: term})
        out = sequence_loss(logprobs, offsets, rule, reference_logprobs=frozen, backend=backend)
        assert out.terms.isnan().tolist() == [False, False, True] + [False] * 6
        assert out.coefficients[:4].isfinite().all()
        assert out.coefficients[offsets[3] :].isfinite().all()
    # the alternate at the other end is not its second
    roles = torch.tensor([2] + [1] * 7 + [0], dtype=torch.int8)
    rule = SequenceRule.of(roles, {0: Term(Kind.DPO), 1: Term(Kind.NONE), 2: Term(Kind.ALTERNATE)})
    out = sequence_loss(logprobs, offsets, rule, reference_logprobs=frozen, backend=backend)
    assert out.terms.isnan().tolist() == [False] * 8 + [True]
    assert out.coefficients[offsets[8] :].isnan().all()
    assert (out.coefficients[: offsets[8]] == 0).all()


def test_every_output_is_written_and_repeats_bit_for_bit(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers come full of NaN; a sequence's bits do not depend on its neighbours."""
    logprobs, offsets, frozen = batch(torch.float32)
    table = {0: TERMS["npo"], 1: TERMS["ceu"], 2: TERMS["nll"]}
    roles = torch.tensor([0, 1, 2] * 3, dtype=torch.int8)
    rule = SequenceRule.of(roles, table)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: torch.full_like(*a, torch.nan, **k))
    first, second = (
        sequence_loss(logprobs, offsets, rule, reference_logprobs=frozen, backend=backend) for _ in range(2)
    )
    part = sequence_loss(
        logprobs[:4].clone(),
        offsets[:3],
        SequenceRule.of(roles[:2], table),
        reference_logprobs=frozen[:4],
        backend=backend,
    )
    for one, two, three in zip(first, second, part, strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, two)
        assert torch.equal(one[: len(three)], three)


def test_no_sequences(backend: str) -> None:
    empty = torch.zeros(0)
    rule = SequenceRule.of(torch.zeros(0, dtype=torch.int8), {0: Term(Kind.NLL)})
    out = sequence_loss(empty, torch.zeros(1, dtype=torch.int64), rule, backend=backend)
    assert out.terms.shape == out.coefficients.shape == (0,)


def test_a_role_that_nobody_looked_at_makes_its_sequence_nan(triton_backend: str) -> None:
    logprobs, offsets = torch.full((4,), -1.0), torch.tensor([0, 1, 2, 4])
    rule = SequenceRule.of(torch.zeros(3, dtype=torch.int8), {0: Term(Kind.NLL)})
    rule.roles[:2] = torch.tensor([-1, 8], dtype=torch.int8)  # after the check, as on a GPU
    out = sequence_loss(logprobs, offsets, rule, backend=triton_backend)
    assert out.terms.isnan().tolist() == [True, True, False]
    assert out.coefficients.isnan().tolist() == [True, True, False, False]


def test_bad_input_is_refused() -> None:
    roles = torch.zeros(2, dtype=torch.int8)
    with pytest.raises(ValueError, match="`beta`: expected a positive number for NPO, got 0"):
        Term(Kind.NPO, beta=0.0)
    with pytest.raises(ValueError, match="expected finite numbers"):
        Term(Kind.NLL, math.inf)
    with pytest.raises(ValueError, match="`ignored`"):
        Term(Kind.CEU, ignored=-1)
    with pytest.raises(TypeError, match="`roles`: expected dtype torch.int8"):
        SequenceRule.of(roles.long(), {})
    with pytest.raises(ValueError, match=r"`roles`: expected 0 .. 7, got 8"):
        SequenceRule.of(roles, {8: Term(Kind.NLL)})
    with pytest.raises(ValueError, match=r"`roles`: expected 0 .. 7, got -1"):
        SequenceRule.of(roles - 1, {})
    rule = SequenceRule.of(roles, {0: Term(Kind.NPO)})
    offsets = torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="NPO and DPO need the reference"):
        sequence_loss(torch.zeros(2), offsets, rule)
    with pytest.raises(ValueError, match="`row_offsets`: expected shape"):
        sequence_loss(torch.zeros(2), offsets[:2], rule)
    with pytest.raises(ValueError, match="got both"):
        sequence_loss(torch.zeros(2), offsets, rule, reference_logprobs=torch.zeros(2), reference_sums=torch.zeros(2))
