"""Tests of the sequence loss against the fp64 oracle, differentiated by autograd, and of the objectives' rules."""

import math

import pytest
import torch
from torch import Tensor

from efface.batching.plan import StepTotals
from efface.objectives import CEU, DPO, NPO, WGA, GradAscent, GradDiff, IdkNLL, Objective, SatImp, SimNPO, step_terms
from efface_kernels import Kind, SequenceRule, Sequences, Term, sequence_loss
from support import oracle

# NumPy warns of infinities that the interpreted kernel masks afterwards
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow) encountered:RuntimeWarning")

DTYPES = (torch.float64, torch.float32)
LENGTHS = (3, 1, 150, 2, 7, 128, 1, 33, 4)  # fewer rows than a block of the kernel, exactly a block, and more
REFERENCE_ROWS = 163  # complete sequences
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


def batch(dtype: torch.dtype, lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor, Tensor]:
    """Return ℓ, row offsets, and ℓ_ref of the first rows. A third of the targets is memorised."""
    g = torch.Generator().manual_seed(0)
    n = sum(lengths)
    logprobs = -torch.rand(n, generator=g, dtype=torch.float64, device="cpu") * 4 - 0.01
    logprobs[::3] *= 1e-3
    frozen = -torch.rand(n, generator=g, dtype=torch.float64, device="cpu")
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    device = offsets.device
    return logprobs.to(device, dtype), offsets, frozen[: min(n, REFERENCE_ROWS)].to(device, dtype)


def gold(terms: list[Term], logprobs: Tensor, offsets: Tensor, frozen: Tensor) -> tuple[Tensor, Tensor]:
    """Return the terms and c from the oracle, in fp64. CE-U's eps is that of the input dtype."""
    leaf = logprobs.double().detach().requires_grad_()
    padded = torch.cat([frozen.double(), frozen.new_zeros(len(logprobs) - len(frozen), dtype=torch.float64)])
    bounds = offsets.tolist()
    values = oracle.terms(
        terms, oracle.split(leaf, bounds), oracle.sums(padded, bounds), torch.finfo(logprobs.dtype).eps
    )
    return values.detach(), torch.autograd.grad(values.sum(), leaf)[0]


def check(terms: list[Term], table: dict[int, Term], dtype: torch.dtype, backend: str) -> None:
    logprobs, offsets, frozen = batch(dtype)
    roles = torch.tensor([list(table.values()).index(term) for term in terms], dtype=torch.int8)
    rule = SequenceRule.of(roles, table)
    expected, slopes = gold(terms, logprobs, offsets, frozen)
    live = sequence_loss(logprobs, offsets, rule, reference_logprobs=frozen, backend=backend)
    assert live.reference_sums is not None
    cached = sequence_loss(logprobs, offsets, rule, reference_sums=live.reference_sums, backend=backend)
    seen = logprobs.clone().requires_grad_()  # the rule called as a function
    called = rule(Sequences(seen, offsets, 0, live.reference_sums))
    # for ℓ ≈ −1e-5, fp32 has few digits of 1 − p: 6e-8 compared with 1e-5
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
    # the alternates of the second pair belong to no pair, so they add nothing
    check([table[i] for i in (2, 0, 2, 2, 1, 0, 2, 2, 1)], table, dtype, backend)


