"""The scale pass in Triton. Letters as in ``jit.py``."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count"])
def scale_kernel(
    Values,  # (count,)
    Factor,  # ()
    Out,  # (count,), can be Values
    count,
    IN_PLACE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute Out = Factor · Values. If IN_PLACE and the factor is 1, no values are read or written."""
    factor = tl.load(Factor)
    ACC: tl.constexpr = Factor.dtype.element_ty
    stop = count.to(tl.int64)  # V · D can exceed 2^31
    if IN_PLACE:
        stop = tl.where(factor == 1.0, 0, stop)
    # Full blocks are not masked, so that they use 16-byte loads.
    whole = stop // BLOCK * BLOCK
    first, step = tl.program_id(0).to(tl.int64) * BLOCK, tl.num_programs(0).to(tl.int64) * BLOCK
    lanes = tl.arange(0, BLOCK)
    for start in range(first, whole, step):
        tl.store(Out + start + lanes, tl.load(Values + start + lanes).to(ACC) * factor)
    if (tl.program_id(0) == 0) & (whole < stop):
        offs = whole + lanes
        tl.store(Out + offs, tl.load(Values + offs, mask=offs < stop).to(ACC) * factor, mask=offs < stop)
