"""The sequence loss in Triton: one program per sequence. Letters as in ``jit.py``; formulas in ``reference.py``."""

import triton
import triton.language as tl

from efface_kernels.jit import expm1, log1p
from efface_kernels.sequence_loss.kinds import Kind

NONE = tl.constexpr(int(Kind.NONE))
NLL = tl.constexpr(int(Kind.NLL))
ASCENT = tl.constexpr(int(Kind.ASCENT))
SIMNPO = tl.constexpr(int(Kind.SIMNPO))
DPO = tl.constexpr(int(Kind.DPO))
ALTERNATE = tl.constexpr(int(Kind.ALTERNATE))
WGA = tl.constexpr(int(Kind.WGA))
CEU = tl.constexpr(int(Kind.CEU))
# The table has one row per role, with columns kind, weight, beta, delta, beta1, beta2, ignored.
ROLES, COLUMNS = tl.constexpr(8), tl.constexpr(7)


@triton.jit
def _sum(Values, start, stop, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """Return the sum of a sequence's values, first per lane and then over the lanes: always in the same order."""
    total = tl.zeros([BLOCK], ACC)
    for row in range(start, stop, BLOCK):
        offs_r = row + tl.arange(0, BLOCK)
        total += tl.load(Values + offs_r, mask=offs_r < stop, other=0.0).to(ACC)
    return tl.sum(total, 0)


@triton.jit
def _sums(
    s,
    Logprobs,
    Offsets,
    ReferenceLogprobs,
    reference_rows,
    ReferenceSums,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return L and L_ref of sequence ``s``, and its first and last row. L_ref is 0 without a reference."""
    first = tl.load(Offsets)
    start, stop = tl.load(Offsets + s) - first, tl.load(Offsets + s + 1) - first
    frozen = tl.full([], 0.0, ACC)
    if ReferenceLogprobs is not None:
        # Rows from M on belong to sequences without a reference and add nothing.
        frozen = _sum(ReferenceLogprobs, start, tl.minimum(stop, reference_rows), ACC, BLOCK)
    elif ReferenceSums is not None:
        frozen = tl.load(ReferenceSums + s).to(ACC)
    return _sum(Logprobs, start, stop, ACC, BLOCK), frozen, start, stop


@triton.jit
def _row(Table, Roles, s):
    """Return the table row of a sequence, and whether its role is valid; roles are not checked before the launch."""
    role = tl.load(Roles + s).to(tl.int32)
    known = (role >= 0) & (role < ROLES)
    return Table + tl.where(known, role, 0) * COLUMNS, known


@triton.jit
def _whole(Row, kind, paired, policy, frozen, other, length, ACC: tl.constexpr):
    """Return a term that depends on L, and ∂term/∂L. ``other`` is L − L_ref of the pair's other sequence."""
    beta, delta = tl.load(Row + 2).to(ACC), tl.load(Row + 3).to(ACC)
    # −(2/β) log σ(x), with slope = ∂x/∂L
    x, slope = -beta * (policy - frozen), -beta
    if kind == SIMNPO:
        x, slope = beta * (-policy / length - delta), -beta / length
    if paired:
        sign = tl.where(kind == DPO, 1.0, -1.0)
        x, slope = sign * beta * (other - (policy - frozen)), -sign * beta
    e = tl.exp(-tl.abs(x))
    term = 2.0 / beta * (log1p(e) - tl.where(x > 0, 0.0, x))
    c = -2.0 / beta * (tl.where(x > 0, e, 1.0) / (1.0 + e)) * slope  # σ(−x)
    if kind == ALTERNATE:  # the term of a pair is assigned to its first sequence
        term, c = 0.0 * beta, tl.where(paired, c, 0.0)
    if (kind == NLL) | (kind == ASCENT):
        sign = tl.where(kind == NLL, -1.0, 1.0)
        term, c = sign * policy, sign + 0.0 * beta
    if kind == NONE:
        term, c = 0.0 * beta, 0.0 * beta
    return term, c


@triton.jit
def _token(logprob, kind, beta, beta1, beta2, EPS: tl.constexpr):
    """Return one row's summand in WGA, SatImp or CEU, and its coefficient."""
    p, rest = tl.exp(logprob), -expm1(logprob)
    satimp = tl.exp(beta1 * logprob) * tl.where(beta2 == 0, 1.0, tl.exp(beta2 * tl.log(rest)))
    weight = tl.where(kind == WGA, tl.exp(beta * logprob), satimp)
    kept = EPS + rest
    return tl.where(kind == CEU, -tl.log(kept), weight * logprob), tl.where(kind == CEU, p / kept, weight)


@triton.jit
def _tokens(Row, Logprobs, Coefficients, start, stop, kind, weight, EPS: tl.constexpr, BLOCK: tl.constexpr):
    """Return a term that is a sum over rows, and write the coefficients of the rows."""
    ACC: tl.constexpr = Logprobs.dtype.element_ty
    beta, beta1, beta2 = tl.load(Row + 2).to(ACC), tl.load(Row + 4).to(ACC), tl.load(Row + 5).to(ACC)
    begin = start + tl.where(kind == CEU, tl.load(Row + 6).to(tl.int32), 0)
    total = tl.zeros([BLOCK], ACC)
    for row in range(start, stop, BLOCK):
        offs_r = row + tl.arange(0, BLOCK)
        logprob = tl.load(Logprobs + offs_r, mask=offs_r < stop, other=-1.0)
        share, c = _token(logprob, kind, beta, beta1, beta2, EPS)
        counted = (offs_r >= begin) & (offs_r < stop)
        total += tl.where(counted, share, 0.0)
        tl.store(Coefficients + offs_r, tl.where(counted, weight * c, 0.0), mask=offs_r < stop)
    return tl.sum(total, 0)


# Slices of a batch can have any alignment. Without this the kernel would be compiled for each combination.
@triton.jit(
    do_not_specialize=["reference_rows"],
    do_not_specialize_on_alignment=[
        *("Logprobs", "Offsets", "Roles", "ReferenceLogprobs", "ReferenceSums", "Terms", "Sums", "Coefficients"),
    ],
)
def sequence_loss_kernel(
    Logprobs,  # (n,)
    Offsets,  # (s + 1,); the first offset corresponds to row 0 of Logprobs
    Roles,  # (s,)
    Table,  # (R, 7)
    ReferenceLogprobs,  # (m,) or None
    reference_rows,
    ReferenceSums,  # (s,) or None; written if ReferenceLogprobs is not None, else read
    Terms,  # (s,)
    Sums,  # (s,)
    Coefficients,  # (n,)
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute L, L_ref and the weighted term of one sequence, and c of each of its rows."""
    s = tl.program_id(0)
    ACC: tl.constexpr = Logprobs.dtype.element_ty
    policy, frozen, start, stop = _sums(
        s, Logprobs, Offsets, ReferenceLogprobs, reference_rows, ReferenceSums, ACC, BLOCK
    )
    tl.store(Sums + s, policy)
    if ReferenceLogprobs is not None:
        tl.store(ReferenceSums + s, frozen)

    Row, known = _row(Table, Roles, s)
    kind = tl.load(Row).to(tl.int32)
    if (kind == ALTERNATE) & (s > 0):  # use the parameters of the previous sequence if it is the first of a pair
        Before, _ = _row(Table, Roles, s - 1)
        if tl.load(Before).to(tl.int32) == DPO:
            Row = Before
    paired = tl.load(Row).to(tl.int32) == DPO
    weight = tl.where(known, tl.load(Row + 1).to(ACC), float("nan"))

    if kind >= WGA:
        term = _tokens(Row, Logprobs, Coefficients, start, stop, kind, weight, EPS, BLOCK)
    else:
        other = tl.full([], float("nan"), ACC)  # NaN for the first of a pair without a second
        place = tl.where(kind == DPO, s + 1, s - 1)
        if paired & (place < tl.num_programs(0)):
            o_policy, o_frozen, _, _ = _sums(
                place, Logprobs, Offsets, ReferenceLogprobs, reference_rows, ReferenceSums, ACC, BLOCK
            )
            other = o_policy - o_frozen
        length = (stop - start).to(ACC)
        term, c = _whole(Row, kind, paired, policy, frozen, other, length, ACC)
        for row in range(start, stop, BLOCK):
            offs_r = row + tl.arange(0, BLOCK)
            tl.store(Coefficients + offs_r, tl.zeros([BLOCK], ACC) + weight * c, mask=offs_r < stop)
    tl.store(Terms + s, weight * term)
