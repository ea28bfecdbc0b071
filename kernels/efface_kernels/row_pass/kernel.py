"""The row pass in Triton: one program a row, two sweeps over it. See README.md; letters as in ``jit.py``."""

import triton
import triton.language as tl

from efface_kernels.jit import LOWEST, accumulate, cap, combine, expm1, load


@triton.jit
def _logprob(Row, target, v, SOFTCAP: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """First sweep: ℓ of the target, the row's maximum and Σ e^(z − maximum)."""
    # A target outside the vocabulary reads nothing and makes ℓ NaN. Read before the reductions below, whose barriers
    # keep the second sweep's stores behind it.
    inside = (target >= 0) & (target < v)
    zy, _slope = cap(tl.load(Row + target, mask=inside, other=float("nan")).to(ACC), SOFTCAP)
    top = tl.full([BLOCK], LOWEST, ACC)
    total = tl.zeros([BLOCK], ACC)
    # Whole blocks carry no mask, so that a vocabulary which no vector length divides still has 16-byte loads.
    whole = v // BLOCK * BLOCK
    offs_v = tl.arange(0, BLOCK)
    for start in range(0, whole, BLOCK):
        z, _ = load(Row, start + offs_v, None, SOFTCAP, ACC)
        top, total = accumulate(z, top, total)
    if whole < v:
        z, _ = load(Row, whole + offs_v, whole + offs_v < v, SOFTCAP, ACC)
        top, total = accumulate(z, top, total)
    row_top, row_total = combine(top, total)
    # Relative to the maximum, never to the logsumexp: a memorised target is the maximum, and its ℓ ≈ 0 would drown in
    # the rounding of z_y − lse.
    return (zy - row_top) - tl.log(row_total), row_top, row_total


@triton.jit
def _softmax_minus_onehot(Row, offs_v, mask_v, target, top, scale, entry, SOFTCAP: tl.constexpr, ACC: tl.constexpr):
    """Second sweep, one block: overwrite z by its derivative. The rounding to the row's dtype comes last."""
    z, slope = load(Row, offs_v, mask_v, SOFTCAP, ACC)
    p = tl.exp(z - top) * scale
    tl.store(Row + offs_v, tl.where(offs_v == target, entry, p) * slope, mask=mask_v)


# Targets are a slice of the batch's, which may begin anywhere.
@triton.jit(do_not_specialize=["reference_rows"], do_not_specialize_on_alignment=["Targets"])
def row_pass_kernel(
    Logits,  # (n, V)
    Targets,  # (n,)
    Logprobs,  # (n,)
    Reference,  # (m, V') or None
    ReferenceLogprobs,  # (m,) or None
    stride,
    v,
    reference_rows,
    reference_stride,
    reference_v,
    SOFTCAP: tl.constexpr,
    REFERENCE_SOFTCAP: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ℓ of a row, ℓ_ref of its reference row if it has one and, if GRADIENT, softmax − onehot in place."""
    row = tl.program_id(0).to(tl.int64)  # n · V passes 2^31
    target = tl.load(Targets + row)
    if Reference is not None:
        ACC_REF: tl.constexpr = ReferenceLogprobs.dtype.element_ty
        if row < reference_rows:
            RefRow = Reference + row * reference_stride
            frozen, _, _ = _logprob(RefRow, target, reference_v, REFERENCE_SOFTCAP, ACC_REF, BLOCK)
            tl.store(ReferenceLogprobs + row, frozen)
    ACC: tl.constexpr = Logprobs.dtype.element_ty
    Row = Logits + row * stride
    logprob, top, total = _logprob(Row, target, v, SOFTCAP, ACC, BLOCK)
    tl.store(Logprobs + row, logprob)
    if GRADIENT:
        entry = expm1(logprob)
        # NaN all over the row for a target out of range: a loss linear in ℓ would not see the NaN of ℓ
        scale = tl.where((target >= 0) & (target < v), 1.0 / total, float("nan"))
        whole = v // BLOCK * BLOCK
        offs_v = tl.arange(0, BLOCK)
        for start in range(0, whole, BLOCK):
            _softmax_minus_onehot(Row, start + offs_v, None, target, top, scale, entry, SOFTCAP, ACC)
        if whole < v:
            offs_v += whole
            _softmax_minus_onehot(Row, offs_v, offs_v < v, target, top, scale, entry, SOFTCAP, ACC)
