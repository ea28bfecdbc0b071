"""Functions shared by the Triton kernels. This module imports only Triton.

Naming: Capital names are pointers, lower-case names are values, UPPER-CASE names are compile-time constants. ``offs_v``
are positions within a row of logits; ``mask_v`` is true for the positions inside the row.
"""

import triton
import triton.language as tl

# Initial value of a running maximum. It is finite, so that a lane that read only −inf (a padded vocabulary) never
# computes inf − inf. Its product with log2 e is finite too.
LOWEST = tl.constexpr(-2.0e38)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def power(x):
    """e^x as a product and the GPU's 2^x instruction; ``tl.exp`` adds instructions that handle subnormal results."""
    return tl.exp2(x * LOG2E)


@triton.jit
def tanh(x):
    """Cephes' tanh for fp32 and fp64. Near 0 it uses a rational function, where formulas with exp lose precision."""
    size = tl.abs(x)
    e = tl.exp(-2.0 * size)
    far = (1.0 - e) / (1.0 + e)
    s = tl.minimum(x * x, 1.0)
    p = (-9.64399179425052238628e-1 * s - 9.92877231001918586564e1) * s - 1.61468768441708447952e3
    q = ((s + 1.12811678491632931402e2) * s + 2.23548839060100448583e3) * s + 4.84406305325125486048e3
    return tl.where(size < 0.625, x + x * s * (p / q), tl.where(x < 0, -far, far))


@triton.jit
def expm1(x):
    """e^x − 1 for x ≤ 0: 2t / (1 − t) with t = tanh(x / 2), which has no cancellation for x ≤ 0."""
    t = tanh(0.5 * x)
    return 2.0 * t / (1.0 - t)


@triton.jit
def cap(z, SOFTCAP: tl.constexpr):
    """Return z ← cap · tanh(z / cap) and the cap's derivative; SOFTCAP 0 means no cap.

    With e = e^(−2|z| / cap) ≤ 1, tanh is (1 − e) / (1 + e) and its derivative 4e / (1 + e)². Near 0 the absolute error
    is about cap · eps. That is enough for a logit, because a softmax depends only on the absolute error.
    """
    slope = 1.0
    if SOFTCAP > 0:
        e = power(tl.abs(z) * (-2.0 / SOFTCAP))
        part = 1.0 / (1.0 + e)
        t = (1.0 - e) * part
        z = tl.where(z < 0, -SOFTCAP * t, SOFTCAP * t)
        slope = (4.0 * e) * (part * part)
    return z, slope


@triton.jit
def load(Row, offs_v, mask_v, SOFTCAP: tl.constexpr, ACC: tl.constexpr, POLICY: tl.constexpr):
    """Return capped logits, −inf outside ``mask_v`` (None: all inside), and the cap's derivative."""
    if mask_v is None:
        z, slope = cap(tl.load(Row + offs_v, eviction_policy=POLICY).to(ACC), SOFTCAP)
    else:
        z, slope = cap(tl.load(Row + offs_v, mask=mask_v, other=0.0, eviction_policy=POLICY).to(ACC), SOFTCAP)
        z = tl.where(mask_v, z, float("-inf"))
    return z, slope


@triton.jit
def accumulate(z, top, total, GROUP: tl.constexpr):
    """Update the running maximum ``top`` and ``total`` = Σ e^(z − top) of each group of ``GROUP`` neighbours.

    One thread loads all neighbours of a group. A group costs one exponential more than its elements, and one maximum
    and one total per group take few registers. A maximum can drop a NaN; the total never does.
    """
    z = tl.reshape(z, [z.shape[0] // GROUP, GROUP])
    new = tl.maximum(top, tl.max(z, 1))
    return new, total * power(top - new) + tl.sum(power(z - new[:, None]), 1)


@triton.jit
def group_sums(x, GROUP: tl.constexpr):
    """Return the sums of every ``GROUP`` neighbours."""
    return tl.sum(tl.reshape(x, [x.shape[0] // GROUP, GROUP]), 1)


@triton.jit
def combine(top, total):
    """Reduce the groups to the row's maximum and Σ e^(z − maximum); called once per row."""
    row_top = tl.max(top, 0)
    return row_top, tl.sum(total * power(top - row_top), 0)


@triton.jit
def log1p(x):
    """log(1 + x) for 0 ≤ x ≤ 1, as 2 artanh(x / (2 + x)); its argument is ≤ 1/3, so 17 terms suffice for fp64."""
    t = x / (2.0 + x)
    s = t * t
    p = tl.zeros_like(t)
    for k in tl.static_range(17):
        p = p * s + 1.0 / (33 - 2 * k)
    return 2.0 * t * p
