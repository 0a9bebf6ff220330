"""Programs that share the columns of an output: each leaves its sums, and the last to come adds all of them up."""

import triton
import triton.language as tl

from fewbits.runtime.triton.available import awaited_stores

AWAITED = tl.constexpr(awaited_stores())


@triton.jit
def is_last(arrived, SPLIT: tl.constexpr):
    """Whether all other programs of a tile have left their sums; its counter is then ready for the next launch."""
    if AWAITED != "":
        tl.inline_asm_elementwise(AWAITED, "=v,v,~{memory}", [tl.arange(0, 64)], tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()
    came = tl.atomic_add(arrived, 1, sem="acq_rel")
    if came == SPLIT - 1:
        tl.store(arrived, 0)
    return came == SPLIT - 1
