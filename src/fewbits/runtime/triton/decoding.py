"""Weights of few bits made floats again: all of a matrix, some of its outputs, or the rows that an embedding wants."""

import triton
import triton.language as tl

from fewbits.runtime.triton.reading import ONE, block, numbers, weights


@triton.jit
def decode(out, ids, words, upper, scales, second, levels, row, first, count, columns, stride, across, down,
           LEVELS: tl.constexpr, SECOND: tl.constexpr, ZERO: tl.constexpr, LOWER: tl.constexpr, UPPER: tl.constexpr,
           GROUP: tl.constexpr, EVEN: tl.constexpr, CHOSEN: tl.constexpr, N: tl.constexpr):
    """Values of `count` outputs, those that `ids` says if `CHOSEN`, else from `first` on: output k's column c to
    `out[k * across + c * down]`."""
    FIELDS: tl.constexpr = 32 // LOWER
    BLOCK: tl.constexpr = 16 * FIELDS
    GROUPS: tl.constexpr = BLOCK // GROUP if GROUP < BLOCK else 1
    EACH: tl.constexpr = FIELDS // GROUPS
    b = tl.program_id(1)
    k = tl.program_id(0) * N + tl.arange(0, N)
    live = k < count
    n = first + k
    if CHOSEN:
        n = tl.load(ids + k, mask=live, other=0).to(tl.int32)
    j = tl.arange(0, 16)
    word, high = block(words, upper, b, n, live, stride, UPPER)
    factor = tl.load(row + n, mask=live, other=0.0)
    for g in tl.static_range(GROUPS):
        scale, offset = numbers(scales, second, (b * BLOCK + g * GROUP) // GROUP * stride + n, live, SECOND, ZERO)
        for i in tl.static_range(EACH):
            value = factor[None, :] * weights(word, high, levels, n, live, scale, offset, g * EACH + i, ONE, LEVELS,
                                              LOWER, UPPER)
            column = b * BLOCK + 16 * (g * EACH + i) + j
            keep = live[None, :] if EVEN else live[None, :] & (column < columns)[:, None]
            place = out + k.to(tl.int64)[None, :] * across + column.to(tl.int64)[:, None] * down
            tl.store(place, value.to(out.dtype.element_ty), mask=keep)
