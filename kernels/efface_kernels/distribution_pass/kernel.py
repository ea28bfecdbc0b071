"""The distribution pass in Triton: one program per row, two sweeps over both models' rows. Letters as in ``jit.py``."""

import triton
import triton.language as tl

from efface_kernels.jit import LOWEST, accumulate, combine, group_sums, load, power


@triton.jit
def _load_pair(
    Row,
    RefRow,
    offs_v,
    mask_v,
    place,
    SHIFT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    REFERENCE_SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
):
    """Return z, the derivative of its cap, and the reference's zr, lowered by SHIFT at index ``place``, the target."""
    z, slope = load(Row, offs_v, mask_v, SOFTCAP, ACC, "")
    zr, _ = load(RefRow, offs_v, mask_v, REFERENCE_SOFTCAP, ACC, "")
    if SHIFT != 0:
        zr = tl.where(offs_v == place, zr - SHIFT, zr)
    return z, slope, zr


@triton.jit
def _write(
    Row,
    RefRow,
    OutRow,
    offs_v,
    mask_v,
    place,
    p_top,
    q_top,
    p_log,
    q_log,
    SHIFT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    REFERENCE_SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Second sweep, one block: write p − q; return each group's share of KL(q‖p) and of Σ q log q."""
    z, slope, zr = _load_pair(Row, RefRow, offs_v, mask_v, place, SHIFT, SOFTCAP, REFERENCE_SOFTCAP, ACC)
    # Subtract the maximum before the logarithm of the sum: the difference of two close logits is exact.
    log_p = (z - p_top) - p_log
    log_q = (zr - q_top) - q_log
    q = power(log_q)
    if OutRow is not None:
        difference = (power(log_p) - q) * slope
        # OutRow can share the memory of RefRow, whose entries are not narrower. Then a store overwrites only entries
        # that this block or an earlier one has loaded. The barrier makes sure that all threads have finished their
        # loads.
        tl.debug_barrier()
        tl.store(OutRow + offs_v, difference, mask=mask_v)
    # q log q → 0 as q → 0: a class with q = 0 adds nothing, whatever p is. NaN is not 0 and stays in the sums.
    absent = q == 0
    log_q = tl.where(absent, 0.0, log_q)
    return group_sums(q * (log_q - tl.where(absent, 0.0, log_p)), GROUP), group_sums(q * log_q, GROUP)


# Targets are a slice of the batch's targets and can start at any address.
@triton.jit(do_not_specialize_on_alignment=["Targets"])
def distribution_pass_kernel(
    Logits,  # (n, V)
    Reference,  # (n, V)
    Targets,  # (n,)
    Out,  # (n, V) or None
    Divergence,  # (n,)
    Entropy,  # (n,)
    stride,
    reference_stride,
    out_stride,
    v,
    SHIFT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    REFERENCE_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute KL(q‖p) and the entropy of q of a row; write p − q to Out unless it is None.

    Out is Logits, shares the memory of Reference, or is separate memory.
    """
    row = tl.program_id(0).to(tl.int64)  # n · V can exceed 2^31
    ACC: tl.constexpr = Divergence.dtype.element_ty
    GROUP: tl.constexpr = 128 // Logits.dtype.element_ty.primitive_bitwidth
    REF_GROUP: tl.constexpr = 128 // Reference.dtype.element_ty.primitive_bitwidth
    Row, RefRow = Logits + row * stride, Reference + row * reference_stride
    OutRow = None if Out is None else Out + row * out_stride
    target = tl.load(Targets + row)
    place = target.to(tl.int32)
    offs_v = tl.arange(0, BLOCK)
    whole = v // BLOCK * BLOCK  # full blocks are not masked, see row_pass/kernel.py

    p_top, q_top = tl.full([BLOCK // GROUP], LOWEST, ACC), tl.full([BLOCK // REF_GROUP], LOWEST, ACC)
    p_total, q_total = tl.zeros([BLOCK // GROUP], ACC), tl.zeros([BLOCK // REF_GROUP], ACC)
    for start in range(0, whole, BLOCK):
        z, _, zr = _load_pair(Row, RefRow, start + offs_v, None, place, SHIFT, SOFTCAP, REFERENCE_SOFTCAP, ACC)
        p_top, p_total = accumulate(z, p_top, p_total, GROUP)
        q_top, q_total = accumulate(zr, q_top, q_total, REF_GROUP)
    at = whole + offs_v
    if whole < v:
        z, _, zr = _load_pair(Row, RefRow, at, at < v, place, SHIFT, SOFTCAP, REFERENCE_SOFTCAP, ACC)
        p_top, p_total = accumulate(z, p_top, p_total, GROUP)
        q_top, q_total = accumulate(zr, q_top, q_total, REF_GROUP)
    p_row_top, p_row_total = combine(p_top, p_total)
    q_row_top, q_row_total = combine(q_top, q_total)
    # NaN for a target out of range, whose shift would otherwise be skipped silently
    p_log = tl.where((target >= 0) & (target < v), tl.log(p_row_total), float("nan"))
    q_log = tl.log(q_row_total)

    divergence, negative = tl.zeros([BLOCK // GROUP], ACC), tl.zeros([BLOCK // GROUP], ACC)
    for start in range(0, whole, BLOCK):
        kl, part = _write(
            Row, RefRow, OutRow, start + offs_v, None, place, p_row_top, q_row_top, p_log, q_log,
            SHIFT, SOFTCAP, REFERENCE_SOFTCAP, ACC, GROUP,
        )  # fmt: skip
        divergence += kl
        negative += part
    if whole < v:
        kl, part = _write(
            Row, RefRow, OutRow, at, at < v, place, p_row_top, q_row_top, p_log, q_log,
            SHIFT, SOFTCAP, REFERENCE_SOFTCAP, ACC, GROUP,
        )  # fmt: skip
        divergence += kl
        negative += part
    tl.store(Divergence + row, tl.sum(divergence, 0))
    tl.store(Entropy + row, -tl.sum(negative, 0))