# The term of a forget sequence, with gamma divided by 3 sequences or by 160 label tokens (154 without the first 2 of
# each sequence), and alpha divided by 34 label tokens of the retain sequences.
OBJECTIVES: tuple[tuple[Objective | None, Term, float], ...] = (
    (NPO(beta=0.3, gamma=1.5, alpha=2.0), Term(Kind.NPO, 1.5 / 3, beta=0.3), 2 / 34),
    (SimNPO(beta=2.5, delta=0.1), Term(Kind.SIMNPO, 0.125 / 3, beta=2.5, delta=0.1), 1 / 34),
    (DPO(beta=0.2), Term(Kind.DPO, 1 / 3, beta=0.2), 1 / 34),
    (WGA(beta=1.5), Term(Kind.WGA, 1 / 160, beta=1.5), 1 / 34),
    (SatImp(gamma=0.4, beta2=0.5), Term(Kind.SATIMP, 0.4 / 160, beta1=5.0, beta2=0.5), 1 / 34),
    (CEU(ignore_first_n_answer_tokens=2, alpha=1.0), Term(Kind.CEU, 1 / 154, ignored=2), 1 / 34),
    (GradAscent(), Term(Kind.ASCENT, 1 / 160), 0.0),
    (GradDiff(gamma=0.5), Term(Kind.ASCENT, 0.5 / 160), 1 / 34),
    (IdkNLL(), Term(Kind.NLL, 1 / 160), 1 / 34),
    (None, Term(Kind.NONE), 1 / 34),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("objective", "forget", "alpha"),
    OBJECTIVES,
    ids=[each[0].name if each[0] else "fine-tuning" for each in OBJECTIVES],
)
def test_the_rule_of_an_objective_is_its_terms(
    objective: Objective | None, forget: Term, alpha: float, dtype: torch.dtype, backend: str
) -> None:
    """Alternates without a pair and idle sequences add nothing."""
    logprobs, offsets, frozen = batch(dtype)
    roles = torch.tensor([0, 2, 0, 2, 0, 2, 1, 1, 3], dtype=torch.int8)
    of_role = (forget, Term(Kind.NLL, alpha), Term(Kind.ALTERNATE), Term(Kind.NONE))
    expected, slopes = gold([of_role[role] for role in roles.tolist()], logprobs, offsets, frozen)
    reference = torch.segment_reduce(
        torch.cat([frozen, frozen.new_zeros(len(logprobs) - len(frozen))]), "sum", offsets=offsets
    )
    rule = step_terms(objective, roles, StepTotals(3, 160, 2, 34, forget_label_counts=(3, 150, 7)))
    assert isinstance(rule, SequenceRule)
    out = sequence_loss(logprobs, offsets, rule, reference_sums=reference, backend=backend)
    # sums of 150 numbers in another order; the sigmoid of a large margin amplifies the difference
    rtol, atol = (1e-12, 1e-15) if dtype == torch.float64 else (2e-5, 1e-7)
    assert out.terms.dtype == out.coefficients.dtype == dtype
    torch.testing.assert_close(out.terms.double(), expected, rtol=rtol, atol=atol)
    torch.testing.assert_close(out.coefficients.double(), slopes, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extremes(dtype: torch.dtype, backend: str) -> None:
    """Far beyond both ends of the sigmoid, and at p = 1: everything is finite, and small terms keep their digits."""
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


@pytest.mark.parametrize("value", [-math.inf, 0.0, math.nan])
@pytest.mark.parametrize(
    "kind", [kind for kind in Kind if kind not in (Kind.DPO, Kind.ALTERNATE)], ids=lambda k: k.name
)
def test_a_rule_as_a_function_gives_what_the_loss_gives(kind: Kind, value: float) -> None:
    """The gradient agrees too, even where ℓ − ℓ would be NaN."""
    offsets, reference = torch.tensor([0, 2, 3]), torch.tensor([-1.0, -2.0])
    logprobs = torch.tensor([value, -0.5, -1.0], requires_grad=True)
    rule = SequenceRule.of(torch.zeros(2, dtype=torch.int8), {0: Term(kind, 0.5)})
    expected = sequence_loss(logprobs.detach(), offsets, rule, reference_sums=reference, backend="torch")
    terms = rule(Sequences(logprobs, offsets, 0, reference))
    (gradient,) = torch.autograd.grad((terms * torch.tensor([2.0, 3.0])).sum(), logprobs)
    torch.testing.assert_close(terms.detach(), expected.terms, rtol=0, atol=0, equal_nan=True)
    scaled = expected.coefficients * torch.tensor([2.0, 2.0, 3.0])
    torch.testing.assert_close(gradient, scaled, rtol=0, atol=0, equal_nan=True)


def test_a_rule_as_a_function_may_be_weighted() -> None:
    """A pair's term depends on both of its sequences. The alternate's own term is 0, whatever its weight."""
    table = {0: Term(Kind.DPO, 0.5, beta=0.2), 1: Term(Kind.NLL, 0.1), 2: Term(Kind.ALTERNATE)}
    roles = torch.tensor([0, 2, 0, 2, 1, 2], dtype=torch.int8)
    logprobs, offsets, frozen = batch(torch.float64, LENGTHS[:6])
    logprobs.requires_grad_()
    reference = torch.stack(
        oracle.sums(torch.cat([frozen, frozen.new_zeros(len(logprobs) - len(frozen))]), offsets.tolist())
    )
    weights = torch.tensor([3.0, 100.0, -2.0, 100.0, 5.0, 100.0], dtype=torch.float64)
    rule = SequenceRule.of(roles, table)
    assert torch.autograd.gradcheck(lambda ell: rule(Sequences(ell, offsets, 0, reference)) * weights, (logprobs,))


def test_a_nan_stays_in_its_sequence_and_a_lonely_first_is_nan(backend: str) -> None:
    logprobs, offsets, frozen = batch(torch.float32)
    logprobs[4:8] = torch.nan
    for term in TERMS.values():
        rule = SequenceRule.of(torch.zeros(9, dtype=torch.int8), {0: term})
        out = sequence_loss(logprobs, offsets, rule, reference_logprobs=frozen, backend=backend)
        assert out.terms.isnan().tolist() == [False, False, True] + [False] * 6
        assert out.coefficients[:4].isfinite().all()
        assert out.coefficients[offsets[3] :].isfinite().all()
    # the alternate at the other end does not belong to it
    roles = torch.tensor([2] + [1] * 7 + [0], dtype=torch.int8)
    rule = SequenceRule.of(roles, {0: Term(Kind.DPO), 1: Term(Kind.NONE), 2: Term(Kind.ALTERNATE)})
    out = sequence_loss(logprobs, offsets, rule, reference_logprobs=frozen, backend=backend)
    assert out.terms.isnan().tolist() == [False] * 8 + [True]
    assert out.coefficients[offsets[8] :].isnan().all()
    assert (out.coefficients[: offsets[8]] == 0).all()


def test_every_output_is_written_and_repeats_bit_for_bit(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output buffers start as NaN. A sequence's bits do not depend on its neighbours."""
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


def test_an_unchecked_role_makes_its_sequence_nan(triton_backend: str) -> None:
    logprobs, offsets = torch.full((4,), -1.0), torch.tensor([0, 1, 2, 4])
    rule = SequenceRule.of(torch.zeros(3, dtype=torch.int8), {0: Term(Kind.NLL)})
    rule.roles[:2] = torch.tensor([-1, 8], dtype=torch.int8)  # changed after the check, which a GPU skips
    out = sequence_loss(logprobs, offsets, rule, backend=triton_backend)
    assert out.terms.isnan().tolist() == [True, True, False]
    assert out.coefficients.isnan().tolist() == [True, True, False, False]


def test_bad_input_is_refused() -> None:
    roles = torch.zeros(2, dtype=torch.int8)
    with pytest.raises(ValueError, match="`beta`: expected a positive number for NPO, got 0"):
        Term(Kind.NPO, beta=0.0)
    for number in (math.inf, math.nan, 1e39):
        with pytest.raises(ValueError, match="expected numbers that are finite in float32"):
            Term(Kind.NLL, number)
    with pytest.raises(ValueError, match="`kind`: expected a Kind, got 77"):
        Term(77)  # type: ignore[arg-type]
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
