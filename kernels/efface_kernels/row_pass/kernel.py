"""The row pass in Triton: two sweeps over a row. See README.md; letters as in ``jit.py``."""

import triton
import triton.language as tl

from efface_kernels.jit import LOWEST, accumulate, cap, combine, expm1, load, power


@triton.jit
def _logprob(Row, target, v, SOFTCAP: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, POLICY: tl.constexpr):
    """First sweep: return ℓ of the target, the row's maximum, Σ e^(z − maximum), the cap's derivative at the target."""
    # A target outside the vocabulary is not read and makes ℓ NaN. The target is loaded before the reductions below,
    # whose barriers order this load before the stores of the second sweep.
    inside = (target >= 0) & (target < v)
    zy, slope = cap(tl.load(Row + target, mask=inside, other=float("nan")).to(ACC), SOFTCAP)
    GROUP: tl.constexpr = 128 // Row.dtype.element_ty.primitive_bitwidth  # 16 bytes, one load of a thread
    top = tl.full([BLOCK // GROUP], LOWEST, ACC)
    total = tl.zeros([BLOCK // GROUP], ACC)
    # Full blocks are not masked, so that they use 16-byte loads even if the vocabulary is not a multiple of a vector.
    whole = v // BLOCK * BLOCK
    offs_v = tl.arange(0, BLOCK)
    for start in range(0, whole, BLOCK):
        z, _ = load(Row, start + offs_v, None, SOFTCAP, ACC, POLICY)
        top, total = accumulate(z, top, total, GROUP)
    if whole < v:
        z, _ = load(Row, whole + offs_v, whole + offs_v < v, SOFTCAP, ACC, POLICY)
        top, total = accumulate(z, top, total, GROUP)
    row_top, row_total = combine(top, total)
    # Subtract the maximum first, not the logsumexp: a memorised target is the maximum, and its ℓ ≈ 0 would be lost in
    # the rounding error of z_y − logsumexp.
    return (zy - row_top) - tl.log(row_total), row_top, row_total, slope


@triton.jit
def _softmax(Row, offs_v, mask_v, top, scale, SOFTCAP: tl.constexpr, ACC: tl.constexpr, POLICY: tl.constexpr):
    """Second sweep, one block: overwrite z by softmax(z) times the cap's derivative."""
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
    """Overwrite a row by (softmax − onehot) times the cap's derivative, rounded to the row's dtype only at the end."""
    inside = (target >= 0) & (target < v)
    # A target out of range makes the whole row NaN: the gradient of a loss that is linear in ℓ does not depend on ℓ
    scale = tl.where(inside, 1.0 / total, float("nan"))
    whole = v // BLOCK * BLOCK
    offs_v = tl.arange(0, BLOCK)
    for start in range(0, whole, BLOCK):
        _softmax(Row, start + offs_v, None, top, scale, SOFTCAP, ACC, POLICY)
    if whole < v:
        _softmax(Row, whole + offs_v, whole + offs_v < v, top, scale, SOFTCAP, ACC, POLICY)
    # The target's entry is stored separately, after all threads have stored theirs. This is cheaper than comparing
    # every position with the target.
    tl.debug_barrier()
    tl.store(Row + target, expm1(logprob) * target_slope, mask=inside)


# Targets are a slice of the batch's targets and can start at any address.
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
    """Compute ℓ of a row, ℓ_ref of its reference row if there is one, and, if GRADIENT, softmax − onehot in place.

    One program per row. PERSISTENT: each program processes every ``num_programs``-th row. HOLD: eviction hints ask the
    L2 cache to keep a row until the second sweep has read it.
    """
    FIRST: tl.constexpr = "evict_last" if HOLD else ""
    SECOND: tl.constexpr = "evict_first" if HOLD else ""
    ACC: tl.constexpr = Logprobs.dtype.element_ty
    first = tl.program_id(0)
    end = rows if PERSISTENT else first + 1
    for place in range(first, end, tl.num_programs(0) if PERSISTENT else 1):
        row = tl.full([], 0, tl.int64) + place  # n · V can exceed 2^31
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
