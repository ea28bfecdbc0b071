"""The row pass in Triton: two sweeps over a row. See README.md; letters as in ``jit.py``."""

import triton
import triton.language as tl

from efface_kernels.jit import LOWEST, accumulate, cap, combine, expm1, load, power


@triton.jit
def _logprob(Row, target, v, SOFTCAP: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, POLICY: tl.constexpr):
    """First sweep: ℓ of the target, the row's maximum, Σ e^(z − maximum), and the cap's derivative at the target."""
    # A target outside the vocabulary reads nothing and makes ℓ NaN. Read before the reductions below, whose barriers
    # keep the second sweep's stores behind it.
    inside = (target >= 0) & (target < v)
    zy, slope = cap(tl.load(Row + target, mask=inside, other=float("nan")).to(ACC), SOFTCAP)
    GROUP: tl.constexpr = 128 // Row.dtype.element_ty.primitive_bitwidth  # 16 bytes: what a thread loads at once
    top = tl.full([BLOCK // GROUP], LOWEST, ACC)
    total = tl.zeros([BLOCK // GROUP], ACC)
    # Whole blocks carry no mask, so that a vocabulary which no vector length divides still has 16-byte loads.
    whole = v // BLOCK * BLOCK
    offs_v = tl.arange(0, BLOCK)
    for start in range(0, whole, BLOCK):
        z, _ = load(Row, start + offs_v, None, SOFTCAP, ACC, POLICY)
        top, total = accumulate(z, top, total, GROUP)
    if whole < v:
        z, _ = load(Row, whole + offs_v, whole + offs_v < v, SOFTCAP, ACC, POLICY)
        top, total = accumulate(z, top, total, GROUP)
    row_top, row_total = combine(top, total)
    # Relative to the maximum, never to the logsumexp: a memorised target is the maximum, and its ℓ ≈ 0 would drown in
    # the rounding of z_y − lse.
    return (zy - row_top) - tl.log(row_total), row_top, row_total, slope


@triton.jit
def _softmax(Row, offs_v, mask_v, top, scale, SOFTCAP: tl.constexpr, ACC: tl.constexpr, POLICY: tl.constexpr):
    """Second sweep, one block: overwrite z by softmax(z), times the cap's derivative."""
    z, slope = load(Row, offs_v, mask_v, SOFTCAP, ACC, POLICY)
    tl.store(Row + offs_v, power(z - top) * scale * slope, mask=mask_v, eviction_policy=POLICY)


@triton.jit
def _overwrite(
    Row,
    target,
    v,
    logprob,
    top,
    total,
    target_slope,
    SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    POLICY: tl.constexpr,
):
    """Overwrite a row by softmax − onehot, times the cap's derivative. The rounding to the row's dtype comes last."""
    inside = (target >= 0) & (target < v)
    # NaN all over the row for a target out of range: a loss linear in ℓ would not see the NaN of ℓ
    scale = tl.where(inside, 1.0 / total, float("nan"))
    whole = v // BLOCK * BLOCK
    offs_v = tl.arange(0, BLOCK)
    for start in range(0, whole, BLOCK):
        _softmax(Row, start + offs_v, None, top, scale, SOFTCAP, ACC, POLICY)
    if whole < v:
        _softmax(Row, whole + offs_v, whole + offs_v < v, top, scale, SOFTCAP, ACC, POLICY)
    # Not compared with every position of the row: stored on its own, when all threads have stored theirs.
    tl.debug_barrier()
    tl.store(Row + target, expm1(logprob) * target_slope, mask=inside)


# Targets are a slice of the batch's, which may begin anywhere.
@triton.jit(do_not_specialize=["rows", "reference_rows"], do_not_specialize_on_alignment=["Targets"])
def row_pass_kernel(
    Logits,  # (n, V)
    Targets,  # (n,)
    Logprobs,  # (n,)
    Reference,  # (m, V') or None
    ReferenceLogprobs,  # (m,) or None
    rows,
    stride,
    v,
    reference_rows,
    reference_stride,
    reference_v,
    SOFTCAP: tl.constexpr,
    REFERENCE_SOFTCAP: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
    PERSISTENT: tl.constexpr,
    HOLD: tl.constexpr,
):
    """ℓ of a row, ℓ_ref of its reference row if it has one and, if GRADIENT, softmax − onehot in place.

    One program a row; PERSISTENT: a program takes every ``num_programs``-th row. HOLD: the L2 cache is asked to hold a
    row until the second sweep has read it.
    """
    FIRST: tl.constexpr = "evict_last" if HOLD else ""
    SECOND: tl.constexpr = "evict_first" if HOLD else ""
    ACC: tl.constexpr = Logprobs.dtype.element_ty
    first = tl.program_id(0)
    end = rows if PERSISTENT else first + 1
    for place in range(first, end, tl.num_programs(0) if PERSISTENT else 1):
        row = tl.full([], 0, tl.int64) + place  # n · V passes 2^31
        target = tl.load(Targets + row)
        if Reference is not None:
            ACC_REF: tl.constexpr = ReferenceLogprobs.dtype.element_ty
            if row < reference_rows:
                RefRow = Reference + row * reference_stride
                frozen, _, _, _ = _logprob(RefRow, target, reference_v, REFERENCE_SOFTCAP, ACC_REF, BLOCK, SECOND)
                tl.store(ReferenceLogprobs + row, frozen)
        Row = Logits + row * stride
        logprob, top, total, slope = _logprob(Row, target, v, SOFTCAP, ACC, BLOCK, FIRST)
        tl.store(Logprobs + row, logprob)
        if GRADIENT:
            _overwrite(Row, target, v, logprob, top, total, slope, SOFTCAP, ACC, BLOCK, SECOND)
