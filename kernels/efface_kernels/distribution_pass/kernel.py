"""The distribution pass in Triton: one program a row, two sweeps over both models' rows. Letters as in ``jit.py``."""

import triton
import triton.language as tl

from efface_kernels.jit import LOWEST, accumulate, combine, load


@triton.jit
def _load_pair(
    Row,
    RefRow,
    offs_v,
    mask_v,
    target,
    SHIFT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    REFERENCE_SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
):
    z, slope = load(Row, offs_v, mask_v, SOFTCAP, ACC)
    zr, _ = load(RefRow, offs_v, mask_v, REFERENCE_SOFTCAP, ACC)
    if SHIFT != 0:
        zr = tl.where(offs_v == target, zr - SHIFT, zr)
    return z, slope, zr


@triton.jit
def _terms(z, zr, p_top, q_top, p_log, q_log):
    """P − q, and the terms of KL(q‖p) and of q's entropy. The maximum goes first: a difference of logits is exact."""
    log_p = (z - p_top) - p_log
    log_q = (zr - q_top) - q_log
    q = tl.exp(log_q)
    # q log q → 0 as q → 0: a class that q excludes adds nothing, whatever p says of it. NaN is not 0.
    kl = tl.where(q == 0, 0.0, q * (log_q - log_p))
    return tl.exp(log_p) - q, kl, tl.where(q == 0, 0.0, q * log_q)


# Targets are a slice of the batch's, which may begin anywhere.
@triton.jit(do_not_specialize_on_alignment=["Targets"])
def distribution_pass_kernel(
    Logits,  # (n, V)
    Reference,  # (n, V)
    Targets,  # (n,)
    Divergence,  # (n,)
    Entropy,  # (n,)
    stride,
    reference_stride,
    v,
    SHIFT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    REFERENCE_SOFTCAP: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """KL(q‖p) and the entropy of q of a row and, if GRADIENT, p − q in place of the policy's logits."""
    row = tl.program_id(0).to(tl.int64)  # n · V passes 2^31
    ACC: tl.constexpr = Divergence.dtype.element_ty
    Row, RefRow = Logits + row * stride, Reference + row * reference_stride
    target = tl.load(Targets + row)
    offs_v = tl.arange(0, BLOCK)
    whole = v // BLOCK * BLOCK  # whole blocks carry no mask, see row_pass/kernel.py

    p_top, q_top = tl.full([BLOCK], LOWEST, ACC), tl.full([BLOCK], LOWEST, ACC)
    p_total, q_total = tl.zeros([BLOCK], ACC), tl.zeros([BLOCK], ACC)
    for start in range(0, whole, BLOCK):
        z, _, zr = _load_pair(Row, RefRow, start + offs_v, None, target, SHIFT, SOFTCAP, REFERENCE_SOFTCAP, ACC)
        p_top, p_total = accumulate(z, p_top, p_total)
        q_top, q_total = accumulate(zr, q_top, q_total)
    at = whole + offs_v
    if whole < v:
        z, _, zr = _load_pair(Row, RefRow, at, at < v, target, SHIFT, SOFTCAP, REFERENCE_SOFTCAP, ACC)
        p_top, p_total = accumulate(z, p_top, p_total)
        q_top, q_total = accumulate(zr, q_top, q_total)
    p_row_top, p_row_total = combine(p_top, p_total)
    q_row_top, q_row_total = combine(q_top, q_total)
    # NaN for a target out of range, whose shift would otherwise be left out silently
    p_log = tl.where((target >= 0) & (target < v), tl.log(p_row_total), float("nan"))
    q_log = tl.log(q_row_total)

    divergence, entropy = tl.zeros([BLOCK], ACC), tl.zeros([BLOCK], ACC)
    for start in range(0, whole, BLOCK):
        z, slope, zr = _load_pair(Row, RefRow, start + offs_v, None, target, SHIFT, SOFTCAP, REFERENCE_SOFTCAP, ACC)
        difference, kl, negative = _terms(z, zr, p_row_top, q_row_top, p_log, q_log)
        divergence += kl
        entropy -= negative
        if GRADIENT:
            tl.store(Row + start + offs_v, difference * slope)
    if whole < v:
        z, slope, zr = _load_pair(Row, RefRow, at, at < v, target, SHIFT, SOFTCAP, REFERENCE_SOFTCAP, ACC)
        difference, kl, negative = _terms(z, zr, p_row_top, q_row_top, p_log, q_log)
        divergence += kl
        entropy -= negative
        if GRADIENT:
            tl.store(Row + at, difference * slope, mask=at < v)
    tl.store(Divergence + row, tl.sum(divergence, 0))
    tl.store(Entropy + row, tl.sum(entropy, 0))
